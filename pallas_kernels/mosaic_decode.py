"""Decoding 4-bit codes and their scales inside a Pallas Mosaic GPU kernel.

**Codes.** A 16-entry table fits into a warp: lane `l` keeps the codebook's entry `l % 16` in one
register, and `shfl.idx` with segments of 16 lanes fetches the entry that a code names. It reads
only the low four bits of the index, so a weight costs one shift (which brings its nibble to the
bottom of the word) and one shuffle: no mask, no shared memory, no bank conflicts. A dequantize
kernel for sm_90 has 4 machine instructions a weight this way, all included; 21 with a tree of
selects, 10 with byte-wise tables (`prmt`), 6 with a conflict-free table in shared memory, and 3.5
with a table of all 256 pairs, whose random bank conflicts occupy the memory pipe for longer.

**Scales.** With double quantization, `absmax = map[code] * nested + offset`. The map's 256 values
are a kernel argument and stay in the L1 cache. Product and sum are rounded separately: an FMA
would give other bits.

A *layout* says which thread holds which element (`jax.experimental.mosaic.gpu`). `tile_layout`
puts neighbouring bytes into one thread and neighbouring threads side by side, so that global
memory is read and written in whole 32-byte sectors.

Pallas's interpreter runs no inline code: there, `interpret=True` takes plain JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, Float32, Int32, UInt8

from pallas_kernels.formats import CODEBOOKS, NESTED_BLOCK_SIZE

WARPGROUP = 128
_WARP, _WARPS = 32, 4
_LANES = plgpu.Layout.WG_STRIDED((WARPGROUP,), 1)
# `c` of `shfl.idx`: the index is clamped to 31 and lanes 0-15 and 16-31 are segments.
_SEGMENTS_OF_16 = 0x101F
_ALL_LANES = 0xFFFFFFFF


@functools.cache
def tile_layout(columns: int, vector: int) -> plgpu.Layout:
    """Rows of `columns` elements, `vector` neighbours in a thread, threads in row-major order.

    Args:
        columns: elements a row, a power of two from `vector` on.
        vector: elements that a thread reads and writes at once.

    Returns:
        A layout for arrays [rows, columns] that are whole multiples of `layout_tile`; its
        `.reduce(1)` is that of one number a row.
    """
    lanes = min(_WARP, columns // vector)
    warps = min(_WARPS, columns // (lanes * vector))
    tiling = plgpu.Tiling(
        (
            (_WARPS // warps * (_WARP // lanes), warps * lanes * vector),
            (_WARP // lanes, lanes * vector),
            (1, vector),
        )
    )
    layout = mgpu.TiledLayout(tiling, (-6, -5), (-4, -3), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def decode(codes: Int32[Array, "*n"], quant_type: str) -> Float32[Array, "*n"]:
    """The codebook's values at `codes` (0 to 15) by four levels of selects on the code's bits.

    Mosaic shifts and compares no 8-bit integers: bytes are to be cast to int32 first.
    """
    values = [jnp.float32(v) for v in CODEBOOKS[quant_type]]
    for level in range(4):
        bit = (codes & (1 << level)) != 0
        pairs = zip(values[0::2], values[1::2], strict=True)
        values = [jnp.where(bit, odd, even) for even, odd in pairs]
    return values[0]


def codebook_lanes(quant_type: str) -> Float32[Array, " 128"]:
    """The codebook eight times, one entry a thread: what `decode_bytes` shuffles.

    Made once in a kernel, outside its loops.
    """
    lane = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=_LANES)
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

    @plgpu.inline_mgpu(arg_types=(layout, _LANES), return_type=(result, result))
    def shuffle(_, packed, lanes):
        [entry] = lanes.registers.flat
        look_up = functools.partial(_shuffled, _word(entry, 0))
        return tuple(
            _map_words(packed, functools.partial(look_up, shift=shift)) for shift in (4, 0)
        )

    return shuffle(packed, lanes)


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
            i = _extract(register, 0)
            return [llvm.load(f32, mgpu.utils.getelementptr(base, [i], f32))]

        return _map_registers(index, read)

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
    return (
        _rounded_product(look_up(map_gmem, codes.astype(jnp.int32), **shared), nested, **shared)
        + offset
    )


def _rounded_product(
    x: Float32[Array, " n"],
    y: Float32[Array, " n"],
    *,
    layout: plgpu.Layout,
    interpret: bool,
) -> Float32[Array, " n"]:
    """`x * y`, which no later sum makes an FMA of; both have one number a register."""
    if interpret:
        return jax.lax.optimization_barrier(x * y)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=result)
    def multiply(_, x, y):
        f32, others = ir.F32Type.get(), iter(y.registers.flat)

        # A barrier of LLVM's is none for ptxas, which fuses all but what names its rounding.
        def product(register):
            factors = [_extract(register, 0), _extract(next(others), 0)]
            return [llvm.inline_asm(f32, factors, "mul.rn.f32 $0, $1, $2;", "=f,f,f")]

        return _map_registers(x, product)

    return multiply(x, y)


def _constant(value: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, int(np.int32(np.uint32(value)))))


def _extract(register: ir.Value, i: int) -> ir.Value:
    position = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(register, dynamic_position=[], static_position=position)


def _word(register: ir.Value, i: int) -> ir.Value:
    """The `i`-th 32 bits of a vector."""
    n = mgpu.bitwidth(register.type) // 32
    words = ir.VectorType.get((n,), ir.IntegerType.get_signless(32))
    return _extract(vector.bitcast(words, register), i)


def _map_registers(
    array: mgpu.FragmentedArray, f: Callable[[ir.Value], Sequence[ir.Value]]
) -> mgpu.FragmentedArray:
    """A float32 array of the same layout from the elements that `f` gives for each register."""
    f32, registers = ir.F32Type.get(), np.empty_like(array.registers)
    for index, register in np.ndenumerate(array.registers):
        elements = f(register)
        result = llvm.mlir_undef(ir.VectorType.get((len(elements),), f32))
        for i, element in enumerate(elements):
            position = ir.DenseI64ArrayAttr.get([i])
            result = vector.insert(element, result, dynamic_position=[], static_position=position)
        registers[index] = result
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def _map_words(
    array: mgpu.FragmentedArray, f: Callable[[ir.Value], Sequence[ir.Value]]
) -> mgpu.FragmentedArray:
    """The same for the words of an array of bytes, four elements each."""

    def words(register: ir.Value) -> list[ir.Value]:
        n = mgpu.bitwidth(register.type) // 32
        return [element for i in range(n) for element in f(_word(register, i))]

    return _map_registers(array, words)


def _shuffled(entry: ir.Value, word: ir.Value, *, shift: int) -> list[ir.Value]:
    """The entries that lanes hold for the nibbles of a word at `shift`, `shift + 8`, ..."""
    values = []
    for bit in range(shift, 32, 8):
        index = arith.shrui(word, _constant(bit)) if bit else word
        value = nvvm.shfl_sync(
            _constant(_ALL_LANES), entry, index, _constant(_SEGMENTS_OF_16), nvvm.ShflKind.idx
        )
        values.append(arith.bitcast(ir.F32Type.get(), value))
    return values
