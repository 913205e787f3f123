"""Which examples stand in which row: a function of (seed, epoch, position), and of nothing else.

An epoch is a list of rows: the examples in an order drawn from (seed, epoch), packed into rows, and
the rows shuffled again. The endless stream of training rows is the rows of epoch 0, 1, 2, ... one
after the other. Every epoch has the same number of rows, because which lengths share a row does not
depend on the order. Row number n therefore stands in epoch n // rows at position n % rows, and can
be looked up without walking there: that is what makes resuming, sharding and several workers exact.

With grouping by length (and one example a row) the order of an epoch is that of the paper's code,
by tokens: the shuffled examples are cut into chunks of up to 50 batches, and each chunk is sorted,
longest first. Neighbours then have similar lengths wherever a batch begins, and a batch is cut to
the shortest of a few lengths that holds its longest example (`row_lengths`).

The order comes from raw Philox output, which NumPy keeps stable across versions, unlike
`permutation`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from qlora_jax.data.packing import best_fit_decreasing
from qlora_jax.errors import DataError

_ORDER, _ROWS, _SPLIT = range(3)  # independent streams of one (seed, epoch)
_CHUNK_BATCHES = 50
_SHORTEST_ROW = 32


def permutation(count: int, seed: int, epoch: int, stream: int = _ORDER) -> Int64[np.ndarray, " N"]:
    """A random order of `range(count)` that depends on nothing but the arguments.

    >>> permutation(5, seed=0, epoch=0).tolist() == permutation(5, seed=0, epoch=0).tolist()
    True
    >>> sorted(permutation(5, seed=0, epoch=1).tolist())
    [0, 1, 2, 3, 4]
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    random = np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)
    return np.argsort(random, kind="stable")


def row_lengths(seq_len: int) -> list[int]:
    """The lengths of rows that a run compiles: T, T/2, T/4 and T/8, as long as that is worth it.

    >>> row_lengths(512), row_lengths(100)
    ([64, 128, 256, 512], [50, 100])
    """
    lengths = [-(-seq_len // part) for part in (8, 4, 2, 1)]
    return [length for length in lengths if length >= min(_SHORTEST_ROW, seq_len)]


def group_by_length(
    order: Int[np.ndarray, " N"], lengths: Int[np.ndarray, " N"], rows: int
) -> Int[np.ndarray, " N"]:
    """Sorts chunks of a random order, longest first.

    A chunk is 50 batches, or a quarter of the data where that is less, so that there is something
    left to shuffle.

    Args:
        order: a permutation of the examples.
        lengths: tokens of each example.
        rows: examples of one batch.

    >>> order, lengths = np.array([3, 0, 2, 1, 4, 5, 7, 6]), np.arange(1, 9)
    >>> group_by_length(order, lengths, rows=1).tolist()
    [3, 0, 2, 1, 5, 4, 7, 6]
    """
    size = rows * max(1, min(_CHUNK_BATCHES, len(order) // (4 * rows)))
    chunk = np.arange(len(order)) // size
    return order[np.lexsort((-lengths[order], chunk))]


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
    held = set(permutation(len(items), seed, 0, _SPLIT)[:count].tolist())
    train = [item for i, item in enumerate(items) if i not in held]
    return train, [items[i] for i in sorted(held)]


class RowOrder:
    """The endless stream of rows, by number.

    Args:
        lengths: tokens of each example, at most `seq_len`.
        seq_len: tokens of a row.
        packing: share rows between examples; otherwise one example a row.
        grouped: rows of one optimizer step, to sort by length within chunks of them; 0: not.
        seed: decides the order.

    >>> order = RowOrder(np.array([3, 2, 4]), seq_len=6, packing=True, grouped=0, seed=0)
    >>> order.rows_per_epoch, [order.row(n).tolist() for n in (0, 1, 10**9)]
    (2, [[2, 1], [0], [2, 1]])
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, " N"],
        *,
        seq_len: int,
        packing: bool,
        grouped: int,
        seed: int,
    ):
        self.lengths = lengths
        self._packing, self._grouped, self._seed = packing, grouped, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        sizes = np.ones(len(lengths), np.int64)
        if packing:
            # Packed once for all epochs: a row holds the j-th, k-th, ... longest example of each.
            rows = best_fit_decreasing(np.sort(lengths)[::-1].tolist(), seq_len)
            self._ranks = np.fromiter((i for row in rows for i in row), np.int64, len(lengths))
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        self._ends = np.cumsum(sizes)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold each example once."""
        return len(self._ends)

    def row(self, number: int) -> Int64[np.ndarray, " E"]:
        """The examples of a row, by its number from the beginning of epoch 0."""
        epoch, position = divmod(number, self.rows_per_epoch)
        examples, rows = self._epoch(epoch)
        row = rows[position]
        return examples[self._ends[row - 1] if row else 0 : self._ends[row]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of all packed rows, and the order of the rows."""
        found = self._epochs.get(epoch)
        if found is None:
            # A batch reaches into one more epoch (or, with few data, several); older ones go.
            self._epochs = dict(list(self._epochs.items())[-1:])
            found = self._epochs[epoch] = self._draw(epoch)
        return found

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self.lengths), self._seed, epoch)
        if self._packing:
            longest_first = order[np.argsort(-self.lengths[order], kind="stable")]
            rows = permutation(self.rows_per_epoch, self._seed, epoch, _ROWS)
            return longest_first[self._ranks], rows
        if self._grouped:
            order = group_by_length(order, self.lengths, self._grouped)
        return order, np.arange(self.rows_per_epoch)
