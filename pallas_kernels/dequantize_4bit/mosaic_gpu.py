"""4-bit codes to numbers on NVIDIA GPUs from sm_80: one launch, double quantization included.

Every byte that is read gives two elements, half a tensor apart: that of its high nibble and that
of its low one. A program takes `tile_bytes` neighbouring bytes, whole blocks, and writes as many
elements in each plane:

    bytes [blocks, block_size]  ->  out[0, the same rows], out[1, the same rows]

A thread reads as many neighbouring bytes as elements of the output make 16 bytes, so that both
planes are written in full vectors, 512 successive bytes a warp. All reads of a thread are
independent and under way before the first is used. Four fifths of the traffic are writes, which
wait for nobody, and the programs resident on an SM of an H100 (ten of 2 KiB, at 48 registers a
thread) read 20 KiB at once, several times latency times bandwidth: a pipeline through shared
memory would add copies and hide nothing.

The last program starts early, so that it, too, has a whole tile: some elements are written twice,
with the same values. A tensor with an odd number of blocks or a short last one is written with its
padding, which XLA then cuts off in a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import DYNAMIC_MAP
from pallas_kernels.mosaic_decode import (
    codebook_lanes,
    decode_absmax,
    decode_bytes,
)
from pallas_kernels.mosaic_registers import tile_layout
from pallas_kernels.tuning import measured_tiles

_VECTOR_BYTES = 16
# 128 threads read at most 8 bytes each at once.
LEAST_TILE = 1024


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        tile_bytes: of codes a program: a multiple of 1024 and of the block size.
    """

    tile_bytes: int = 2048

    def __post_init__(self) -> None:
        if self.tile_bytes < LEAST_TILE or self.tile_bytes % LEAST_TILE:
            raise ValueError(f"{self.tile_bytes=} must be a multiple of {LEAST_TILE}")


def default_tiles(plane: int, block_size: int) -> Tiles:
    """Tiles of 2 KiB, or smaller ones where that would leave a GPU empty.

    Twice as much takes 80 registers a thread instead of 48, for 5.0 instructions a weight instead
    of 5.7, and half as much takes 32, for 7.2.

    Args:
        plane: bytes of codes.
        block_size: of the format.

    >>> default_tiles(4096 * 4096 // 2, 64), default_tiles(2048, 64)
    (Tiles(tile_bytes=2048), Tiles(tile_bytes=1024))
    """
    least = max(LEAST_TILE, block_size)
    return Tiles(least if plane < 1024 * 2048 else max(least, 2048))


def dequantize(
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, ...]:
    """The dense array, the same to the bit as from `xla.dequantize`; see `api.dequantize_4bit`.

    Args:
        codes: uint8, planar.
        absmax: float32, or the uint8 codes of double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: of the dense array.
        dtype: bfloat16, float16 or float32.
        tiles: how the work is cut; `default_tiles` without it.
        interpret: run in Pallas's interpreter, on any device.

    Raises:
        NotImplementedError: a block that is no part of a tile, less codes than a tile (2048
            elements suffice for blocks up to 1024), or 2**31 elements and more.
    """
    tiles = tiles or measured_tiles(Tiles, "dequantize", "mosaic_gpu", shape)
    tiles = tiles or default_tiles(codes.size, block_size)
    size, dtype = math.prod(shape), jnp.dtype(dtype)
    if tiles.tile_bytes % block_size:
        raise NotImplementedError(f"{block_size=} with {tiles.tile_bytes=}")
    if codes.size < tiles.tile_bytes or 2 * codes.size >= 2**31:
        raise NotImplementedError(f"{shape=} with {tiles.tile_bytes=}")
    rows = codes.size // block_size
    arrays = [codes.reshape(rows, block_size), jnp.pad(absmax, (0, 2 * rows - absmax.size))]
    if nested_absmax is not None:
        arrays += [nested_absmax, offset.reshape(1), jnp.asarray(DYNAMIC_MAP)]
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            quant_type=quant_type,
            tile_rows=tiles.tile_bytes // block_size,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((2, rows, block_size), dtype),
        grid=(pl.cdiv(codes.size, tiles.tile_bytes),),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(
            # For sm_80 to sm_89 the other semantics emit instructions of sm_90.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Nothing is read that was written here.
            unsafe_no_auto_barriers=True,
        ),
        kernel_name="dequantize_4bit",
        interpret=interpreter(interpret),
    )
    return kernel(*arrays).reshape(-1)[:size].reshape(shape)


def interpreter(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as `interpret`."""
    return plgpu.InterpretGPUParams(uninitialized_memory="nan") if interpret else None


def _kernel(
    codes_gmem: UInt8[Array, "rows block"],
    absmax_gmem: Float32[Array, " 2*rows"] | UInt8[Array, " 2*rows"],
    *refs: Any,
    quant_type: str,
    tile_rows: int,
    interpret: bool,
) -> None:
    *nested_refs, out_gmem = refs
    rows, block_size = codes_gmem.shape
    layout = tile_layout(block_size, _VECTOR_BYTES // out_gmem.dtype.itemsize)
    row_layout = layout.reduce(1)
    first = jnp.minimum(jax.lax.axis_index("tile") * tile_rows, rows - tile_rows)
    tile = pl.ds(first, tile_rows)
    with jax.named_scope("load"):
        packed = plgpu.load(codes_gmem.at[tile], layout=layout, optimized=False)
        starts = (first, rows + first)
        scales = [
            plgpu.load(absmax_gmem.at[pl.ds(s, tile_rows)], layout=row_layout, optimized=False)
            for s in starts
        ]
    if nested_refs:
        with jax.named_scope("decode_absmax"):
            nested_gmem, offset_gmem, map_gmem = nested_refs
            offset = offset_gmem[0]
            scales = [
                decode_absmax(
                    s, start, map_gmem, nested_gmem, offset, layout=row_layout, interpret=interpret
                )
                for s, start in zip(scales, starts, strict=True)
            ]
    with jax.named_scope("decode"):
        lanes = codebook_lanes(quant_type)
        planes = decode_bytes(packed, lanes, quant_type, layout=layout, interpret=interpret)
    for plane, (values, scale) in enumerate(zip(planes, scales, strict=True)):
        with jax.named_scope("scale"):
            spread = jax.lax.broadcast_in_dim(scale, values.shape, (0,))
            values = values * plgpu.layout_cast(spread, layout)
        with jax.named_scope("store"):
            out_gmem[plane, tile] = values.astype(out_gmem.dtype)
