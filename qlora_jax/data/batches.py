"""Batches in an order that is a function of (seed, epoch, position), so that a resumed run is
exact.

An epoch is a list of rows: the examples in an order drawn from (seed, epoch), packed into rows, and
the rows shuffled again. The endless stream of training batches is the rows of epoch 0, 1, 2, ...
one after the other, cut every `grad_accum * batch_size` rows. A batch may therefore reach into the
next epoch, and a data set smaller than one batch repeats inside it: no row is dropped and none is
padded in, and every epoch shows each example exactly once.

With `group_by_length` (and one example a row) the order of an epoch is that of the paper's code, by
tokens: the shuffled examples are cut into chunks of up to 50 batches, and each chunk is sorted,
longest first. Neighbours then have similar lengths wherever a batch begins, and a batch is cut to
the shortest of a few lengths that holds its longest example (`row_lengths`).

The order comes from raw Philox output, which NumPy keeps stable across versions, unlike
`permutation`.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.masking import Example
from qlora_jax.data.packing import best_fit_decreasing, fill_rows
from qlora_jax.errors import DataError

_ORDER, _ROWS, _SPLIT = range(3)  # independent streams of one (seed, epoch)
_CHUNK_BATCHES = 50
_SHORTEST_ROW = 32


@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimizer step's data.

    Attributes:
        arrays: `tokens`, `loss_mask`, `segment_ids`, `positions`, each int32 [A, B, T]:
            microbatches, rows, tokens. T is `seq_len`, or one of `row_lengths` when grouping.
        record_ids: for each microbatch the ids of its records, in the order of its rows.
    """

    arrays: dict[str, Int32[np.ndarray, "A B T"]]
    record_ids: list[list[str]]


