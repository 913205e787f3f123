"""Sources and targets: what an encoder-decoder is trained on.

A decoder sees prompt and answer as one sequence; an encoder-decoder has two, each of which ends
with the end token. The prompt goes to the encoder, and the loss is on all of the answer.

An `Example` holds both, the source first: `loss_mask` is 0 on it and 1 on the target. So order,
splits, grouping by length and the position in the data work as they do for decoders; only the batch
(`make_pair_batch`) has two rows for each record.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from qlora_jax.data.batches import Batch
from qlora_jax.data.formats import BadField, Record
from qlora_jax.data.masking import Example
from qlora_jax.data.packing import ARRAY_NAMES
from qlora_jax.data.report import DataReport
from qlora_jax.data.spans import ChatTokenizer, render_spans
from qlora_jax.errors import DataError

SOURCE_NAMES = ("source_tokens", "source_segment_ids")


def encode_source(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The ids of a prompt as an encoder reads it: without space around it, the end token last.

    Args:
        tokenizer: the model's.
        text: the prompt.

    Raises:
        DataError: the tokenizer names no end token.

    >>> import tokenizers
    >>> from qlora_jax.data.tokenizer import Tokenizer
    >>> words = tokenizers.models.WordLevel({"2+2=": 0, "</s>": 1}, unk_token="</s>")
    >>> encode_source(Tokenizer(tokenizers.Tokenizer(words), eos_token_ids=[1]), "2+2= ")
    [0, 1]
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            'the tokenizer names no end token, and an encoder-decoder needs one; add "eos_token" '
            "to its tokenizer_config.json."
        )
    return [*tokenizer.encode(text.strip()), tokenizer.eos_token_id]


def pair_texts(record: Record, tokenizer: ChatTokenizer, literal: bool = False) -> tuple[str, str]:
    """What stands before the last answer of a record, and that answer.

    Args:
        record: a conversation, or a text with its answers marked.
        tokenizer: its chat template writes conversations.
        literal: prefer a record's literal text to the chat template.

    Raises:
        BadField: the record has no answer, or its template cannot tell it apart.

    >>> from qlora_jax.data.formats import pair
    >>> record = Record("a.jsonl:1", "prompt_completion", **pair("2+2=", " 4"))
    >>> pair_texts(record, tokenizer=None, literal=True)
    ('2+2=', ' 4')
    """
    text, spans = record.text, record.spans
    if record.messages and not (literal and text) and tokenizer.chat_template:
        text, spans = render_spans(record.messages, tokenizer)
    if not spans:
        need = "a prompt and an answer, because the model is an encoder-decoder"
        raise BadField("text", "a text without an answer", need)
    start, end = spans[-1]
    return text[:start], text[start:end]


def tokenize_pairs(
    records: Iterable[Record],
    tokenizer: ChatTokenizer,
    report: DataReport,
    *,
    source_max_len: int,
    target_max_len: int,
    literal: bool = False,
    on_bad_record: Literal["error", "skip"] = "error",
) -> Iterator[tuple[Record, Example]]:
    """Tokenizes records as sources and targets, one by one.

    What is too long is cut at its end, and its end token kept. Of several answers the last one is
    the target; the others are part of its source.

    Args:
        records: what `load_records` gives.
        tokenizer: the model's.
        report: takes the counts.
        source_max_len: most tokens of a source, its end token included; at least 2.
        target_max_len: likewise of a target.
        literal: prefer a record's literal text to the chat template.
        on_bad_record: what to do with a record that has no answer: "error" or "skip".

    Yields:
        Every record and its example: source and target in one, told apart by the mask. There are no
        tokens where the record is skipped.

    Raises:
        DataError: a record cannot be used.

    >>> import tokenizers
    >>> from qlora_jax.data.formats import pair
    >>> from qlora_jax.data.tokenizer import Tokenizer
    >>> words = tokenizers.models.WordLevel({"2+2=": 0, "4": 1, "</s>": 2}, unk_token="</s>")
    >>> tokenizer = Tokenizer(tokenizers.Tokenizer(words), eos_token_ids=[2])
    >>> record = Record("a.jsonl:1", "prompt_completion", **pair("2+2=", "4"))
    >>> options = dict(source_max_len=4, target_max_len=4)
    >>> ((_, example),) = tokenize_pairs([record], tokenizer, DataReport(), **options)
    >>> example.tokens.tolist(), example.loss_mask.tolist()
    ([0, 2, 1, 2], [0, 0, 1, 1])
    """
    if min(source_max_len, target_max_len) < 2:
        raise DataError(
            f"{source_max_len=}, {target_max_len=}: need room for a token and an end token in each"
        )
    for record in records:
        try:
            source, target = pair_texts(record, tokenizer, literal)
            ends = (tokenizer.eos_token_id,)
            ids = [
                encode_source(tokenizer, source),
                [*_without_end(tokenizer.encode(target.strip()), tokenizer), *ends],
            ]
            if len(ids[1]) < 2:
                raise BadField("text", "an answer without tokens", "something to learn")
        except BadField as problem:
            if on_bad_record == "error":
                raise DataError(f"{record.record_id}: {problem}") from None
            report.skip(f"{record.record_id}: {problem}")
            yield record, Example(np.zeros(0, np.int32), np.zeros(0, np.int32), record.record_id)
            continue
        limits = source_max_len, target_max_len
        cut = [x if len(x) <= n else [*x[: n - 1], *ends] for x, n in zip(ids, limits, strict=True)]
        mask = np.repeat([0, 1], [len(x) for x in cut]).astype(np.int32)
        tokens = np.array(list(itertools.chain(*cut)), np.int32)
        report.truncated += cut != ids
        yield record, Example(tokens, mask, record.record_id, cut != ids)


def _without_end(ids: list[int], tokenizer: ChatTokenizer) -> list[int]:
    """Ids without the end tokens that a template wrote behind them."""
    ends = 0
    while ends < len(ids) and ids[-1 - ends] in tokenizer.eos_token_ids:
        ends += 1
    return ids[: len(ids) - ends]


def make_pair_batch(
    rows: Sequence[Sequence[Example]],
    grad_accum: int,
    batch_size: int,
    seq_len: int,
    *,
    source_len: int,
    target_len: int,
) -> Batch:
    """Builds a batch of `grad_accum * batch_size` rows of sources, and as many of targets.

    Args:
        rows: an example each, or none.
        grad_accum: microbatches, A.
        batch_size: rows of a microbatch, B.
        seq_len: most tokens that source and target of an example have together.
        source_len: width of the sources where `seq_len` is no less, S.
        target_len: likewise of the targets, T.

    Returns:
        `tokens`, `loss_mask`, `segment_ids` and `positions` of the targets, int32 [A, B, T], and
        `source_tokens` and `source_segment_ids`, int32 [A, B, S].

    >>> example = Example(np.array([5, 6, 1, 7, 1]), np.array([0, 0, 0, 1, 1]), "a.jsonl:1")
    >>> batch = make_pair_batch([[example]], 1, 1, 8, source_len=4, target_len=3)
    >>> {name: array[0, 0].tolist() for name, array in batch.arrays.items()}
    {'source_tokens': [5, 6, 1, 0], 'source_segment_ids': [1, 1, 1, 0], 'tokens': [7, 1, 0],
    'loss_mask': [1, 1, 0], 'segment_ids': [1, 1, 0], 'positions': [0, 1, 0]}
    """
    widths = dict.fromkeys(SOURCE_NAMES, min(seq_len, source_len))
    widths |= dict.fromkeys(ARRAY_NAMES, min(seq_len, target_len))
    arrays = {name: np.zeros((len(rows), width), np.int32) for name, width in widths.items()}
    for r, row in enumerate(rows):
        for example in row:
            targets = int(example.loss_mask.sum())
            sources = len(example.tokens) - targets
            arrays["source_tokens"][r, :sources] = example.tokens[:sources]
            arrays["source_segment_ids"][r, :sources] = 1
            arrays["tokens"][r, :targets] = example.tokens[sources:]
            arrays["positions"][r, :targets] = np.arange(targets)
            for name in ("loss_mask", "segment_ids"):
                arrays[name][r, :targets] = 1
    shaped = {k: array.reshape(grad_accum, batch_size, -1) for k, array in arrays.items()}
    chunks = itertools.batched(rows, batch_size)
    return Batch(shaped, [[example.record_id for row in c for example in row] for c in chunks])
