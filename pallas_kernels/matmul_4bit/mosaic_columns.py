"""Columns of a 4-bit W as tensor-core operands, for the transposed product in Mosaic GPU.

Here the sum runs over the rows of W, and a byte's two nibbles are two of its elements: rows `n`
and `n + N/2` of the same column. So the 32-bit entry of the pair table is, as it is, two
neighbouring columns of the operand. A tile is 64 rows of bytes by 256 columns; a 32-bit word of
it, four columns, goes to four operands. With lane `4 q + j` of warp `w` as in `mosaic_pairs`,

    operand c, row 16 w + 8 h + q           is column  64 w + 32 h + 4 q + c  of the tile,
    its column 16 s + 8 t + 2 j + e         is row     8 s + 2 j + t  (of 32), low nibble for e = 0.

TMA leaves the tile swizzled: 16 bytes `c` of row `n` are where `c ^ (n % 8)` would be. The eight
rows and chunks of 16 bytes that a warp reads at a time so have a bank for each lane.

A warp's 64 columns are one block of the format, whose scale changes along the sum: weights are
scaled before they are multiplied, a pair of them by a pair of scales in the product's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from pallas_kernels.matmul_4bit.mosaic_pairs import lane, operand, reader
from pallas_kernels.matmul_4bit.mosaic_tiles import TILE
from pallas_kernels.mosaic_registers import constant, pack

COLUMNS = 4 * TILE
SWIZZLE = 128
# Columns of the scales in shared memory, see `Scales.smem`.
_SCALES_PITCH = COLUMNS // TILE + 1
SWIZZLED = (plgpu.SwizzleTransform(SWIZZLE),)


def to_reduction_order(g: Float[Array, "m n"], rows: int) -> Float[Array, "m 2*rows"]:
    """The columns of `g` in the order of the operands' columns.

    Args:
        g: an even number of columns, `n`.
        rows: of bytes to pad `n // 2` to, a multiple of 32.
    """
    m, n = g.shape
    planes = jnp.pad(g.reshape(m, 2, n // 2), ((0, 0), (0, 0), (0, rows - n // 2)))[:, ::-1]
    planes = planes.reshape(m, 2, rows // 32, 4, 4, 2)
    return planes.transpose(0, 2, 3, 5, 4, 1).reshape(m, 2 * rows)


def from_operand_rows(y: Float[Array, "tiles 4 64 m"]) -> Float[Array, "m 256*tiles"]:
    """The rows of all operands as the columns that they are."""
    tiles, _, _, m = y.shape
    return y.transpose(3, 0, 2, 1).reshape(m, tiles * COLUMNS)


def decode_columns(
    codes_smem: UInt8[Array, "2 64 128"],
    scales_smem: Float32[Array, "2 64 5"],
    table_smem: UInt32[Array, "256 32"],
    part: int,
    dtype: jnp.dtype,
    *,
    interpret: bool,
) -> Sequence[Float[Array, "64 64"]]:
    """32 rows of bytes of a tile as four operands of `wgmma`, scaled.

    Args:
        codes_smem: the left and the right half of a tile, with the transforms `SWIZZLED`.
        scales_smem: of the high and of the low nibbles, a column for each 64 of the tile.
        table_smem: as `fill_table` left it.
        part: which half of the rows.
        dtype: bfloat16 or float16.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    if interpret:
        rows = slice(32 * part, 32 * part + 32)
        codes = jnp.concatenate(list(codes_smem[...][:, rows]), axis=1)
        pairs = table_smem[...][codes.astype(jnp.int32), 0]
        pairs = jnp.stack([pairs & 0xFFFF, pairs >> 16]).astype(jnp.uint16)
        scales = scales_smem[...][::-1, rows, :4].astype(dtype)
        w = lax.bitcast_convert_type(pairs, dtype) * jnp.repeat(scales, TILE, axis=2)
        # [e, (s j t), (r c)] -> [c, r, (s t j e)]
        w = w.reshape(2, 4, 4, 2, TILE, 4).transpose(5, 4, 1, 3, 2, 0)
        return list(w.reshape(4, TILE, TILE))
    result = plgpu.ShapeDtypeStruct((TILE, TILE), dtype, layout=plgpu.Layout.WGMMA)
    refs = plgpu.RefType(SWIZZLED), plgpu.RefType(), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=refs, return_type=(result,) * 4)
    def decode(_, codes, scales, table):
        return emit_columns(codes, scales, table, part, dtype)

    return decode(codes_smem, scales_smem, table_smem)


