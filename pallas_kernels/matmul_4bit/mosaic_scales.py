"""Scales of a tile of rows, decoded once into shared memory, for the fused products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import NESTED_BLOCK_SIZE
from pallas_kernels.matmul_4bit.mosaic_pairs import TILE
from pallas_kernels.mosaic_decode import look_up
from pallas_kernels.mosaic_registers import tile_layout

_MOST_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Scales:
    """The absmax of 64 rows of either half of W, a chunk of columns at a time.

    A row of W has `columns` scales; a warpgroup decodes `chunk` of them for each of its rows, all
    its threads at work on different ones, and reads them from shared memory as often as it likes.

    Attributes:
        columns: scales a row of W, two at least.
        block_size: of the format, a multiple of 64.
        nested: whether there is double quantization.
        interpret: whether the kernel runs in Pallas's interpreter.
    """

    columns: int
    block_size: int
    nested: bool
    interpret: bool

    @property
    def chunk(self) -> int:
        """Scales that are decoded at a time, and tiles of 64 columns that they are for."""
        return min(_MOST_COLUMNS, 1 << (self.columns.bit_length() - 1))

    def _first(self, tile):
        """The column of the first scale that is decoded for the chunk that starts at a tile."""
        return jnp.minimum(tile * TILE // self.block_size, self.columns - self.chunk)

    def column(self, tile, chunk_tile):
        """Where the scales of a tile are, in the chunk that started at `chunk_tile`."""
        return tile * TILE // self.block_size - self._first(chunk_tile)

    def decode(self, scales_gmem: Sequence, scales_smem, rows: Sequence[pl.Slice], tile) -> None:
        """Decodes a chunk.

        Args:
            scales_gmem: absmax [out, columns]; with double quantization uint8 and followed by the
                dynamic map, the nested scales and the offset [1].
            scales_smem: float32 [len(rows), 64, chunk + 1], this warpgroup's. The odd number of
                columns spreads a column over the banks.
            rows: of W, slices of 64.
            tile: of 64 columns, the first of the chunk.
        """
        layout = tile_layout(self.chunk, 1)
        first = self._first(tile)
        plgpu.commit_smem()  # All threads have read the chunk before.
        for plane, where in enumerate(rows):
            absmax = plgpu.load(
                scales_gmem[0].at[where, pl.ds(first, self.chunk)], layout=layout, optimized=False
            )
            if self.nested:
                absmax = self._decode_nested(absmax, where.start, first, *scales_gmem[1:], layout)
            store(scales_smem.at[plane, :, pl.ds(0, self.chunk)], absmax)

    def _decode_nested(self, codes, row, column, map_gmem, nested_gmem, offset_gmem, layout):
        rows, columns = (
            plgpu.broadcasted_iota(jnp.int32, codes.shape, i, layout=layout) for i in range(2)
        )
        block = (row + rows) * self.columns + column + columns
        shared = dict(layout=layout, interpret=self.interpret)
        nested = look_up(nested_gmem, block // NESTED_BLOCK_SIZE, **shared)
        values = look_up(map_gmem, codes.astype(jnp.int32), **shared)
        return values * nested + offset_gmem[0]


def store(ref, value) -> None:
    """`ref[...] = value`, also where that meets a bank of shared memory more than once."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before JAX 0.12 every store was of that kind
        ref[...] = value
