"""What inline code of a Pallas Mosaic GPU kernel needs: layouts, registers, shuffles.

A *layout* says which thread of a warpgroup (128) holds which elements of an array: a thread has an
array of registers, each a vector of neighbouring elements. `tile_layout` puts neighbouring elements
into one thread and neighbouring threads side by side, so that global memory is read and written
in whole 32-byte sectors. Functions that take `ir.Value`s run inside `plgpu.inline_mgpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, Shaped

WARP, WARPS = 32, 4
WARPGROUP = WARP * WARPS
# One number a thread.
LANES = plgpu.Layout.WG_STRIDED((WARPGROUP,), 1)


@functools.cache
def tile_layout(columns: int, vector: int) -> plgpu.Layout:
    """Rows of `columns` elements, `vector` neighbours in a thread, threads in row-major order.

    Args:
        columns: elements a row, a power of two from `vector` on.
        vector: elements that a thread reads and writes at once.

    Returns:
        A layout for arrays [rows, columns] of a multiple of `128 * vector` elements; its
        `.reduce(1)` is that of one number a row, which all threads of the row have.
    """
    lanes = min(WARP, columns // vector)
    warps = min(WARPS, columns // (lanes * vector))
    tiling = plgpu.Tiling(
        (
            (WARPS // warps * (WARP // lanes), warps * lanes * vector),
            (WARP // lanes, lanes * vector),
            (1, vector),
        )
    )
    layout = mgpu.TiledLayout(tiling, (-6, -5), (-4, -3), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def store_rows(
    ref: Any, value: Shaped[Array, " rows"], *, layout: plgpu.Layout, interpret: bool
) -> None:
    """Writes one number a row, of which each thread of the row has a copy.

    Args:
        ref: [rows] in global memory.
        value: in the layout `tile_layout(...).reduce(1)`.
        layout: of `value`.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    if interpret:
        ref[...] = value
        return

    # A plain assignment refuses what are no full vectors.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, value):
        value.store_untiled(ref, optimized=False)

    store(ref, value)


def constant(value: int) -> ir.Value:
    """32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, int(np.uint32(value).view(np.int32))))


def extract(register: ir.Value, i: int) -> ir.Value:
    """Element `i` of a vector."""
    position = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(register, dynamic_position=[], static_position=position)


def words(register: ir.Value) -> list[ir.Value]:
    """A vector's bits, 32 at a time."""
    n = mgpu.bitwidth(register.type) // 32
    words = ir.VectorType.get((n,), ir.IntegerType.get_signless(32))
    bits = vector.bitcast(words, register)
    return [extract(bits, i) for i in range(n)]


def pack(elements: Sequence[ir.Value]) -> ir.Value:
    """The vector of `elements`."""
    result = llvm.mlir_undef(ir.VectorType.get((len(elements),), elements[0].type))
    for i, element in enumerate(elements):
        position = ir.DenseI64ArrayAttr.get([i])
        result = vector.insert(element, result, dynamic_position=[], static_position=position)
    return result


def map_registers(
    f: Callable[..., ir.Value], *arrays: mgpu.FragmentedArray, is_signed: bool | None = None
) -> mgpu.FragmentedArray:
    """An array of the first one's layout whose registers are `f` of those of `arrays`."""
    registers = np.empty_like(arrays[0].registers)
    for index, register in np.ndenumerate(arrays[0].registers):
        registers[index] = f(register, *(array.registers[index] for array in arrays[1:]))
    return mgpu.FragmentedArray(
        _registers=registers, _layout=arrays[0].layout, _is_signed=is_signed
    )


def shuffle(entry: ir.Value, index: ir.Value, segment: int = WARP) -> ir.Value:
    """The word `entry` of another lane: `index % segment` of the own segment of the warp.

    The instruction reads no higher bits of the index. All lanes of the warp must take part.
    """
    control = constant((WARP - segment) << 8 | WARP - 1)
    return nvvm.shfl_sync(constant(0xFFFFFFFF), entry, index, control, nvvm.ShflKind.idx)
