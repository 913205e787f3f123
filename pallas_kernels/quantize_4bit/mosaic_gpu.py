"""Numbers to 4-bit codes and block scales on NVIDIA GPUs from sm_80, in one launch.

A program takes whole blocks of the first half of the tensor and those half a tensor further, whose
codes share bytes: high and low nibbles (see `formats`).

**Scale.** The maximum of the absolute values is taken of their bits, as integers: NaN is above
all, so it shows, and a subnormal survives.

**Code.** The bounds between codes (`formats.decision_bounds`) are a search tree of four levels, one
entry in each lane of a warp: nodes 1, 2-3, 4-7 and 8-15. From node 1 on, `node = 2 * node + 1` if
the value is greater than the node's bound, else `2 * node`; `shfl` fetches the bound from the
node's lane, and the sign of `bound - value` is what a funnel shift appends to the node. The search
ends at `16 + i` where `i` bounds lie below the value, and where the code is not `i` itself, that
lane keeps it. A level takes three instructions; comparing with all 15 bounds would take 30.
Differences of floats never round to the wrong sign, and that of a NaN is positive: NaN is greater
than no bound, as in the XLA implementation.

The reciprocal of the scale and the product with it are rounded as there, so that codes agree to the
bit: `rcp.rn`, for the division of two numbers becomes an approximation here.
GPUs keep subnormal numbers where XLA on CPUs takes them for zero. A block whose scale is subnormal
has codes of zero everywhere; but a subnormal number in another block is rounded here as any other,
and so are all of a block with a scale above 2**126, whose reciprocal is subnormal.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.dequantize_4bit.mosaic_gpu import LEAST_TILE, Tiles, interpreter
from pallas_kernels.formats import decision_bounds, num_blocks, plane_size
from pallas_kernels.mosaic_decode import rounded, select
from pallas_kernels.mosaic_registers import (
    LANES,
    WARPS,
    constant,
    extract,
    map_registers,
    pack,
    shuffle,
    store_rows,
    tile_layout,
    words,
)
from pallas_kernels.tuning import measured_tiles

_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
_VECTOR_BYTES = 16
_LEVELS = 4


@functools.cache
def search_lanes(quant_type: str) -> np.ndarray:
    """The search tree: the bits of bounds at nodes 1 to 15, codes at the leaves 16 to 31.

    >>> search_lanes("nf4").shape, int(search_lanes("nf4")[16 + 5])
    ((32,), 5)
    """
    bounds, codes = decision_bounds(quant_type)
    lanes = np.concatenate([np.zeros(16), codes]).astype(np.int32)
    for level in range(_LEVELS):
        step = 16 >> level
        lanes[1 << level : 2 << level] = bounds[step // 2 - 1 :: step].view(np.int32)
    return lanes


def quantize(
    x: Float[Array, ...],
    *,
    quant_type: str,
    block_size: int,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[UInt8[Array, " plane"], Float32[Array, " blocks"]]:
    """Codes and absmax, the same to the bit as from `xla.quantize`; see `api.quantize_4bit`.

    Args:
        x: bfloat16, float16 or float32 of any shape.
        quant_type: of the format.
        block_size: of the format.
        tiles: how the work is cut; the smallest possible without it.
        interpret: run in Pallas's interpreter, on any device.

    Raises:
        NotImplementedError: a short last block, a block that is no part of a tile, less codes than
            a tile, or 2**31 elements and more.
    """
    plane = plane_size(x.size, block_size)
    # Small tiles: registers for 16 numbers a thread leave room for nine programs an SM.
    tiles = tiles or measured_tiles(Tiles, "quantize", "mosaic_gpu", x.shape)
    tiles = tiles or Tiles(max(LEAST_TILE, block_size))
    if x.size % block_size or tiles.tile_bytes % block_size:
        raise NotImplementedError(f"{x.shape=} in blocks of {block_size}, {tiles.tile_bytes=}")
    if plane < tiles.tile_bytes or 2 * plane >= 2**31:
        raise NotImplementedError(f"{x.shape=} with {tiles.tile_bytes=}")
    rows = plane // block_size
    blocks = jnp.pad(x.reshape(-1), (0, 2 * plane - x.size)).reshape(2, rows, block_size)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            quant_type=quant_type,
            tile_rows=tiles.tile_bytes // block_size,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((rows, block_size), jnp.uint8),
            jax.ShapeDtypeStruct((2 * rows,), jnp.float32),
        ),
        grid=(pl.cdiv(plane, tiles.tile_bytes),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(
            # For sm_80 to sm_89 the other semantics emit instructions of sm_90.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Nothing is read that was written here.
            unsafe_no_auto_barriers=True,
        ),
        kernel_name="quantize_4bit",
        interpret=interpreter(interpret),
    )
    codes, absmax = kernel(blocks, jnp.asarray(np.tile(search_lanes(quant_type), WARPS)))
    return codes.reshape(-1), absmax[: num_blocks(x.size, block_size)]


def _kernel(
    x_gmem: Float[Array, "2 rows block"],
    lanes_gmem: Int32[Array, " 128"],
    codes_gmem: UInt8[Array, "rows block"],
    absmax_gmem: Float32[Array, " 2*rows"],
    *,
    quant_type: str,
    tile_rows: int,
    interpret: bool,
) -> None:
    _, rows, block_size = x_gmem.shape
    layout = tile_layout(block_size, _VECTOR_BYTES // x_gmem.dtype.itemsize)
    first = jnp.minimum(jax.lax.axis_index("tile") * tile_rows, rows - tile_rows)
    tile = pl.ds(first, tile_rows)
    of_rows = dict(layout=layout.reduce(1), interpret=interpret)
    with jax.named_scope("load"):
        lanes = plgpu.load(lanes_gmem, layout=LANES, optimized=False)
        planes = [plgpu.load(x_gmem.at[p, tile], layout=layout, optimized=False) for p in (0, 1)]
    scaled = []
    for plane, x in enumerate(planes):
        x = x.astype(jnp.float32)
        with jax.named_scope("absmax"):
            bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
            absmax = jax.lax.bitcast_convert_type(bits.max(axis=1), jnp.float32)
            target = absmax_gmem.at[pl.ds(plane * rows + first, tile_rows)]
            store_rows(target, absmax, **of_rows)
        with jax.named_scope("scale"):
            inverse = rounded("rcp", absmax, **of_rows)
            inverse = jnp.where(absmax >= _SMALLEST_NORMAL, inverse, 0.0)
            spread = jax.lax.broadcast_in_dim(inverse, x.shape, (0,))
            scaled.append(x * plgpu.layout_cast(spread, layout))
    with jax.named_scope("encode"):
        codes_gmem[tile] = encode(*scaled, lanes, quant_type, layout=layout, interpret=interpret)


def encode(
    high: Float32[Array, "*n"],
    low: Float32[Array, "*n"],
    lanes: Int32[Array, " 128"],
    quant_type: str,
    *,
    layout: plgpu.Layout,
    interpret: bool,
) -> UInt8[Array, "*n"]:
    """Bytes of the codes of scaled values, those of `high` in the high nibbles.

    Args:
        high: values from -1 to 1.
        low: values from -1 to 1.
        lanes: `search_lanes`, one entry a thread.
        quant_type: of the format.
        layout: of `high`, `low` and the result; four neighbours or a multiple in a thread.
        interpret: whether the kernel runs in Pallas's interpreter.
    """
    bounds, codes = decision_bounds(quant_type)
    if interpret:
        index = [sum((x > b).astype(jnp.int32) for b in bounds) for x in (high, low)]
        high, low = (select(i, [jnp.int32(c) for c in codes]) for i in index)
        return (high << 4 | low).astype(jnp.uint8)
    ascending = (codes == np.arange(16)).all()
    result = plgpu.ShapeDtypeStruct(high.shape, jnp.uint8, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout, LANES), return_type=result)
    def search(_, high, low, lanes):
        [entry] = words(lanes.registers.item())
        encode_register = functools.partial(_bytes, entry, ascending)
        return map_registers(encode_register, high, low, is_signed=False)

    return search(high, low, lanes)


def _bytes(entry: ir.Value, ascending: bool, high: ir.Value, low: ir.Value) -> ir.Value:
    """A register of bytes from one of values for each nibble."""
    i8, n = ir.IntegerType.get_signless(8), mgpu.bitwidth(high.type) // 32
    packed = []
    for first in range(0, n, 4):
        word = constant(0)
        for shift in range(0, 32, 4):
            leaf = _leaf(entry, extract(high if shift % 8 else low, first + shift // 8))
            if ascending:
                word = arith.addi(word, arith.shli(leaf, constant(shift)))
            else:
                word = arith.addi(word, arith.shli(shuffle(entry, leaf), constant(shift)))
        if ascending:  # The leaves are 16 + code.
            word = arith.subi(word, constant(0x11111110))
        packed.append(word)
    return vector.bitcast(ir.VectorType.get((n,), i8), pack(packed))


def _leaf(entry: ir.Value, value: ir.Value) -> ir.Value:
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    node = constant(1)
    for _ in range(_LEVELS):
        bound = arith.bitcast(f32, shuffle(entry, node))
        difference = arith.bitcast(i32, arith.subf(bound, value))
        append_sign = "shf.l.wrap.b32 $0, $1, $2, 1;"
        node = llvm.inline_asm(i32, [difference, node], append_sign, "=r,r,r")
    return node
