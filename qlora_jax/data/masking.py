"""Which tokens carry loss: from a `Record` to token ids with a mask.

A record is made of *turns*: a context without loss, and then a target, what the assistant writes.
`qlora_jax.data.spans` finds the border between the two in any chat template; in a literal text the
record itself says where it is.

Loss ends with the answer's end token (`<|im_end|>`, `</s>`): what a template writes after it,
usually a line break, is never generated. `loss_mask[t] = 1` says that token t is a target,
predicted from the tokens before it; the first token of an example therefore never carries loss.

What is too long is cut so that the end token survives: a model that never sees the end of an answer
does not learn to stop. The paper's code loses it; `paper_exact` does the same.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from qlora_jax.data.formats import BadField, Record
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import SETS
from qlora_jax.data.spans import ChatTokenizer, encode_pieces, render, render_spans, text_parts
from qlora_jax.errors import DataError

TrainOn = Literal["assistant", "all"]


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
    source_max_len: int = 0,
    target_max_len: int = 0,
    paper_exact: bool = False,
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
        source_max_len: most tokens of what stands before the first answer; a longer prompt loses
            its beginning, because its end says that an answer is due. 0 sets no limit.
        target_max_len: most tokens from the first answer on, its end token included. 0: no limit.
        paper_exact: the tokens of the paper's code, see `paper_turn`.

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
    records, own_report = list(records), report is None
    report = report or DataReport(records=len(records))
    options = (max_len, train_on, on_bad_record, literal, source_max_len, target_max_len)
    tokenized = tokenize_each(records, tokenizer, report, *options, paper_exact)
    examples = [example for _, example in tokenized if len(example.tokens)]
    if own_report:
        report.log()
    return examples


def tokenize_each(
    records: Iterable[Record],
    tokenizer: ChatTokenizer,
    report: DataReport,
    max_len: int,
    train_on: TrainOn = "assistant",
    on_bad_record: Literal["error", "skip"] = "error",
    literal: bool = False,
    source_max_len: int = 0,
    target_max_len: int = 0,
    paper_exact: bool = False,
) -> Iterator[tuple[Record, Example]]:
    """As `tokenize_records`, one by one.

    Yields:
        Every record and its example, which has no tokens where the record is skipped or dropped.
    """
    if max_len < 3:
        raise DataError(
            f"max_len={max_len}: need room for at least a prompt, an answer and its end token"
        )
    if train_on not in ("assistant", "all"):
        raise DataError(f"train_on={train_on!r} is not one of assistant, all")
    any_loss, nothing_to_learn, dropped = False, "", 0
    for record in records:
        nothing = Example(np.zeros(0, np.int32), np.zeros(0, np.int32), record.record_id)
        try:
            if paper_exact:
                turns = [paper_turn(record, tokenizer)]
            else:
                turns = record_turns(record, tokenizer, train_on, literal)
        except BadField as problem:
            if on_bad_record == "error":
                raise DataError(f"{record.record_id}: {problem}") from None
            report.skip(f"{record.record_id}: {problem}")
            yield record, nothing
            continue
        if paper_exact:
            example = paper_example(turns[0], source_max_len, target_max_len, record.record_id)
            example.loss_mask[1:] |= train_on == "all"
        else:
            example = assemble(turns, max_len, record.record_id, source_max_len, target_max_len)
        if not example.loss_mask.any():
            reason = f"{record.record_id}: {_why_no_loss(turns, max_len)}"
            report.drop(reason)
            dropped += 1
            nothing_to_learn = nothing_to_learn or _nothing_to_learn(reason, turns, tokenizer)
            yield record, nothing
            continue
        any_loss = True
        report.truncated += example.truncated
        yield record, example
    if dropped and not any_loss:
        raise DataError(
            f"no token of any of the {dropped} records carries loss; {nothing_to_learn}"
        )


def record_turns(
    record: Record, tokenizer: ChatTokenizer, train_on: TrainOn, literal: bool = False
) -> list[Turn]:
    """Tokenizes one record into turns, whatever their length.

    Raises:
        BadField: if the chat template refuses the record, or the mask would not be exact.
    """
    if record.messages and tokenizer.chat_template and not (literal and record.text):
        if train_on == "all":
            text = render(record.messages, tokenizer)
            return [_whole(tokenizer.encode(text), tokenizer, add_end=False)]
        text, spans = render_spans(record.messages, tokenizer)
        return _turns(encode_pieces(text, spans, tokenizer), tokenizer)
    if not record.text:
        need = "a model with one (an instruct model), or records with literal text"
        raise BadField("messages", "a conversation, but the model has no chat template", need)
    if train_on == "all" and _is_all_target(record):
        ids = _with_bos(tokenizer.encode(record.text), tokenizer)
        return [_whole(ids, tokenizer, add_end=True)]
    pieces = _literal_pieces(record, tokenizer)
    pieces[0] = _with_bos(pieces[0], tokenizer)
    if train_on == "all" or not record.spans:
        return [_whole(list(itertools.chain(*pieces)), tokenizer, add_end=True)]
    if record.spans[-1][1] == len(record.text):
        pieces[-2] = pieces[-2] + _end(tokenizer)
    return _turns(pieces, tokenizer)


def paper_turn(record: Record, tokenizer: ChatTokenizer) -> Turn:
    """Source and target as the paper's code encodes them (artidoro/qlora, `qlora.py`).

    BOS and the source are one sequence, the target and the end token another, each encoded by
    itself. A dialogue of which everything is learned is all target.

    Args:
        record: with literal text.
        tokenizer: encodes; where it has no BOS, nothing is put before the source.

    Raises:
        BadField: if the record has no literal text.
    """
    if not record.text:
        raise BadField("text", "a conversation without literal text", "a set of the paper")
    start = 0 if _is_all_target(record) else record.spans[0][0]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    source = begin + (tokenizer.encode(record.text[:start]) if start else [])
    return Turn(source, tokenizer.encode(record.text[start:]) + _end(tokenizer), closed=True)


def _is_all_target(record: Record) -> bool:
    """Whether the authors of the record's set learn all of it, so that it has no border."""
    return not record.spans or (record.format in SETS and SETS[record.format].train_on == "all")


