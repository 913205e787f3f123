"""A reply's text while it grows: whole characters, and nothing of what will turn out to end it.

A token is a piece of bytes, not of text. Byte-level tokenizers cut a character in the middle, and
what decoders make of a token depends on the ones before it (SentencePiece drops a space at the
start). So the text of a new token is the difference between two decodings that begin a few tokens
earlier, and it is held back while it ends in a replacement character, which stands for half of one.

A stop string may begin in one token and end in another. Text that could be the beginning of one is
held back until the next token decides.
"""

from collections.abc import Sequence

from qlora_jax.data.tokenizer import Tokenizer

# Enough for a character's bytes and a space of its own.
_CONTEXT = 6
_HALF = "�"


class GrowingText:
    """The text of one reply.

    Example:
      >>> import tokenizers
      >>> words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
      >>> text = GrowingText(Tokenizer(tokenizers.Tokenizer(words)), [0], stop=["b b"])
      >>> text.add(0), text.add(1), text.stopped, text.add(0), text.add(1), text.add(1)
      (' a', ' ', False, 'b a', ' ', '')
      >>> text.stopped
      True
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        """Begins a reply.

        Args:
          tokenizer: the model's.
          prompt_ids: what is replied to; its last tokens are the context of the first.
          stop: texts that end the reply.
        """
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids = list(prompt_ids[-_CONTEXT:])
        # Tokens from `_start` on are decoded; the text of those before `_shown` is given away.
        self._start, self._shown = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is new and safe to show with one more token."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(_HALF):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._release(whole[len(before) :])

    def finish(self) -> str:
        """The text that was held back, when no token follows any more."""
        before = self._decode(self._ids[self._start : self._shown])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        text, self._held = self._release(rest) + self._held, ""
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters could begin a stop string.

    >>> _overlap("wait #", "### Human:"), _overlap("wait", "### Human:")
    (1, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
