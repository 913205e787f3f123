"""What happened to the data on its way to the model, in numbers.

`DataReport` is filled while records are read and tokenized: what was skipped, cut or dropped, with
a few examples of why. `DataStats` is computed afterwards from the finished examples: how many
tokens there are, how many of them carry loss, and how much of a batch would be padding with and
without packing.
"""

import dataclasses
from collections.abc import Sequence

from qlora_jax.data.masking import Example
from qlora_jax.data.packing import best_fit_decreasing


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
        padded_rows: rows needed with one example a row.
    """

    examples: int
    tokens: int
    loss_tokens: int
    longest: int
    truncated: int
    seq_len: int
    packed_rows: int
    padded_rows: int

    @property
    def loss_share(self) -> float:
        """Share of the tokens that carry loss, 0 to 1."""
        return self.loss_tokens / self.tokens if self.tokens else 0.0

    def padding_share(self, packing: bool) -> float:
        """Share of all positions of an epoch's rows that hold padding, 0 to 1."""
        positions = (self.packed_rows if packing else self.padded_rows) * self.seq_len
        return 1.0 - self.tokens / positions if positions else 0.0

    def lines(self) -> list[str]:
        """The numbers as text, one fact a line."""
        return [
            f"examples        {self.examples:,}",
            f"tokens          {self.tokens:,} (longest example {self.longest:,})",
            f"loss tokens     {self.loss_tokens:,} ({self.loss_share:.1%} of all tokens)",
            f"truncated       {self.truncated:,}",
            f"with packing    {self.packed_rows:,} rows of {self.seq_len}, "
            f"{self.padding_share(packing=True):.1%} padding",
            f"without packing {self.padded_rows:,} rows of {self.seq_len}, "
            f"{self.padding_share(packing=False):.1%} padding",
        ]


def summarize(examples: Sequence[Example], seq_len: int) -> DataStats:
    """Counts tokens, loss tokens and padding.

    Args:
        examples: tokenized examples, none longer than `seq_len`.
        seq_len: tokens of one row of a batch.

    Returns:
        The counts.

    >>> import numpy as np
    >>> example = Example(np.arange(6), np.array([0, 0, 0, 1, 1, 1]), "a.jsonl:1")
    >>> stats = summarize([example, example, example], seq_len=12)
    >>> stats.packed_rows, stats.padded_rows, stats.loss_share
    (2, 3, 0.5)
    >>> stats.padding_share(packing=True), stats.padding_share(packing=False)
    (0.25, 0.5)
    """
    lengths = [len(example.tokens) for example in examples]
    return DataStats(
        examples=len(examples),
        tokens=sum(lengths),
        loss_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        longest=max(lengths, default=0),
        truncated=sum(example.truncated for example in examples),
        seq_len=seq_len,
        packed_rows=len(best_fit_decreasing(lengths, seq_len)),
        padded_rows=len(lengths),
    )