def paper_example(turn: Turn, source_max_len: int, target_max_len: int, record_id: str) -> Example:
    """Cuts source and target at their ends, as the paper's code does.

    A long answer loses its end token, and a long prompt what it asks for.

    >>> turn = Turn([1, 5, 6], [7, 8, 2], closed=True)
    >>> paper_example(turn, 2, 2, "a.jsonl:1").tokens.tolist()
    [1, 5, 7, 8]
    """
    source, target = turn.context[:source_max_len], turn.target[:target_max_len]
    cut = len(source) < len(turn.context) or len(target) < len(turn.target)
    mask = [0] * len(source) + [1] * len(target)
    tokens = np.array([*source, *target], np.int32)
    mask[0] = 0
    return Example(tokens, np.array(mask, np.int32), record_id, cut)


def _literal_pieces(record: Record, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Encodes a literal text between the borders of its spans, or else each part by itself."""
    try:
        return encode_pieces(record.text, record.spans, tokenizer)
    except BadField:
        # A tokenizer that sets a space before every text, and a prompt that ends with one: the
        # authors of the sets encode prompt and answer apart too.
        return [tokenizer.encode(part) for part in text_parts(record.text, record.spans)]


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


def assemble(
    turns: Sequence[Turn],
    max_len: int,
    record_id: str,
    source_max_len: int = 0,
    target_max_len: int = 0,
) -> Example:
    """Joins turns to an example of at most `max_len` tokens.

    Args:
        turns: of one record.
        max_len: most tokens.
        record_id: of the record.
        source_max_len: most tokens of the first context; its first one (BOS) and its end stay.
        target_max_len: most tokens of all that follows it.

    >>> turn = Turn([1, 2], [5, 6, 7, 9], closed=True)
    >>> example = assemble([turn, turn], 8, "a.jsonl:1")
    >>> example.tokens.tolist(), example.loss_mask.tolist()
    ([1, 2, 5, 6, 7, 9], [0, 0, 1, 1, 1, 1])
    >>> assemble([turn, turn], 5, "a.jsonl:1").tokens.tolist()
    [1, 2, 5, 6, 9]
    """
    first = turns[0].context
    if cut := 0 < source_max_len < len(first):
        first = [first[0], *first[len(first) - source_max_len + 1 :]]
    if target_max_len:
        max_len = min(max_len, len(first) + target_max_len)
    tokens: list[int] = []
    mask: list[int] = []
    truncated = False
    for context, turn in zip([first, *(t.context for t in turns[1:])], turns, strict=True):
        room = max_len - len(tokens) - len(context)
        target = turn.target
        if len(target) > room:
            truncated = True
            # An answer needs at least one token before its end token: an end alone teaches silence.
            if room < (2 if turn.closed else 1):
                break
            target = [*target[: room - 1], target[-1]] if turn.closed else target[:room]
        tokens += context + target
        mask += [0] * len(context) + [1] * len(target)
        if truncated:
            break
    if mask:
        mask[0] = 0
    return Example(
        np.array(tokens, np.int32), np.array(mask, np.int32), record_id, truncated or cut
    )


def _why_no_loss(turns: Sequence[Turn], max_len: int) -> str:
    context = len(turns[0].context)
    if context:
        return f"tokens: found a prompt of {context}, need room for an answer in max_len={max_len}"
    return "tokens: found a single token, need at least two to predict one from the other"


def _nothing_to_learn(reason: str, turns: Sequence[Turn], tokenizer: ChatTokenizer) -> str:
    ids = [*turns[0].context, *turns[0].target]
    sample = tokenizer.decode(ids[:200], skip_special_tokens=False)
    return "\n".join(
        [
            "the first of them:",
            f"  {reason}",
            *(f"  | {line}" for line in sample.splitlines()[:12]),
            "raise max_len (data.max_len) or shorten the prompts",
        ]
    )
