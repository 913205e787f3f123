"""Prompts of all lengths in rows of a few widths: little padding, and few programs to compile.

Several prompts stand in one row, each a segment that sees only itself, as short records do in
training. The longest come first and each goes into the first row with room for it ("first fit
decreasing"), which leaves 2 % of MMLU's places empty; padding each prompt to the length of its
batch's longest left a third. All batches have the same number of tokens but those of the last rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# A row that is not full of one long prompt.
ROW_WIDTH = 512
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

    Args:
        lengths: of the prompts, at least 1.
        batch_tokens: of a batch; a row that is longer is a batch by itself.
        limit: of a row.

    >>> [(batch.rows, batch.size, batch.width) for batch in pack([300, 40, 100, 600], 1024, 2048)]
    [([[3, 0, 2]], 1, 1024), ([[1]], 1, 512)]
    """
    open_rows: list[tuple[int, list[int]]] = []  # width, prompts
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, free in enumerate(room):
            width, prompts = open_rows[row]
            if free >= lengths[i] and len(prompts) < places_of(width):
                break
        else:
            row = len(room)
            width = row_width(lengths[i], batch_tokens, limit)
            open_rows.append((width, []))
            room.append(width)
        open_rows[row][1].append(i)
        room[row] -= lengths[i]
    for width in sorted({width for width, _ in open_rows}, reverse=True):
        rows = [prompts for each, prompts in open_rows if each == width]
        full = max(1, batch_tokens // width)
        while rows:
            # What is left is divided by powers of two: few shapes, each a program, and no padding.
            size = full if len(rows) >= full - full // 8 else 1 << (len(rows).bit_length() - 1)
            size = min(size, full)
            yield PackedBatch(rows[:size], size, width)
            rows = rows[size:]


def row_width(length: int, batch_tokens: int, limit: int) -> int:
    """The width of the row that a prompt opens.

    >>> [row_width(n, 4096, 2048) for n in (100, 513, 2048)], row_width(100, 64, 2048)
    ([512, 1024, 2048], 128)
    """
    width = max(_SHORTEST, min(ROW_WIDTH, batch_tokens))
    while width < length:
        width *= 2
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
