"""Prompts of all lengths in rows of a few widths: little padding, and few programs to compile.

Several prompts stand in one row, each a segment that sees only itself, as short records do in
training. The longest come first and each goes into the first row with room for it ("first fit
decreasing"), which leaves 3 % of MMLU's places empty; padding each prompt to the length of its
batch's longest left a third. All batches have the same number of tokens but those of the last rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# Of a row of short prompts. Attention's time on a CPU grows with it, and padding where it is less.
ROW_WIDTH = 256
# A row has at most one prompt for so many tokens, so that the number of places whose logits are
# computed follows from the shape.
_SHORTEST = 32


class PackedBatch(NamedTuple):
    """Rows of the same width.

    Attributes:
        rows: indices of the prompts of each row.
        size: rows of the array; those beyond `rows` are padding.
        width: tokens of a row.
    """

    rows: list[list[int]]
    size: int
    width: int

    @property
    def prompts(self) -> list[int]:
        """Indices of all prompts, in the order of `Layout.places`."""
        return [i for row in self.rows for i in row]


class Layout(NamedTuple):
    """A batch as arrays.

    Attributes:
        tokens: ids.
        segment_ids: 1, 2, ... in a row; 0 is padding.
        positions: of each token in its prompt.
        places: of each prompt's last token in the flattened batch; zeros behind them.
    """

    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    places: Int[np.ndarray, " N"]


def pack(lengths: Sequence[int], batch_tokens: int, limit: int) -> Iterator[PackedBatch]:
    """Divides prompts into batches; the widest rows first: memory runs out at once or never.

    A prompt that is longer than a row of `ROW_WIDTH` opens one of the next multiple of it, or of
    the next power of two, where others have room beside it: whichever leaves less empty in all.

    Args:
        lengths: of the prompts, at least 1.
        batch_tokens: of a batch; a row that is longer is a batch by itself.
        limit: of a row.

    >>> [(batch.rows, batch.size, batch.width) for batch in pack([300, 40, 100, 600], 1024, 2048)]
    [([[3, 2, 1]], 1, 768), ([[0]], 1, 512)]
    """
    ways = [_fill_rows(lengths, batch_tokens, limit, doubled) for doubled in (False, True)]
    rows = min(ways, key=lambda rows: sum(row.width for row in rows))
    for width in sorted({row.width for row in rows}, reverse=True):
        prompts = [row.prompts for row in rows if row.width == width]
        full = max(1, batch_tokens // width)
        while prompts:
            count = len(prompts)
            # What is left is divided by powers of two: few shapes, each a program, and no padding.
            size = full if count >= full - full // 8 else 1 << (count.bit_length() - 1)
            size = min(size, full)
            yield PackedBatch(prompts[:size], size, width)
            prompts = prompts[size:]


@dataclasses.dataclass
class _Row:
    width: int
    room: int
    prompts: list[int]


def _fill_rows(lengths: Sequence[int], batch_tokens: int, limit: int, doubled: bool) -> list[_Row]:
    """First fit decreasing."""
    rows: list[_Row] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if row.room >= lengths[i] and len(row.prompts) < places_of(row.width):
                break
        else:
            width = row_width(lengths[i], batch_tokens, limit, doubled=doubled)
            row = _Row(width, width, [])
            rows.append(row)
        row.prompts.append(i)
        row.room -= lengths[i]
    return rows


def row_width(length: int, batch_tokens: int, limit: int, *, doubled: bool = True) -> int:
    """The width of the row that a prompt opens.

    >>> [row_width(n, 4096, 2048, doubled=True) for n in (100, 513, 2048)]
    [256, 1024, 2048]
    >>> [row_width(n, 4096, 2048, doubled=False) for n in (100, 513, 2048)]
    [256, 768, 2048]
    """
    width = step = max(_SHORTEST, min(ROW_WIDTH, batch_tokens))
    while width < length:
        width += width if doubled else step
    return min(width, limit)


def places_of(width: int) -> int:
    """How many prompts a row may have."""
    return max(1, width // _SHORTEST)


def lay_out(prompts: Sequence[Sequence[int]], batch: PackedBatch, start: int = 0) -> Layout:
    """The arrays of a batch.

    Args:
        prompts: token ids, of all batches.
        batch: the one.
        start: position of each prompt's first token.

    >>> layout = lay_out([[5, 6], [7]], PackedBatch([[0], [1]], 2, 3), start=9)
    >>> layout.tokens.tolist(), layout.segment_ids.tolist()
    ([[5, 6, 0], [7, 0, 0]], [[1, 1, 0], [1, 0, 0]])
    >>> layout.positions.tolist(), layout.places.tolist()
    ([[9, 10, 0], [9, 0, 0]], [1, 3])
    """
    tokens, segments, positions = (np.zeros((batch.size, batch.width), np.int32) for _ in range(3))
    places = np.zeros(batch.size * places_of(batch.width), np.int32)
    count = 0
    for line, row in enumerate(batch.rows):
        end = 0
        for number, i in enumerate(row, start=1):
            part = slice(end, end + len(prompts[i]))
            tokens[line, part], segments[line, part] = prompts[i], number
            positions[line, part] = start + np.arange(len(prompts[i]))
            end = part.stop
            places[count] = line * batch.width + end - 1
            count += 1
    return Layout(tokens, segments, positions, places)
