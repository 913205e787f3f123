"""Where in a text the assistant writes, and tokens that do not cross those borders.

A chat template is an arbitrary program, so the mask cannot be guessed from its text. Instead the
conversation is rendered several times. For each assistant message `i`,

    before = render(messages[:i], add_generation_prompt=True)     # what the model is given
    after  = render(messages[:i + 1])                             # what it should have made of it

and if `before` is a prefix of `after`, and `after` of the whole conversation, the characters
between their lengths are exactly what the model has to write. Templates that write earlier answers
in another way than the last one (Qwen3 leaves their reasoning out) are handled by looking for the
answer right after `before`; any other template is refused.

Characters become tokens without losing that border. The pieces between borders are encoded one by
one; if that gives the ids of the whole text, as it does when special tokens stand at the borders,
the mask is exact. Otherwise the text is encoded prefix by prefix, which is what generation sees.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from qlora_jax.data.formats import BadField
from qlora_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = False
    ) -> str: ...


def render_spans(messages: Messages, tokenizer: ChatTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds the characters that the assistant writes.

    Args:
        messages: a checked conversation.
        tokenizer: its chat template does the rendering.

    Returns:
        The text, and for every assistant message the start and end of its characters in it.

    Raises:
        BadField: if the template raises, or is not prefix-stable.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    tokenizer = _Prefixes(messages, answers, tokenizer)
    text = render(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for i in answers:
        span = _find_span(text, messages[: i + 1], tokenizer)
        if span is None or span[0] < (spans[-1][1] if spans else 0) or span[0] == span[1]:
            raise BadField(
                f"messages[{i}]",
                "that the chat template writes this answer differently once more messages follow, "
                "so its tokens cannot be told apart",
                'one answer a record, train_on="all", or another chat template',
            )
        spans.append(span)
    return text, spans


class _Prefixes:
    """Has the beginnings of one conversation written all at once, by a tokenizer that can do so.

    A conversation of n answers takes 1 + 2 n texts, and each way to where templates are rendered
    and back takes longer than the rendering.
    """

    def __init__(self, messages: Messages, answers: Sequence[int], tokenizer: ChatTokenizer):
        self._messages, self._tokenizer = messages, tokenizer
        self._texts: dict[tuple[int, bool], str] = {}
        wanted = {(len(messages), False): None}
        for i in answers:
            wanted |= {(i, True): None, (i + 1, False): None}
        if render_prefixes := getattr(tokenizer, "render_prefixes", None):
            texts = render_prefixes(messages, list(wanted))
            self._texts = dict(zip(wanted, texts or (), strict=False))

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        text = self._texts.get((len(messages), add_generation_prompt))
        if text is None or list(messages) != list(self._messages[: len(messages)]):
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt)
        return text


def _find_span(text: str, messages: Messages, tokenizer: ChatTokenizer) -> tuple[int, int] | None:
    """Finds the last of `messages`, an answer, in the text of the whole conversation."""
    *earlier, last = messages
    before = render(earlier, tokenizer, add_generation_prompt=True)
    after = render(messages, tokenizer)
    if not text.startswith(before):
        return None
    if after.startswith(before) and text.startswith(after):
        return len(before), len(after)
    # The template shortens earlier answers: what follows `before` must be the answer and the end of
    # a turn, which shows behind an answer that occurs nowhere else.
    marker = "answer"
    while marker in after:
        marker += "#"
    marked = render([*earlier, {**last, "content": marker}], tokenizer)
    end_of_turn = marked.partition(marker)[2]
    for answer in (last["content"], last["content"].strip()):
        if end_of_turn and text.startswith(answer + end_of_turn, len(before)):
            return len(before), len(before) + len(answer) + len(end_of_turn)
    return None


def render(
    messages: Messages, tokenizer: ChatTokenizer, add_generation_prompt: bool = False
) -> str:
    """Writes a conversation with the chat template.

    Raises:
        BadField: if the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt
        )
    except UserError as error:
        raise BadField("messages", f"that {error}") from None


def encode_pieces(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: ChatTokenizer
) -> list[list[int]]:
    """Encodes a text so that no token crosses a border of a span.

    Args:
        text: the rendered conversation.
        spans: start and end characters of the answers, in order, not overlapping.
        tokenizer: encodes without adding special tokens.

    Returns:
        Ids of the pieces: context, answer, context, answer, ..., rest.

    Raises:
        BadField: if the tokenizer cannot encode a piece by itself.
    """
    pieces = [tokenizer.encode(part) if part else [] for part in text_parts(text, spans)]
    if list(itertools.chain(*pieces)) == tokenizer.encode(text):
        return pieces
    # A tokenizer that sets a space before every text it is given, or a border inside a token.
    pieces, ids, end = [], [], 0
    for part in text_parts(text, spans):
        end += len(part)
        prefix = tokenizer.encode(text[:end])
        piece = prefix[len(ids) :]
        if prefix[: len(ids)] != ids:
            piece = tokenizer.encode(part) if part else []
            _check_same_text(ids + piece, prefix, tokenizer)
        pieces.append(piece)
        ids = ids + piece
    return pieces


def text_parts(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Cuts a text at the borders of its spans: an odd number of parts, some maybe empty."""
    borders = [0, *itertools.chain(*spans), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def _check_same_text(ids: list[int], whole: list[int], tokenizer: ChatTokenizer) -> None:
    pieced, text = (tokenizer.decode(x, skip_special_tokens=False) for x in (ids, whole))
    if pieced != text:
        found = f"a border between prompt and answer inside a token, near {text[-40:]!r}"
        raise BadField("messages", found, "a chat template whose prompt does not end with a space")
