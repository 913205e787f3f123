"""Block quantization to 4 bits in Triton: one launch, read once, codes and absmax written once.

A program takes some blocks of the first half of the tensor and as many of the second, because one
byte of the planar codes holds an element of each. A block's absolute maximum is an integer maximum
over the bits without the sign, so that subnormals survive and NaN shows up. The code of a ratio is
found by halving the codebook's 15 decision bounds: four comparisons instead of fifteen.

Codes and absmax equal those of `xla.py` to the bit: the reciprocal is divided to the nearest, the
product treats subnormals as zeros, and a short last block divides as bitsandbytes does.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import decision_bounds, num_blocks, plane_size
from pallas_kernels.triton_call import jit, launch, resolve_target, tl
from pallas_kernels.triton_decode import multiply


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        elements: of each plane in a program; at least one block.
        num_warps: of a program.
    """

    elements: int = 2048
    num_warps: int = 4


@jit
def _quantize_plane(
    x_ptr,
    absmax_ptr,
    block,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BOUNDS: tl.constexpr,
    FP4_CODES: tl.constexpr,
):
    """Codes, int32 [rows, BLOCK_SIZE], of the blocks `block`; their absmax is stored."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE
    TINY: tl.constexpr = 1.1754943508222875e-38
    position = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(x_ptr + position, mask=position < SIZE, other=0.0).to(tl.float32)
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    reciprocal = tl.where(absmax >= TINY, tl.div_rn(1.0, absmax), 0.0)
    ratio = multiply(x, reciprocal[:, None])
    if SIZE % BLOCK_SIZE != 0:
        last = block == BLOCKS - 1
        divisor = tl.where(last & (absmax >= TINY), absmax, 1.0)[:, None]
        exact = tl.where((absmax >= TINY)[:, None], tl.div_rn(multiply(x, 1.0), divisor), 0.0)
        ratio = tl.where(last[:, None], exact, ratio)
        # The least absmax that bitsandbytes stores for a short block is 1e-38.
        bits = tl.where(last, tl.maximum(bits, 0x006CE3EE), bits)
        absmax = bits.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, mask=block < BLOCKS)
    b3 = ratio > BOUNDS[7]
    b2 = ratio > tl.where(b3, BOUNDS[11], BOUNDS[3])
    low = tl.where(b2, BOUNDS[5], BOUNDS[1])
    high = tl.where(b2, BOUNDS[13], BOUNDS[9])
    b1 = ratio > tl.where(b3, high, low)
    low = tl.where(b2, tl.where(b1, BOUNDS[6], BOUNDS[4]), tl.where(b1, BOUNDS[2], BOUNDS[0]))
    high = tl.where(b2, tl.where(b1, BOUNDS[14], BOUNDS[12]), tl.where(b1, BOUNDS[10], BOUNDS[8]))
    b0 = ratio > tl.where(b3, high, low)
    code = tl.where(b3, 8, 0) + tl.where(b2, 4, 0) + tl.where(b1, 2, 0) + tl.where(b0, 1, 0)
    if FP4_CODES is not None:
        # Sixteen nibbles in two words: the code of each interval.
        word = tl.where(b3, FP4_CODES[1], FP4_CODES[0]).to(tl.uint32)
        code = ((word >> ((code & 7) * 4).to(tl.uint32)) & 15).to(tl.int32)
    return code


@jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    SIZE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BOUNDS: tl.constexpr,
    FP4_CODES: tl.constexpr,
):
    HALF: tl.constexpr = PLANE // BLOCK_SIZE
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = _quantize_plane(x_ptr, absmax_ptr, block, SIZE, BLOCK_SIZE, BOUNDS, FP4_CODES)
    second = _quantize_plane(x_ptr, absmax_ptr, block + HALF, SIZE, BLOCK_SIZE, BOUNDS, FP4_CODES)
    position = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    codes = (first << 4 | second).to(tl.uint8)
    tl.store(codes_ptr + position, codes, mask=(block < HALF)[:, None])


def quantize(
    x: Float[Array, ...],
    *,
    quant_type: str,
    block_size: int,
    tiles: Tiles | None = None,
    interpret: bool = False,
    compute_capability: int | None = None,
) -> tuple[UInt8[Array, " plane"], Float32[Array, " blocks"]]:
    """Codes in planar order and absmax of `x`, flattened row-major; see `api.quantize_4bit`.

    Args:
        x: float32, float16 or (not on sm_75) bfloat16.
        quant_type: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: elements that share one scale.
        tiles: how the work is cut.
        interpret: run in NumPy, without a GPU.
        compute_capability: 75, 80, ...; by default the current target's.

    Raises:
        NotImplementedError: no Triton, or a dtype or device that it does not serve.
    """
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype=} is not served: float32, float16 or bfloat16")
    target = resolve_target(compute_capability, interpret, [x.dtype])
    if x.size == 0:
        raise NotImplementedError(f"{x.shape=} has no elements")
    tiles = tiles or Tiles()
    plane = plane_size(x.size, block_size)
    rows = max(1, tiles.elements // block_size)
    bounds, codes = decision_bounds(quant_type)
    words = (codes.astype(np.uint64) << (4 * np.arange(16, dtype=np.uint64) % 32)).reshape(2, 8)
    fp4_codes = tuple(int(w) for w in words.sum(axis=1)) if quant_type == "fp4" else None
    return launch(
        _quantize_kernel,
        (x.reshape(-1),),
        [
            jax.ShapeDtypeStruct((plane,), jnp.uint8),
            jax.ShapeDtypeStruct((num_blocks(x.size, block_size),), jnp.float32),
        ],
        grid=(-(-plane // (block_size * rows)),),
        compute_capability=target,
        interpret=interpret,
        num_warps=tiles.num_warps,
        SIZE=x.size,
        PLANE=plane,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        BOUNDS=tuple(float(b) for b in bounds),
        FP4_CODES=fp4_codes,
    )