def permutation(count: int, seed: int, epoch: int, stream: int = _ORDER) -> list[int]:
    """A random order of `range(count)` that depends on nothing but the arguments.

    >>> permutation(5, seed=0, epoch=0) == permutation(5, seed=0, epoch=0)
    True
    >>> sorted(permutation(5, seed=0, epoch=1))
    [0, 1, 2, 3, 4]
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    random = np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)
    return np.argsort(random, kind="stable").tolist()


def row_lengths(seq_len: int) -> list[int]:
    """The lengths of rows that a run compiles: T, T/2, T/4 and T/8, as long as that is worth it.

    >>> row_lengths(512), row_lengths(100)
    ([64, 128, 256, 512], [50, 100])
    """
    lengths = [-(-seq_len // part) for part in (8, 4, 2, 1)]
    return [length for length in lengths if length >= min(_SHORTEST_ROW, seq_len)]


def group_by_length(order: Sequence[int], lengths: Sequence[int], rows: int) -> list[int]:
    """Sorts chunks of a random order, longest first.

    A chunk is 50 batches, or a quarter of the data where that is less, so that there is something
    left to shuffle.

    Args:
        order: a permutation of the examples.
        lengths: tokens of each example.
        rows: examples of one batch.

    >>> group_by_length([3, 0, 2, 1, 4, 5, 7, 6], lengths=[1, 2, 3, 4, 5, 6, 7, 8], rows=1)
    [3, 0, 2, 1, 5, 4, 7, 6]
    """
    chunk = rows * max(1, min(_CHUNK_BATCHES, len(order) // (4 * rows)))
    return [
        index
        for start in range(0, len(order), chunk)
        for index in sorted(order[start : start + chunk], key=lambda i: -lengths[i])
    ]


def split[Item](
    items: Sequence[Item], eval_fraction: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Divides records or examples into training and held-out ones.

    Args:
        items: what to divide.
        eval_fraction: share to hold out, 0 <= share < 1; above 0 at least one item is held out.
        seed: which ones.

    Returns:
        (train, heldout), both in the order of `items`.

    Raises:
        DataError: if the share is out of range or leaves nothing to train on.

    >>> train, heldout = split(list("abcdefghij"), eval_fraction=0.2, seed=0)
    >>> len(train), len(heldout), sorted(train + heldout) == list("abcdefghij")
    (8, 2, True)
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"eval_fraction={eval_fraction}: need a share from 0 to below 1")
    count = max(1, round(eval_fraction * len(items))) if eval_fraction else 0
    if count >= len(items):
        raise DataError(
            f"{eval_fraction=} of {len(items)} records leaves none to train on; need more records, "
            "or eval_fraction=0"
        )
    held = set(permutation(len(items), seed, 0, _SPLIT)[:count])
    train = [item for i, item in enumerate(items) if i not in held]
    return train, [items[i] for i in sorted(held)]


class BatchIterator:
    """Endless batches of shuffled rows; its whole state is a few integers.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        batch_size: rows of a microbatch, B.
        seq_len: tokens of a row, T.
        grad_accum: microbatches of a batch, A.
        packing: share rows between examples; otherwise one example a row.
        group_by_length: see the module; not with packing.
        seed: decides the order.

    Raises:
        DataError: if there are no examples, one is too long, or none has a token with loss.

    >>> examples = [Example(np.arange(1, 4), np.array([0, 1, 1]), f"a.jsonl:{i}") for i in range(4)]
    >>> batches = BatchIterator(examples, batch_size=1, seq_len=6, grad_accum=2, seed=0)
    >>> batches.rows_per_epoch, next(batches).arrays["tokens"].shape
    (2, (2, 1, 6))
    >>> state = batches.state()
    >>> first = next(batches).record_ids
    >>> batches.restore(state)
    >>> next(batches).record_ids == first
    True
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_len: int,
        grad_accum: int = 1,
        packing: bool = True,
        group_by_length: bool = False,
        seed: int = 0,
    ):
        for name, value in (("batch_size", batch_size), ("grad_accum", grad_accum)):
            if value < 1:
                raise DataError(f"{name}={value}: need at least 1")
        if packing and group_by_length:
            raise DataError("group_by_length=True needs packing=False: packed rows are all full")
        _check_examples(examples, seq_len)
        self._examples = list(examples)
        self._shape = (grad_accum, batch_size, seq_len)
        self._packing = packing
        # Where groups begin depends on the rows of a batch, so these belong to the state then.
        self._grouped = grad_accum * batch_size if group_by_length else 0
        self._seed = seed
        self._data = _checksum(examples, seq_len, packing, self._grouped)
        self._epoch, self._position = 0, 0
        self._rows = self._epoch_rows(0)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold each example once; the same in every epoch."""
        return len(self._rows)

    def num_batches(self, epochs: float) -> int:
        """Batches that cover this many epochs; the last may reach into the next one."""
        grad_accum, batch_size, _ = self._shape
        return math.ceil(round(epochs * self.rows_per_epoch / (grad_accum * batch_size), 6))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        grad_accum, batch_size, seq_len = self._shape
        rows = [self._next_row() for _ in range(grad_accum * batch_size)]
        if self._grouped:
            longest = max(len(row[0].tokens) for row in rows)
            seq_len = next(length for length in row_lengths(seq_len) if length >= longest)
        return make_batch(rows, grad_accum, batch_size, seq_len)

    def _next_row(self) -> list[Example]:
        if self._position == len(self._rows):
            self._epoch, self._position = self._epoch + 1, 0
            self._rows = self._epoch_rows(self._epoch)
        row = self._rows[self._position]
        self._position += 1
        return [self._examples[i] for i in row]

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        order = permutation(len(self._examples), self._seed, epoch)
        if self._grouped:
            lengths = [len(example.tokens) for example in self._examples]
            order = group_by_length(order, lengths, self._grouped)
        if not self._packing:
            return [[i] for i in order]
        lengths = [len(self._examples[i].tokens) for i in order]
        rows = [[order[i] for i in row] for row in best_fit_decreasing(lengths, self._shape[2])]
        return [rows[i] for i in permutation(len(rows), self._seed, epoch, _ROWS)]

    def state(self) -> dict[str, int]:
        """Where the stream stands: seed, epoch, next row in it, and a checksum of the data."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "data": self._data,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken, to the row.

        Raises:
            DataError: if the data, the row length, packing or the seed are not what they were.
        """
        if int(state["data"]) != self._data:
            raise DataError(
                "the data is not what the run was started with (another file, tokenizer, max_len, "
                "split, packing or grouping); restore what it was, or start in a new work directory"
            )
        if int(state["seed"]) != self._seed:
            raise DataError(
                f"the run was started with seed {int(state['seed'])}, and now has {self._seed}; "
                "use the same seed, or start in a new work directory"
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.rows_per_epoch:
            raise DataError(f"{epoch=}, {position=}: need a position up to {self.rows_per_epoch}")
        self._epoch, self._position = epoch, position
        self._rows = self._epoch_rows(epoch)


def eval_batches(
    examples: Sequence[Example], *, batch_size: int, seq_len: int, packing: bool = True
) -> Iterator[Batch]:
    """Yields every example exactly once, in a fixed order; the last batch is filled with empty
    rows.

    Empty rows have segment id 0 and no loss everywhere, so they count nothing.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        packing: share rows between examples.

    Yields:
        Batches with arrays [1, B, T].

    >>> examples = [Example(np.arange(1, 4), np.array([0, 1, 1]), f"a.jsonl:{i}") for i in range(3)]
    >>> batches = list(eval_batches(examples, batch_size=2, seq_len=4))
    >>> [batch.record_ids for batch in batches]
    [[['a.jsonl:0', 'a.jsonl:1']], [['a.jsonl:2']]]
    """
    _check_examples(examples, seq_len)
    lengths = [len(example.tokens) for example in examples]
    rows = best_fit_decreasing(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]
    for start in range(0, len(rows), batch_size):
        chosen = [[examples[i] for i in row] for row in rows[start : start + batch_size]]
        chosen += [[] for _ in range(batch_size - len(chosen))]
        yield make_batch(chosen, 1, batch_size, seq_len)


def make_batch(
    rows: Sequence[Sequence[Example]], grad_accum: int, batch_size: int, seq_len: int
) -> Batch:
    """Builds a batch of `grad_accum * batch_size` rows.

    >>> example = Example(np.array([5, 6]), np.array([0, 1]), "a.jsonl:1")
    >>> make_batch([[example], []], 1, 2, 4).arrays["segment_ids"].tolist()
    [[[1, 1, 0, 0], [0, 0, 0, 0]]]
    """
    arrays = {
        name: array.reshape(grad_accum, batch_size, seq_len)
        for name, array in fill_rows(rows, seq_len).items()
    }
    record_ids = [
        [
            example.record_id
            for row in rows[a * batch_size : (a + 1) * batch_size]
            for example in row
        ]
        for a in range(grad_accum)
    ]
    return Batch(arrays, record_ids)


def _check_examples(examples: Sequence[Example], seq_len: int) -> None:
    if not examples:
        raise DataError("there are no examples, need at least one")
    for example in examples:
        if not 0 < len(example.tokens) <= seq_len:
            raise DataError(
                f"{example.record_id}: found {len(example.tokens)} tokens, need 1 to {seq_len=}; "
                "tokenize with max_len no larger than seq_len"
            )
    if not any(example.loss_mask[1:].any() for example in examples):
        first = examples[0]
        raise DataError(
            f"no token of any of the {len(examples)} examples carries loss; the first is "
            f"{first.record_id} with tokens {first.tokens[:20].tolist()} and "
            f"loss_mask {first.loss_mask[:20].tolist()}"
        )


def _checksum(examples: Sequence[Example], seq_len: int, packing: bool, grouped: int) -> int:
    """CRC-32 of everything that decides the rows."""
    by_length = f" by length in {grouped}" if grouped else ""
    value = zlib.crc32(f"{seq_len} {packing} {len(examples)}{by_length}".encode())
    for example in examples:
        for array in (example.tokens, example.loss_mask):
            value = zlib.crc32(np.asarray(array, "<i4").tobytes(), value)
        value = zlib.crc32(f" {len(example.tokens)}".encode(), value)
    return value
