"""Scales of a tile of W, decoded once into shared memory, for the fused products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float32, Int32

from pallas_kernels.formats import NESTED_BLOCK_SIZE
from pallas_kernels.matmul_4bit.mosaic_tiles import TILE
from pallas_kernels.mosaic_registers import extract, map_registers, pack, tile_layout


@dataclasses.dataclass(frozen=True)
class Scales:
    """The absmax of 64 rows of either half of W, some tiles of 64 columns at a time.

    All threads of a warpgroup decode different ones. Rows and columns beyond the last are taken
    for the last: there, the other factor of the product is zero, and must not meet a NaN.

    Attributes:
        shape: of W, `(out, in)`.
        block_size: of the format, a multiple of 64.
        tiles: of 64 columns, a power of two up to 32.
        nested: whether there is double quantization.
        interpret: whether the kernel runs in Pallas's interpreter.
    """

    shape: tuple[int, int]
    block_size: int
    tiles: int
    nested: bool
    interpret: bool

    @property
    def smem(self) -> tuple[int, int, int]:
        """The shape in shared memory; an odd number of columns spreads a column over the banks."""
        return 2, TILE, self.tiles + 1

    def decode(self, scales_gmem: Sequence, row, tile) -> list[Float32[Array, "64 tiles"]]:
        """The scales of the high and of the low nibbles, in registers.

        Args:
            scales_gmem: absmax, flat; with double quantization uint8 and followed by the dynamic
                map, the nested scales and the offset [1].
            row: of bytes, the first one.
            tile: of 64 columns, the first one.
        """
        (n, k), layout = self.shape, tile_layout(self.tiles, 1)
        rows, tiles = (
            start + plgpu.broadcasted_iota(jnp.int32, (TILE, self.tiles), axis, layout=layout)
            for axis, start in enumerate((row, tile))
        )
        rows, tiles = jnp.minimum(rows, n // 2 - 1), jnp.minimum(tiles, k // TILE - 1)
        block = rows * (k // self.block_size) + tiles // (self.block_size // TILE)
        planes = block, block + n // 2 * (k // self.block_size)
        return [self._decode_blocks(plane, *scales_gmem, layout=layout) for plane in planes]

    def _decode_blocks(self, block, absmax_gmem, *nested, layout):
        shared = dict(layout=layout, interpret=self.interpret)
        absmax = take(absmax_gmem, block, **shared)
        if not self.nested:
            return absmax
        map_gmem, nested_gmem, offset_gmem = nested
        scale = take(nested_gmem, block // NESTED_BLOCK_SIZE, **shared)
        return take(map_gmem, absmax, **shared) * scale + offset_gmem[0]

    def store(self, scales_smem, planes: Sequence[Float32[Array, "64 tiles"]]) -> None:
        """Puts decoded scales where all threads of the warpgroup can read them."""
        plgpu.commit_smem()  # All threads have read what was there.
        for plane, values in enumerate(planes):
            store(scales_smem.at[plane, :, : self.tiles], values)


def take(table_gmem, index: Int32[Array, "*n"], *, layout: plgpu.Layout, interpret: bool):
    """`table_gmem[index]`, bytes as int32; every thread reads for itself.

    Args:
        table_gmem: a flat reference to global memory, float32 or uint8.
        index: in a layout of one number a register.
        layout: of `index`, and of the result.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    dtype = _loaded(table_gmem.dtype)
    if interpret:
        return table_gmem[...][index].astype(dtype)
    result = plgpu.ShapeDtypeStruct(index.shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    def gather(_, table, index):
        return emit_take(table, index, table_gmem.dtype)

    return gather(table_gmem, index)


def _loaded(dtype: jnp.dtype) -> type:
    return jnp.float32 if dtype == jnp.float32 else jnp.int32


def emit_take(
    table: ir.Value, index: mgpu.FragmentedArray, dtype: jnp.dtype
) -> mgpu.FragmentedArray:
    """What a thread does in `take`, for a table of this dtype."""
    base, loaded = mgpu.utils.memref_ptr(table), jnp.dtype(_loaded(dtype))
    element, word = (mgpu.utils.dtype_to_ir_type(jnp.dtype(d)) for d in (dtype, loaded))

    def read(register):
        where = mgpu.utils.getelementptr(base, [extract(register, 0)], element)
        value = llvm.load(element, where)
        return pack([value if element == word else llvm.zext(word, value)])

    return map_registers(read, index, is_signed=mgpu.utils.is_signed(loaded))


def store(ref, value) -> None:
    """`ref[...] = value`, also where that meets a bank of shared memory more than once."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before JAX 0.12 every store was of that kind
        ref[...] = value
