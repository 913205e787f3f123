"""Which tokens carry loss: from a `Record` to token ids with a mask.

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

Loss ends with the answer's end token (`<|im_end|>`, `</s>`): what a template writes after it,
usually a line break, is never generated. `loss_mask[t] = 1` says that token t is a target,
predicted from the tokens before it; the first token of an example therefore never carries loss.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Int

from qlora_jax.data.formats import BadField, Record
from qlora_jax.data.report import DataReport
from qlora_jax.errors import DataError, UserError

TrainOn = Literal["assistant", "all"]
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


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized record.

    Attributes:
        tokens: token ids.
        loss_mask: 1 where the token is a target, else 0; never 1 at the first position.
        record_id: the record it comes from, "train.jsonl:17".
        truncated: whether the record was longer than the maximum length.
    """

    tokens: Int[np.ndarray, " T"]
    loss_mask: Int[np.ndarray, " T"]
    record_id: str
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """Context and then what is to be learned from it.

    Attributes:
        context: ids without loss.
        target: ids with loss.
        closed: whether the target ends with an end token, which survives truncation.
    """

    context: list[int]
    target: list[int]
    closed: bool


def tokenize_records(
    records: Iterable[Record],
    tokenizer: ChatTokenizer,
    max_len: int,
    train_on: TrainOn = "assistant",
    on_bad_record: Literal["error", "skip"] = "error",
    report: DataReport | None = None,
    literal: bool = False,
) -> list[Example]:
    """Renders, tokenizes and masks records.

    A record longer than `max_len` is cut inside the first answer that does not fit, and its end
    token is kept; later turns are left out. A record whose prompt leaves no room for any answer is
    dropped and counted.

    Args:
        records: what `load_records` gives.
        tokenizer: the model's tokenizer. With a chat template all conversations go through it;
            without one, their literal text (prompt and completion, one after the other) is closed
            with the end token.
        max_len: most tokens of an example, at least 3.
        train_on: "assistant" puts loss on the answers, "all" on every token. Plain text always has
            loss on every token.
        on_bad_record: what to do when the chat template refuses a record: "error" or "skip".
        report: takes the counts; without one, skipped and dropped records are reported in the log.
        literal: prefer a record's literal text to the chat template.

    Returns:
        The examples in the order of the records; each has at least one token with loss.

    Raises:
        DataError: if a record cannot be rendered or masked exactly, or if no record at all has a
            token with loss; then one of them is shown.

    >>> import tokenizers
    >>> from qlora_jax.data.formats import pair
    >>> from qlora_jax.data.tokenizer import Tokenizer
    >>> words = tokenizers.models.WordLevel({"2+2=": 0, "4": 1, "</s>": 2}, unk_token="</s>")
    >>> backend = tokenizers.Tokenizer(words)
    >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> record = Record("a.jsonl:1", "prompt_completion", **pair("2+2= ", "4"))
    >>> examples = tokenize_records([record], Tokenizer(backend, eos_token_ids=[2]), max_len=8)
    >>> examples[0].tokens.tolist(), examples[0].loss_mask.tolist()
    ([0, 1, 2], [0, 1, 1])
    """
    if max_len < 3:
        raise DataError(
            f"max_len={max_len}: need room for at least a prompt, an answer and its end token"
        )
    if train_on not in ("assistant", "all"):
        raise DataError(f"train_on={train_on!r} is not one of assistant, all")
    records, own_report = list(records), report is None
    report = report or DataReport(records=len(records))
    examples: list[Example] = []
    dropped: list[tuple[str, list[Turn]]] = []
    for record in records:
        try:
            turns = record_turns(record, tokenizer, train_on, literal)
        except BadField as problem:
            if on_bad_record == "error":
                raise DataError(f"{record.record_id}: {problem}") from None
            report.skip(f"{record.record_id}: {problem}")
            continue
        example = assemble(turns, max_len, record.record_id)
        if not example.loss_mask.any():
            reason = f"{record.record_id}: {_why_no_loss(turns, max_len)}"
            report.drop(reason)
            dropped.append((reason, turns))
            continue
        report.truncated += example.truncated
        examples.append(example)
    if not examples and dropped:
        raise DataError(_nothing_to_learn(*dropped[0], len(dropped), tokenizer))
    if own_report:
        report.log()
    return examples


