"""From bytes of two codes to tensor-core operands, for the fused products in Pallas Mosaic GPU.

**Look-up.** A byte holds two codes, so a table of all 256 bytes yields two weights a look-up: its
entry is a 32-bit word, the value of the low nibble in the low 16 bits, that of the high nibble in
the high ones, both already in the dtype of the product. In shared memory such random reads would
meet at the same bank three or four at a time; so every lane of a warp has a copy of its own,
which is its bank: `table_smem[byte, lane]`, 32 KiB. A look-up is then a shift, a mask-and-or and
one read, for two weights. The codebook is rounded to the product's dtype once, absmax is not part
of it: products of 64 weights are summed in float32 first and scaled then, once.

**Operands.** The matrix instruction `wgmma` takes its 64-row operand from registers: in row `r`
and 16 columns, lane `4 r + j` holds columns `2 j, 2 j + 1, 8 + 2 j, 8 + 2 j + 1` of 16-bit
values. Bytes are read 16 at a time instead, as shared memory likes it: lane `4 r + j` has bytes
`16 j ... 16 j + 15` of 64. Nothing is exchanged. The operand's columns simply mean other elements
of the sum,

    column 16 s + 8 t + 2 j + e  is element  16 j + 4 s + 2 t + e        (s, j < 4; t, e < 2)

and the other factor is brought into that order beforehand (`to_operand_order`), which is small.
The high nibbles of 64 rows of bytes are one operand, the low nibbles (of rows `N/2` further)
another.

Pallas's interpreter runs no inline code: there, `interpret=True` takes plain JAX for the same
values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels.formats import CODEBOOKS
from pallas_kernels.matmul_4bit.mosaic_tiles import TILE
from pallas_kernels.mosaic_registers import WARP, constant, words

# 16 neighbouring bytes a thread, four threads a row: `codes` of one tile of 64 x 64 bytes.
BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 64), (16, 64), (8, 64), (16,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# The table, four rows a warp and 16 bytes a thread: every store meets all banks once.
_TABLE = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 32), (4, 32), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
TABLE_SHAPE = (256, WARP)


def pair_table(quant_type: str, dtype: jnp.dtype) -> UInt32[np.ndarray, " 256"]:
    """The values of both nibbles of each byte, as 16-bit patterns in one word.

    >>> hex(pair_table("int4", jnp.bfloat16)[0xF1])
    '0x3f80bf80'
    """
    bits = CODEBOOKS[quant_type].astype(dtype).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return bits[byte & 15] | bits[byte >> 4] << 16


def fill_table(table_gmem, table_smem, part, parts: int) -> None:
    """Writes one of `parts` parts of the table; all have to meet at a barrier before it is read."""
    rows = TABLE_SHAPE[0] // parts
    where = pl.ds(part * rows, rows)
    entries = plgpu.load(table_gmem.at[where], layout=_TABLE.reduce(1), optimized=False)
    copies = lax.broadcast_in_dim(entries, (rows, WARP), (0,))
    table_smem[where] = plgpu.layout_cast(copies, _TABLE)


def to_operand_order(x: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The columns of `x` in the order of the operands' columns; `k` is a multiple of 64."""
    m, k = x.shape
    return x.reshape(m, k // TILE, 4, 4, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(m, k)


def decode_planes(
    codes: UInt8[Array, "64 64"],
    table_smem: UInt32[Array, "256 32"],
    dtype: jnp.dtype,
    *,
    interpret: bool,
) -> tuple[Float[Array, "64 64"], Float[Array, "64 64"]]:
    """The codebook's values at the high and at the low nibbles, as operands of `wgmma`.

    Args:
        codes: in the layout `BYTES`.
        table_smem: as `fill_table` left it.
        dtype: bfloat16 or float16.
        interpret: whether the kernel runs in Pallas's interpreter.

    Returns:
        `(high, low)`, columns in operand order.
    """
    if interpret:
        pairs = table_smem[...][codes.astype(jnp.int32), 0]
        halves = (pairs >> 16).astype(jnp.uint16), pairs.astype(jnp.uint16)
        high, low = (lax.bitcast_convert_type(to_operand_order(h), dtype) for h in halves)
        return high, low
    result = plgpu.ShapeDtypeStruct(codes.shape, dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(BYTES, plgpu.RefType()), return_type=(result, result))
    def decode(_, codes, table):
        return emit_planes(codes, table, dtype)

    return tuple(decode(codes, table_smem))


def emit_planes(
    codes: mgpu.FragmentedArray, table: ir.Value, dtype: jnp.dtype
) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    """What a thread does in `decode_planes`."""
    shape = mgpu.WGMMA_LAYOUT.registers_shape(codes.shape)
    high, low = np.empty(shape, object), np.empty(shape, object)
    for half, word, step, (p, q) in _pairs(codes, table):
        # p and q are bytes that are neighbours in a row: two columns of either operand.
        index = (0, 2 * word + step, 0, 0, half, 0, 0, 0, 0)
        low[index] = _permute_bytes(p, q, 0x5410, dtype)
        high[index] = _permute_bytes(p, q, 0x7632, dtype)
    return operand(high), operand(low)


def _pairs(codes: mgpu.FragmentedArray, table: ir.Value):
    """Yields row half, word, step and the entries for two bytes, of all that a thread has."""
    entry = reader(table)
    for half, register in enumerate(codes.registers.flat):
        for i, word in enumerate(words(register)):
            for step in range(2):
                yield half, i, step, (entry(word, 2 * step), entry(word, 2 * step + 1))


def reader(table: ir.Value) -> Callable[[ir.Value, int], ir.Value]:
    """The look-up of one byte of a word in this lane's copy of the table."""
    i32, base = ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(table)
    bank = arith.shli(lane(), constant(2))

    def entry(word: ir.Value, byte: int) -> ir.Value:
        shift = 8 * byte - 7  # a row of the table has 2**7 bytes
        move, count = (arith.shli, -shift) if shift < 0 else (arith.shrui, shift)
        row = arith.andi(move(word, constant(count)), constant(0xFF << 7))
        i8 = ir.IntegerType.get_signless(8)
        return llvm.load(i32, mgpu.utils.getelementptr(base, [arith.ori(row, bank)], i8))

    return entry


def lane() -> ir.Value:
    """The thread's index in its warp."""
    # Not the masked index of the thread: the assembler would mask it again for every look-up.
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], "mov.u32 $0, %laneid;", "=r", has_side_effects=False)


def _permute_bytes(a: ir.Value, b: ir.Value, selector: int, dtype: jnp.dtype) -> ir.Value:
    """Four of the eight bytes of `a` and `b`, as two values of `dtype`."""
    i32 = ir.IntegerType.get_signless(32)
    code = f"prmt.b32 $0, $1, $2, {selector};"
    word = llvm.inline_asm(i32, [a, b], code, "=r,r,r", has_side_effects=False)
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
    return mgpu.utils.bitcast(word, pair)


def operand(registers: np.ndarray) -> mgpu.FragmentedArray:
    """The 64 x 64 operand of `wgmma` that consists of these registers."""
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
