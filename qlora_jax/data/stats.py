"""What happened to the data on its way to the model, in numbers.

`DataReport` is filled while records are read and tokenized: what was skipped, cut or dropped, with
a few examples of why. `DataStats` is computed afterwards from the finished examples: how many
tokens there are, how many of them carry loss, and how much of an epoch would be padding with
packing, with grouping by length, and with neither.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from qlora_jax.data.masking import Example
from qlora_jax.data.packing import best_fit_decreasing
from qlora_jax.data.row_order import group_by_length, permutation, row_lengths


@dataclasses.dataclass(frozen=True)
class DataStats:
    """Token counts of a tokenized data set.

    Attributes:
        examples: number of examples.
        tokens: tokens in all examples.
        loss_tokens: tokens that are targets of the loss.
        longest: tokens of the longest example.
        truncated: examples that were cut to the maximum length.
        seq_len: tokens of one row of a batch.
        packed_rows: rows needed when examples share rows.
        grouped_positions: tokens and padding of an epoch with batches grouped by length and cut
            short, one example a row.
        rows: rows of a batch, for the grouping.
    """

    examples: int
    tokens: int
    loss_tokens: int
    longest: int
    truncated: int
    seq_len: int
    packed_rows: int
    grouped_positions: int
    rows: int

    @property
    def loss_share(self) -> float:
        """Share of the tokens that carry loss, 0 to 1."""
        return self.loss_tokens / self.tokens if self.tokens else 0.0

    def padding_share(self, positions: int) -> float:
        """Share of an epoch's positions that hold padding, 0 to 1."""
        return 1.0 - self.tokens / positions if positions else 0.0

    def lines(self) -> list[str]:
        """The numbers as text, one fact a line."""
        packed, padded = self.packed_rows * self.seq_len, self.examples * self.seq_len
        return [
            f"examples        {self.examples:,}",
            f"tokens          {self.tokens:,} (longest example {self.longest:,})",
            f"loss tokens     {self.loss_tokens:,} ({self.loss_share:.1%} of all tokens)",
            f"truncated       {self.truncated:,} ({self.truncated / max(self.examples, 1):.1%})",
            f"packed          {self.packed_rows:,} rows of {self.seq_len}, "
            f"{self.padding_share(packed):.1%} padding",
            f"by length       {self.examples:,} rows of up to {self.seq_len}, {self.rows} a batch, "
            f"{self.padding_share(self.grouped_positions):.1%} padding",
            f"padded          {self.examples:,} rows of {self.seq_len}, "
            f"{self.padding_share(padded):.1%} padding",
        ]


def summarize(examples: Sequence[Example], seq_len: int, rows: int = 16) -> DataStats:
    """Counts tokens, loss tokens and padding.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        seq_len: tokens of one row of a batch.
        rows: rows of one batch.

    Returns:
        The counts.

    >>> example = Example(np.arange(6), np.array([0, 0, 0, 1, 1, 1]), "a.jsonl:1")
    >>> stats = summarize([example, example, example], seq_len=12)
    >>> stats.packed_rows, stats.loss_share, stats.padding_share(stats.packed_rows * 12)
    (2, 0.5, 0.25)
    """
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    return DataStats(
        examples=len(examples),
        tokens=int(lengths.sum()),
        loss_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        longest=int(lengths.max(initial=0)),
        truncated=sum(example.truncated for example in examples),
        seq_len=seq_len,
        packed_rows=len(best_fit_decreasing(lengths.tolist(), seq_len)),
        grouped_positions=_grouped_positions(lengths, seq_len, rows),
        rows=rows,
    )


def _grouped_positions(lengths: Int[np.ndarray, " N"], seq_len: int, rows: int) -> int:
    """Positions of the first epoch, as `BatchIterator` makes it."""
    order = group_by_length(permutation(len(lengths), seed=0, epoch=0), lengths, rows)
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    allowed = row_lengths(seq_len)
    return sum(
        len(batch) * next(n for n in allowed if n >= lengths[batch].max()) for batch in batches
    )