def record_turns(
    record: Record, tokenizer: ChatTokenizer, train_on: TrainOn, literal: bool = False
) -> list[Turn]:
    """Tokenizes one record into turns, whatever their length.

    Raises:
        BadField: if the chat template refuses the record, or the mask would not be exact.
    """
    if record.messages and tokenizer.chat_template and not (literal and record.text):
        if train_on == "all":
            text = _render(record.messages, tokenizer)
            return [_whole(tokenizer.encode(text), tokenizer, add_end=False)]
        text, spans = render_spans(record.messages, tokenizer)
        return _turns(encode_pieces(text, spans, tokenizer), tokenizer)
    if not record.text:
        need = "a model with one (an instruct model), or records with literal text"
        raise BadField("messages", "a conversation, but the model has no chat template", need)
    pieces = _literal_pieces(record, tokenizer)
    pieces[0] = _with_bos(pieces[0], tokenizer)
    if train_on == "all" or not record.spans:
        return [_whole(list(itertools.chain(*pieces)), tokenizer, add_end=True)]
    if record.spans[-1][1] == len(record.text):
        pieces[-2] = pieces[-2] + _end(tokenizer)
    return _turns(pieces, tokenizer)


def _literal_pieces(record: Record, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Encodes a literal text between the borders of its spans, or else each part by itself."""
    try:
        return encode_pieces(record.text, record.spans, tokenizer)
    except BadField:
        # A tokenizer that sets a space before every text, and a prompt that ends with one: the
        # authors of the sets encode prompt and answer apart too.
        return [tokenizer.encode(part) for part in _parts(record.text, record.spans)]


def _turns(pieces: Sequence[list[int]], tokenizer: ChatTokenizer) -> list[Turn]:
    """Makes turns of context, answer, context, answer, ..., rest."""
    turns, tail = [], []
    for context, target in zip(pieces[::2], pieces[1::2], strict=False):
        end = _end_position(target, tokenizer)
        closed = end is not None
        length = end + 1 if closed else len(target)
        turns.append(Turn(tail + context, target[:length], closed))
        tail = target[length:]
    return turns


def _whole(ids: list[int], tokenizer: ChatTokenizer, add_end: bool) -> Turn:
    """A turn with loss on everything."""
    ids = ids + _end(tokenizer) if add_end else ids
    end = _end_position(ids, tokenizer)
    return Turn([], ids if end is None else ids[: end + 1], end is not None)


def _with_bos(ids: list[int], tokenizer: ChatTokenizer) -> list[int]:
    """Puts the begin token before plain text, for the models that want one."""
    if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *ids]
    return ids


def _end(tokenizer: ChatTokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _end_position(ids: Sequence[int], tokenizer: ChatTokenizer) -> int | None:
    """Finds the end token that closes `ids`; only white space may follow it."""
    for position in range(len(ids) - 1, -1, -1):
        token = ids[position]
        if token in tokenizer.eos_token_ids:
            return position
        if tokenizer.decode([token], skip_special_tokens=False).strip():
            return None
    return None


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
    text = _render(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
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


def _find_span(text: str, messages: Messages, tokenizer: ChatTokenizer) -> tuple[int, int] | None:
    """Finds the last of `messages`, an answer, in the text of the whole conversation."""
    *earlier, last = messages
    before = _render(earlier, tokenizer, add_generation_prompt=True)
    after = _render(messages, tokenizer)
    if not text.startswith(before):
        return None
    if after.startswith(before) and text.startswith(after):
        return len(before), len(after)
    # The template shortens earlier answers: what follows `before` must be the answer and the end of
    # a turn, which shows behind an answer that occurs nowhere else.
    marker = "answer"
    while marker in after:
        marker += "#"
    marked = _render([*earlier, {**last, "content": marker}], tokenizer)
    end_of_turn = marked.partition(marker)[2]
    for answer in (last["content"], last["content"].strip()):
        if end_of_turn and text.startswith(answer + end_of_turn, len(before)):
            return len(before), len(before) + len(answer) + len(end_of_turn)
    return None


def _render(
    messages: Messages, tokenizer: ChatTokenizer, add_generation_prompt: bool = False
) -> str:
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
    pieces = [tokenizer.encode(part) if part else [] for part in _parts(text, spans)]
    if list(itertools.chain(*pieces)) == tokenizer.encode(text):
        return pieces
    # A tokenizer that sets a space before every text it is given, or a border inside a token.
    pieces, ids, end = [], [], 0
    for part in _parts(text, spans):
        end += len(part)
        prefix = tokenizer.encode(text[:end])
        piece = prefix[len(ids) :]
        if prefix[: len(ids)] != ids:
            piece = tokenizer.encode(part) if part else []
            _check_same_text(ids + piece, prefix, tokenizer)
        pieces.append(piece)
        ids = ids + piece
    return pieces


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Cuts a text at the borders of its spans: an odd number of parts, some maybe empty."""
    borders = [0, *itertools.chain(*spans), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def _check_same_text(ids: list[int], whole: list[int], tokenizer: ChatTokenizer) -> None:
    pieced, text = (tokenizer.decode(x, skip_special_tokens=False) for x in (ids, whole))
    if pieced != text:
        found = f"a border between prompt and answer inside a token, near {text[-40:]!r}"
        raise BadField("messages", found, "a chat template whose prompt does not end with a space")


def assemble(turns: Sequence[Turn], max_len: int, record_id: str) -> Example:
    """Joins turns to an example of at most `max_len` tokens.

    >>> turn = Turn([1, 2], [5, 6, 7, 9], closed=True)
    >>> example = assemble([turn, turn], 8, "a.jsonl:1")
    >>> example.tokens.tolist(), example.loss_mask.tolist()
    ([1, 2, 5, 6, 7, 9], [0, 0, 1, 1, 1, 1])
    >>> assemble([turn, turn], 5, "a.jsonl:1").tokens.tolist()
    [1, 2, 5, 6, 9]
    """
    tokens: list[int] = []
    mask: list[int] = []
    truncated = False
    for turn in turns:
        room = max_len - len(tokens) - len(turn.context)
        target = turn.target
        if len(target) > room:
            truncated = True
            # An answer needs at least one token before its end token: an end alone teaches silence.
            if room < (2 if turn.closed else 1):
                break
            target = [*target[: room - 1], target[-1]] if turn.closed else target[:room]
        tokens += turn.context + target
        mask += [0] * len(turn.context) + [1] * len(target)
        if truncated:
            break
    if mask:
        mask[0] = 0
    return Example(np.array(tokens, np.int32), np.array(mask, np.int32), record_id, truncated)


def _why_no_loss(turns: Sequence[Turn], max_len: int) -> str:
    context = len(turns[0].context)
    if context:
        return f"tokens: found a prompt of {context}, need room for an answer in max_len={max_len}"
    return "tokens: found a single token, need at least two to predict one from the other"


def _nothing_to_learn(
    reason: str, turns: Sequence[Turn], count: int, tokenizer: ChatTokenizer
) -> str:
    ids = [*turns[0].context, *turns[0].target]
    sample = tokenizer.decode(ids[:200], skip_special_tokens=False)
    return "\n".join(
        [
            f"no token of any of the {count} records carries loss; the first of them:",
            f"  {reason}",
            *(f"  | {line}" for line in sample.splitlines()[:12]),
            "raise max_len (data.max_len) or shorten the prompts",
        ]
    )
