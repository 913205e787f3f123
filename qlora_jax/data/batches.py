"""Batches that grain makes, in an order that is a function of (seed, epoch, position).

A batch is the next `grad_accum * batch_size` rows of an endless stream (`row_order`); it may
therefore reach into the next epoch, and a data set smaller than one batch repeats inside it: no row
is dropped and none is padded in, and every epoch shows each example exactly once.

Batch number n can be built without the ones before it. That makes it an element of a
`grain.MapDataset`: hosts take every n-th element of it, worker processes build elements ahead, and
neither changes which batch comes when. The state is not grain's, which depends on the workers, but
where the stream stands: three integers and a checksum, the same on every host.
"""

import dataclasses
import functools
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from qlora_jax.data.example_arrays import Examples
from qlora_jax.data.masking import Example
from qlora_jax.data.packing import best_fit_decreasing, fill_rows
from qlora_jax.data.row_order import RowOrder, row_lengths
from qlora_jax.errors import DataError


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


# (rows, grad_accum, batch_size, seq_len) -> batch, as `make_batch`.
BuildBatch = Callable[[Sequence[Sequence[Example]], int, int, int], Batch]


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


class BatchIterator:
    """Endless batches of shuffled rows; its whole state is a few integers.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        batch_size: rows of a microbatch, B.
        seq_len: tokens of a row, T.
        grad_accum: microbatches of a batch, A.
        packing: share rows between examples; otherwise one example a row.
        group_by_length: see `row_order`; not with packing.
        seed: decides the order.
        shard_index: which host this is.
        shard_count: hosts that train together: a step takes `shard_count` batches of the stream,
            one on each, all of the same T.
        workers: processes that build batches ahead; 0: they are built in this one when asked for,
            which is fast enough where rows only have to be copied (docs/data.md).
        build: makes a batch of its rows; a function that can be pickled.

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
        shard_index: int = 0,
        shard_count: int = 1,
        workers: int = 0,
        build: BuildBatch = make_batch,
    ):
        for name, value in (("batch_size", batch_size), ("grad_accum", grad_accum)):
            if value < 1:
                raise DataError(f"{name}={value}: need at least 1")
        if not 0 <= shard_index < shard_count or workers < 0:
            raise DataError(
                f"{shard_index=}, {shard_count=}, {workers=}: need an index from 0 to below the "
                "count, and no negative number"
            )
        if packing and group_by_length:
            raise DataError("group_by_length=True needs packing=False: packed rows are all full")
        self._examples = Examples.of(examples)
        _check_examples(self._examples, seq_len)
        self._shape = (grad_accum, batch_size, seq_len)
        self._packing, self._seed, self._build = packing, seed, build
        self._shard, self._workers = slice(shard_index, None, shard_count), workers
        self._step_rows = grad_accum * batch_size * shard_count
        # Where groups begin depends on the rows of a step, so these belong to the state then.
        self._grouped = self._step_rows if group_by_length else 0
        self._order = RowOrder(
            self._examples.lengths,
            seq_len=seq_len,
            packing=packing,
            grouped=self._grouped,
            seed=seed,
        )
        self._row = 0  # of the endless stream: the next step's first, of all hosts
        self._batches: grain.DatasetIterator | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold each example once; the same in every epoch."""
        return self._order.rows_per_epoch

    def num_batches(self, epochs: float) -> int:
        """Batches that cover this many epochs; the last may reach into the next one."""
        return math.ceil(round(epochs * self.rows_per_epoch / self._step_rows, 6))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._dataset())
        batch = next(self._batches)
        self._row += self._step_rows
        return batch

    def _dataset(self) -> grain.IterDataset[Batch]:
        """All batches of this host from the present row on."""
        grad_accum, batch_size, seq_len = self._shape
        plans = _BatchPlans(
            self._order, self._row, grad_accum * batch_size, self._step_rows, seq_len, self._grouped
        )
        build = functools.partial(_build, self._examples, self._build, grad_accum, batch_size)
        # No threads: the examples are in memory, or on pages that are read faster than used.
        batches = (
            grain.MapDataset.source(plans)[self._shard]
            .map(build)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # in a notebook; grain looks at flags of its own
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            )
        return batches

    def state(self) -> dict[str, int]:
        """Where the stream stands: seed, epoch, next row in it, and a checksum of the data."""
        epoch, position = divmod(self._row, self.rows_per_epoch)
        return {"seed": self._seed, "epoch": epoch, "position": position, "data": self._data}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken, to the row, whatever the hosts and workers were.

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
        self.close()
        self._row = epoch * self.rows_per_epoch + position

    def close(self) -> None:
        """Ends the worker processes; the next batch starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    @functools.cached_property
    def _data(self) -> int:
        return _checksum(self._examples, self._shape[2], self._packing, self._grouped)


class _BatchPlans:
    """What every batch from a row on consists of: its examples, and the length of its rows.

    A source for grain. A step of all hosts is a run of `step_rows` rows, and a batch of one host
    `batch_rows` of them.
    """

    def __init__(
        self,
        order: RowOrder,
        start: int,
        batch_rows: int,
        step_rows: int,
        seq_len: int,
        grouped: bool,
    ):
        self._order, self._start, self._seq_len = order, start, seq_len
        self._batch_rows, self._step_rows, self._grouped = batch_rows, step_rows, grouped

    def __len__(self) -> int:
        return sys.maxsize // self._step_rows  # row numbers stay machine integers

    def __getitem__(self, number: int) -> tuple[list[list[int]], int]:
        first = self._start + number * self._batch_rows
        rows = [self._order.row(first + i).tolist() for i in range(self._batch_rows)]
        if not self._grouped:
            return rows, self._seq_len
        step = first - (first - self._start) % self._step_rows
        chosen = [self._order.row(step + i)[0] for i in range(self._step_rows)]
        longest = self._order.lengths[chosen].max()
        return rows, next(n for n in row_lengths(self._seq_len) if n >= longest)


def _build(
    examples: Examples,
    build: BuildBatch,
    grad_accum: int,
    batch_size: int,
    plan: tuple[list[list[int]], int],
) -> Batch:
    rows, seq_len = plan
    return build([[examples[i] for i in row] for row in rows], grad_accum, batch_size, seq_len)


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seq_len: int,
    packing: bool = True,
    build: BuildBatch = make_batch,
) -> Iterator[Batch]:
    """Yields every example exactly once, in a fixed order; the last batch is filled with empty
    rows.

    Empty rows have segment id 0 and no loss everywhere, so they count nothing.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        packing: share rows between examples.
        build: makes a batch of its rows.

    Yields:
        Batches with arrays [1, B, T].

    >>> examples = [Example(np.arange(1, 4), np.array([0, 1, 1]), f"a.jsonl:{i}") for i in range(3)]
    >>> batches = list(eval_batches(examples, batch_size=2, seq_len=4))
    >>> [batch.record_ids for batch in batches]
    [[['a.jsonl:0', 'a.jsonl:1']], [['a.jsonl:2']]]
    """
    examples = Examples.of(examples)
    _check_examples(examples, seq_len)
    lengths = examples.lengths.tolist()
    rows = best_fit_decreasing(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]
    for chosen in itertools.batched(rows, batch_size):
        filled = [[examples[i] for i in row] for row in chosen]
        yield build([*filled, *[[]] * (batch_size - len(filled))], 1, batch_size, seq_len)


def _check_examples(examples: Examples, seq_len: int) -> None:
    if not len(examples):
        raise DataError("there are no examples, need at least one")
    bad = np.flatnonzero((examples.lengths < 1) | (examples.lengths > seq_len))
    if len(bad):
        raise DataError(
            f"{examples[bad[0]].record_id}: found {examples.lengths[bad[0]]} tokens, need 1 to "
            f"{seq_len=}; tokenize with max_len no larger than seq_len"
        )
    if not examples.loss_tokens.any():
        first = examples[0]
        raise DataError(
            f"no token of any of the {len(examples)} examples carries loss; the first is "
            f"{first.record_id} with tokens {first.tokens[:20].tolist()} and "
            f"loss_mask {first.loss_mask[:20].tolist()}"
        )


def _checksum(examples: Examples, seq_len: int, packing: bool, grouped: int) -> int:
    """CRC-32 of everything that decides the rows."""
    by_length = f" by length in {grouped}" if grouped else ""
    value = zlib.crc32(f"{seq_len} {packing} {len(examples)}{by_length}".encode())
    for tokens, loss_mask in examples.contents():
        value = zlib.crc32(tokens.astype("<i4").tobytes(), value)
        value = zlib.crc32(loss_mask.astype("<i4").tobytes(), value)
        value = zlib.crc32(b" %d" % len(tokens), value)
    return value