def emit_columns(
    codes: ir.Value, scales: ir.Value, table: ir.Value, part: int, dtype: jnp.dtype
) -> tuple[mgpu.FragmentedArray, ...]:
    """What a thread does in `decode_columns`."""
    shape = mgpu.WGMMA_LAYOUT.registers_shape((TILE, TILE))
    operands = [np.empty(shape, object) for _ in range(4)]
    entry, element = reader(table), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    word, scale = _words(codes, part), _scales(scales, part, element)
    for s in range(4):
        for t in range(2):
            factor = scale(s, t)
            for h in range(2):
                four = word(s, t, h)
                for c, registers in enumerate(operands):
                    pair = mgpu.utils.bitcast(entry(four, c), factor.type)
                    registers[0, 2 * s + t, 0, 0, h, 0, 0, 0, 0] = arith.mulf(pair, factor)
    return tuple(operand(registers) for registers in operands)


def _thread() -> tuple[ir.Value, ir.Value, ir.Value]:
    """The warp of the warpgroup, and q and j of the lane."""
    warp = arith.andi(arith.shrui(mgpu.utils.thread_idx(), constant(5)), constant(3))
    return warp, arith.shrui(lane(), constant(2)), arith.andi(lane(), constant(3))


def _words(codes: ir.Value, part: int):
    """The reader of four columns of a row: `word(s, t, h)`."""
    i32, i8 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    base = mgpu.utils.memref_ptr(codes)
    warp, q, j = _thread()
    # Two warps share 128 columns, 64 rows of which are 8192 bytes.
    half_tile = arith.shli(arith.shrui(warp, constant(1)), constant(13))
    in_chunk = arith.shli(arith.andi(q, constant(3)), constant(2))
    chunk = arith.addi(
        arith.shli(arith.andi(warp, constant(1)), constant(2)), arith.shrui(q, constant(2))
    )
    starts = {}
    for t in range(2):
        row = arith.addi(arith.shli(j, constant(1)), constant(t))
        for h in range(2):
            swizzled = arith.xori(arith.addi(chunk, constant(2 * h)), row)
            offset = arith.addi(arith.shli(row, constant(7)), arith.shli(swizzled, constant(4)))
            starts[t, h] = arith.addi(arith.addi(offset, half_tile), in_chunk)

    def word(s: int, t: int, h: int) -> ir.Value:
        offset = arith.addi(starts[t, h], constant((4 * part + s) * 8 * SWIZZLE))
        return llvm.load(i32, mgpu.utils.getelementptr(base, [offset], i8))

    return word


def _scales(scales: ir.Value, part: int, element: ir.Type):
    """The reader of the pair of scales of a row: `scale(s, t)`."""
    f32, base = ir.F32Type.get(), mgpu.utils.memref_ptr(scales)
    warp, _, j = _thread()
    start = arith.addi(arith.muli(j, constant(2 * _SCALES_PITCH)), warp)

    def scale(s: int, t: int) -> ir.Value:
        values = []
        for plane in (1, 0):  # the low nibble's is the first element
            row = plane * TILE + 32 * part + 8 * s + t
            offset = arith.addi(start, constant(row * _SCALES_PITCH))
            values.append(llvm.load(f32, mgpu.utils.getelementptr(base, [offset], f32)))
        return arith.truncf(ir.VectorType.get((2,), element), pack(values))

    return scale
