"""Decoding 4-bit codes and their scales inside a Pallas Mosaic GPU kernel.

**Codes.** A 16-entry table fits into a warp: lane `l` keeps the codebook's entry `l % 16` in one
register, and `shfl.idx` with segments of 16 lanes fetches the entry that a code names. It reads
only the low four bits of the index, so a weight costs one shift (which brings its nibble to the
bottom of the word) and one shuffle: no mask, no shared memory, no bank conflicts. A kernel for
sm_90 that writes bfloat16 has 4.3 machine instructions a weight this way, all included (64 weights
a thread); 21 with a tree of selects, 10.3 with byte-wise tables (`prmt`), 6.3 with a table in
shared memory, a copy a lane, and 3.8 with one of all 256 pairs. But that one's reads of 8 bytes
conflict in 6.2 turns on the average, where the two shuffles in their place take two.

**Scales.** With double quantization, `absmax = map[code] * nested + offset`. The map's 256 values
are a kernel argument and stay in the L1 cache. Product and sum are rounded separately: an FMA
would give other bits.

Pallas's interpreter runs no inline code: there, `interpret=True` takes plain JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float32, Int32, Shaped, UInt8

from pallas_kernels.formats import CODEBOOKS, NESTED_BLOCK_SIZE
from pallas_kernels.mosaic_registers import (
    LANES,
    WARPGROUP,
    constant,
    extract,
    map_registers,
    pack,
    shuffle,
    tile_layout,
    words,
)

__all__ = [
    "codebook_lanes",
    "decode",
    "decode_absmax",
    "decode_bytes",
    "look_up",
    "rounded",
    "select",
    "tile_layout",
]


def decode(codes: Int32[Array, "*n"], quant_type: str) -> Float32[Array, "*n"]:
    """The codebook's values at `codes` (0 to 15).

    Mosaic shifts and compares no 8-bit integers: bytes are to be cast to int32 first.
    """
    return select(codes, [jnp.float32(v) for v in CODEBOOKS[quant_type]])


def select(index: Int32[Array, "*n"], values: Sequence[Any]) -> Shaped[Array, "*n"]:
    """`values[index]` of 16 scalars by four levels of selects on the bits of the index."""
    for level in range(4):
        bit = (index & (1 << level)) != 0
        pairs = zip(values[0::2], values[1::2], strict=True)
        values = [jnp.where(bit, odd, even) for even, odd in pairs]
    return values[0]


def codebook_lanes(quant_type: str) -> Float32[Array, " 128"]:
    """The codebook eight times, one entry a thread: what `decode_bytes` shuffles.

    Made once in a kernel, outside its loops.
    """
    lane = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=LANES)
    return decode(lane & 15, quant_type)


def decode_bytes(
    packed: UInt8[Array, "*n"],
    lanes: Float32[Array, " 128"],
    quant_type: str,
    *,
    layout: plgpu.Layout,
    interpret: bool,
) -> tuple[Float32[Array, "*n"], Float32[Array, "*n"]]:
    """The codebook's values at the high and at the low nibbles of bytes.

    Args:
        packed: bytes whose `layout` gives a thread four neighbours or a multiple of four.
        lanes: of `codebook_lanes`. All lanes of a warp must take part.
        quant_type: of the codes.
        layout: of `packed`, and of the results.
        interpret: whether the kernel runs in Pallas's interpreter.

    Returns:
        `(high, low)`, float32 of the shape of `packed`.
    """
    if interpret:
        codes = packed.astype(jnp.int32)
        return decode(codes >> 4, quant_type), decode(codes & 15, quant_type)
    result = plgpu.ShapeDtypeStruct(packed.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, LANES), return_type=(result, result))
    def gather(_, packed, lanes):
        [entry] = words(lanes.registers.item())
        return tuple(map_registers(functools.partial(_shuffled, entry, n), packed) for n in (4, 0))

    return gather(packed, lanes)


def look_up(
    table_gmem: Float32[Array, " entries"],
    index: Int32[Array, " n"],
    *,
    layout: plgpu.Layout,
    interpret: bool,
) -> Float32[Array, " n"]:
    """`table_gmem[index]`, a read by each thread.

    Args:
        table_gmem: a reference to global memory.
        index: of one number a thread and register, e.g. in the layout `tile_layout(...).reduce(1)`.
        layout: of `index`, and of the result.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    if interpret:
        return table_gmem[...][index]
    result = plgpu.ShapeDtypeStruct(index.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    def gather(_, table, index):
        f32 = ir.F32Type.get()
        base = mgpu.utils.memref_ptr(table)

        def read(register):
            address = mgpu.utils.getelementptr(base, [extract(register, 0)], f32)
            return pack([llvm.load(f32, address)])

        return map_registers(read, index)

    return gather(table_gmem, index)


def decode_absmax(
    codes: UInt8[Array, " n"],
    first_block: Int32[Array, ""],
    map_gmem: Float32[Array, " 256"],
    nested_gmem: Float32[Array, " nested"],
    offset: Float32[Array, ""],
    *,
    layout: plgpu.Layout,
    interpret: bool,
) -> Float32[Array, " n"]:
    """The scales of `n` successive blocks from the codes of double quantization.

    Args:
        codes: of the blocks.
        first_block: the first one's index, which says where its scale is.
        map_gmem: `formats.DYNAMIC_MAP`.
        nested_gmem: a float32 scale for each 256 blocks.
        offset: of the scales.
        layout: of `codes`, and of the result.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    block = first_block + plgpu.broadcasted_iota(jnp.int32, codes.shape, 0, layout=layout)
    shared = dict(layout=layout, interpret=interpret)
    nested = look_up(nested_gmem, block >> (NESTED_BLOCK_SIZE.bit_length() - 1), **shared)
    factor = look_up(map_gmem, codes.astype(jnp.int32), **shared)
    return rounded("mul", factor, nested, **shared) + offset


def rounded(
    operation: str,
    *operands: Float32[Array, " n"],
    layout: plgpu.Layout,
    interpret: bool,
) -> Float32[Array, " n"]:
    """The product (`"mul"`) of two arrays or the reciprocal (`"rcp"`) of one, to the nearest float.

    That is what XLA computes. For the plain operators, LLVM takes an approximate division and
    ptxas makes an FMA of a product and a later sum; an instruction that names its rounding
    (`mul.rn`) is left alone.

    Args:
        operation: `"mul"` or `"rcp"`.
        operands: of one number a register, e.g. in the layout `tile_layout(...).reduce(1)`.
        layout: of the operands, and of the result.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    if interpret:
        x, *others = operands
        return jax.lax.optimization_barrier(x * others[0] if operation == "mul" else 1.0 / x)
    result = plgpu.ShapeDtypeStruct(operands[0].shape, jnp.float32, layout=layout)
    places = ", ".join(f"${i}" for i in range(len(operands) + 1))
    constraints = ",".join(["=f"] + ["f"] * len(operands))

    @plgpu.inline_mgpu(arg_types=(layout,) * len(operands), return_type=result)
    def compute(_, *operands):
        f32, code = ir.F32Type.get(), f"{operation}.rn.f32 {places};"

        def apply(*registers):
            numbers = [extract(register, 0) for register in registers]
            return pack([llvm.inline_asm(f32, numbers, code, constraints)])

        return map_registers(apply, *operands)

    return compute(*operands)


def _shuffled(entry: ir.Value, shift: int, register: ir.Value) -> ir.Value:
    """The entries that lanes hold for the nibbles at bit `shift` of each byte of a register."""
    values = []
    for word in words(register):
        for bit in range(shift, 32, 8):
            index = arith.shrui(word, constant(bit)) if bit else word
            values.append(arith.bitcast(ir.F32Type.get(), shuffle(entry, index, 16)))
    return pack(values)
