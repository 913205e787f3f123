"""4-bit codes to a dense array in Triton: one launch, double quantization included.

The kernel is bound by memory: it reads half a byte a weight and writes two or four. A program takes
a run of bytes, cut into segments that lie inside one block, and writes two runs of the result, one
for each plane. A thread owns as many neighbouring bytes as fill a 16-byte store of the result.

The value is `codebook[code] * absmax` in float32, rounded once, to the bit what `xla.py` gives:
the codebook is looked up in float32 (`triton_decode`), and the scale's product and sum are rounded
separately.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import DYNAMIC_MAP, plane_size
from pallas_kernels.triton_call import jit, launch, resolve_target, tl
from pallas_kernels.triton_decode import (
    decode_32,
    decode_asm,
    load_nested,
    load_scales,
    multiply,
)
from pallas_kernels.tuning import measured_tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        bytes_per_thread: neighbouring bytes that a thread decodes at a time.
        tiles: such steps in one program.
        num_warps: of a program.
    """

    bytes_per_thread: int = 8
    tiles: int = 4
    num_warps: int = 4

    def __post_init__(self):
        if self.bytes_per_thread not in (4, 8, 16):
            raise ValueError(f"{self.bytes_per_thread=} must be 4, 8 or 16")


@jit
def _dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    ASM: tl.constexpr,
):
    SEGMENTS: tl.constexpr = PLANE // SEGMENT
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // SEGMENT
    HALF: tl.constexpr = PLANE // BLOCK_SIZE
    BLOCKS: tl.constexpr = (SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE
    column = tl.arange(0, SEGMENT)[None, :]
    offset = tl.load(offset_ptr)
    for tile in tl.static_range(TILES):
        segment = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        position = segment.to(tl.int64)[:, None] * SEGMENT + column
        # What lies outside reads the last segment, which costs no mask; it is not stored.
        inside = (segment < SEGMENTS)[:, None]
        segment = tl.minimum(segment, SEGMENTS - 1)
        codes = tl.load(codes_ptr + segment.to(tl.int64)[:, None] * SEGMENT + column)
        first, second = decode_32(codes, ASM)
        block = segment // PER_BLOCK
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        first = multiply(first, scale[:, None]).to(out_ptr.dtype.element_ty)
        if SIZE >= PLANE:
            tl.store(out_ptr + position, first, mask=inside)
        else:  # a single block, and a short one
            tl.store(out_ptr + position, first, mask=position < SIZE)
        block = tl.minimum(block + HALF, BLOCKS - 1)
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        second = multiply(second, scale[:, None]).to(out_ptr.dtype.element_ty)
        if SIZE == 2 * PLANE:
            tl.store(out_ptr + PLANE + position, second, mask=inside)
        else:
            tl.store(out_ptr + PLANE + position, second, mask=inside & (position + PLANE < SIZE))


def dequantize(
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    tiles: Tiles | None = None,
    interpret: bool = False,
    compute_capability: int | None = None,
) -> Float[Array, ...]:
    """The dense array of `shape` and `dtype`; see `api.dequantize_4bit`.

    Args:
        codes: uint8, planar.
        absmax: float32, or the uint8 codes of double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: of the result.
        dtype: float32, float16 or (not on sm_75) bfloat16.
        tiles: how the work is cut; by default from `dtype`.
        interpret: run in NumPy, without a GPU.
        compute_capability: 75, 80, ...; by default the current target's.

    Raises:
        NotImplementedError: no Triton, or a dtype or device that it does not serve.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"{dtype=} is not served: float32, float16 or bfloat16")
    target = resolve_target(compute_capability, interpret, [dtype])
    size = math.prod(shape)
    if size == 0:
        raise NotImplementedError(f"{shape=} has no elements")
    tiles = tiles or measured_tiles(Tiles, "dequantize", "triton", shape)
    tiles = tiles or Tiles(bytes_per_thread=16 // dtype.itemsize)
    plane = plane_size(size, block_size)
    segment = min(block_size, 64)
    rows = tiles.bytes_per_thread * 32 * tiles.num_warps // segment
    scales = (absmax, absmax, absmax)
    if nested_absmax is not None:
        scales = (jnp.asarray(DYNAMIC_MAP), nested_absmax, offset)
    (out,) = launch(
        _dequantize_kernel,
        (codes, absmax, *scales),
        [jax.ShapeDtypeStruct(shape, dtype)],
        grid=(-(-plane // (segment * rows * tiles.tiles)),),
        compute_capability=target,
        interpret=interpret,
        num_warps=tiles.num_warps,
        SIZE=size,
        PLANE=plane,
        BLOCK_SIZE=block_size,
        SEGMENT=segment,
        ROWS=rows,
        TILES=tiles.tiles,
        DOUBLE_QUANT=nested_absmax is not None,
        ASM=decode_asm(quant_type, "float32"),
    )
    return out
