"""Rows of fixed length from examples of any length, without contamination.

Examples that share a row are told apart by `segment_ids` (1, 2, ... in each row; 0 is padding),
which attention compares, and by `positions`, which restart at 0 with every example. A row of length
T then trains its examples exactly as rows of their own would, without spending computation on
padding.

Every row has the same length also without packing. Rows cut to the longest example of a batch would
save some padding, but every length is another program to compile, with a memory of its own; one
shape means one compilation and a peak that is known beforehand. Packing is what removes the
padding.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.masking import Example
from qlora_jax.errors import DataError

ARRAY_NAMES = ("tokens", "loss_mask", "segment_ids", "positions")


def best_fit_decreasing(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Assigns examples to rows: longest first, each into the fullest row that still holds it.

    Needs at most 11/9 of the fewest possible rows (plus 1), and in practice nearly the fewest.
    Examples of equal length keep their order, and which lengths share a row does not depend on the
    order at all.

    Args:
        lengths: tokens of each example.
        seq_len: tokens a row holds.

    Returns:
        For each row the indices of its examples, every index once.

    Raises:
        DataError: if an example is longer than a row, or empty.

    >>> best_fit_decreasing([4, 8, 5, 2], seq_len=10)
    [[1, 3], [2, 0]]
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # tokens left -> rows
    sizes: list[int] = []  # the keys of open_rows in order
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        if not 0 < length <= seq_len:
            raise DataError(f"example {index} has {length} tokens, need 1 to seq_len={seq_len}")
        found = bisect.bisect_left(sizes, length)
        if found == len(sizes):
            row, left = len(rows), seq_len
            rows.append([])
        else:
            left = sizes[found]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], sizes[found]
        rows[row].append(index)
        if left > length:
            if left - length not in open_rows:
                open_rows[left - length] = []
                bisect.insort(sizes, left - length)
            open_rows[left - length].append(row)
    return rows


def fill_rows(
    rows: Sequence[Sequence[Example]], seq_len: int
) -> dict[str, Int32[np.ndarray, "R T"]]:
    """Writes examples into rows, one after the other.

    Args:
        rows: the examples of each row; together at most `seq_len` tokens. A row may be empty.
        seq_len: tokens of a row, T.

    Returns:
        `tokens`, `loss_mask`, `segment_ids` and `positions`, each int32 [rows, T], 0 where padded.

    >>> a = Example(np.array([7, 8]), np.array([0, 1]), "a:1")
    >>> b = Example(np.array([9]), np.array([0]), "a:2")
    >>> arrays = fill_rows([[a, b]], seq_len=4)
    >>> arrays["segment_ids"].tolist(), arrays["positions"].tolist()
    ([[1, 1, 2, 0]], [[0, 1, 0, 0]])
    """
    arrays = {name: np.zeros((len(rows), seq_len), np.int32) for name in ARRAY_NAMES}
    for r, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            end = start + len(example.tokens)
            if end > seq_len:
                raise DataError(
                    f"{example.record_id}: row of {end} tokens, need at most {seq_len=}"
                )
            arrays["tokens"][r, start:end] = example.tokens
            arrays["loss_mask"][r, start:end] = example.loss_mask
            arrays["segment_ids"][r, start:end] = segment
            arrays["positions"][r, start:end] = np.arange(end - start)
            # The first token of an example has nothing to be predicted from but its neighbour.
            arrays["loss_mask"][r, start] = 0
            start = end
    return arrays
