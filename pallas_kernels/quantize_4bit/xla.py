"""Block quantization to 4 bits in plain JAX: the meaning, and what CPU and TPU run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.formats import (
    DYNAMIC_CODES,
    DYNAMIC_MAP,
    NESTED_BLOCK_SIZE,
    decision_bounds,
    num_blocks,
    plane_size,
)

# XLA on CPU treats subnormal floats as zero: below this, a block counts as one of zeros.
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
# The least absmax that bitsandbytes stores for a short last block.
_LEAST_LAST = 1e-38


def _bits(x: Float32[Array, "*n"]) -> Int32[Array, "*n"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _reciprocal(absmax: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    return jnp.where(absmax >= _SMALLEST_NORMAL, 1.0 / absmax, 0.0)


def _absmax(blocks: Float32[Array, "n b"]) -> Float32[Array, " n"]:
    # As integers, so that a subnormal maximum survives. The order of non-negative floats is that
    # of their bits, and NaN is above all, so it shows up in the result.
    bits = (_bits(blocks) & 0x7FFFFFFF).max(axis=-1)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def quantize(
    x: Float[Array, ...], *, quant_type: str, block_size: int
) -> tuple[UInt8[Array, " plane"], Float32[Array, " blocks"]]:
    """Codes in planar order and absmax of `x`, flattened row-major; see `api.quantize_4bit`."""
    flat = x.reshape(-1).astype(jnp.float32)
    n_blocks = num_blocks(flat.size, block_size)
    flat = jnp.pad(flat, (0, 2 * plane_size(x.size, block_size) - flat.size))
    blocks = flat.reshape(-1, block_size)
    absmax = _absmax(blocks)
    scaled = blocks * _reciprocal(absmax)[:, None]
    if x.size % block_size:
        # bitsandbytes divides in the short last block and multiplies everywhere else.
        i, last = n_blocks - 1, absmax[n_blocks - 1]
        ratio = jnp.where(last >= _SMALLEST_NORMAL, blocks[i] / last, 0.0)
        scaled = scaled.at[i].set(ratio)
        bits = jnp.maximum(_bits(last), np.float32(_LEAST_LAST).view(np.int32))
        absmax = absmax.at[i].set(jax.lax.bitcast_convert_type(bits, jnp.float32))
    bounds, codes = decision_bounds(quant_type)
    index = sum((scaled > b).astype(jnp.uint8) for b in bounds)
    if quant_type == "fp4":  # the other codebooks ascend: the interval is the code
        index = jnp.asarray(codes)[index]
    high, low = index.reshape(2, -1)
    return high << 4 | low, absmax[:n_blocks]


def _mean(x: Float32[Array, " n"]) -> Float32[Array, ""]:
    # Pairwise: a running float32 sum over a million scales would lose the last digits.
    total = x
    while total.size > 1:
        half = -(-total.size // 2)
        total = total[:half] + jnp.pad(total[half:], (0, 2 * half - total.size))
    return total[0] / x.size


def quantize_absmax(
    absmax: Float32[Array, " blocks"],
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " nested"], Float32[Array, ""]]:
    """8-bit codes, float32 scale per 256, and the offset: the second quantization of absmax."""
    offset = _mean(absmax)
    centred = absmax - offset
    n = num_blocks(centred.size, NESTED_BLOCK_SIZE)
    blocks = jnp.pad(centred, (0, n * NESTED_BLOCK_SIZE - centred.size))
    blocks = blocks.reshape(n, NESTED_BLOCK_SIZE)
    scale = _absmax(blocks)
    unit = jnp.clip(blocks * _reciprocal(scale)[:, None], -1, 1)
    grid = ((unit + 1.0) * 0.5 * 65535.0 + 0.5).astype(jnp.int32)
    codes = jnp.asarray(DYNAMIC_CODES)[grid].reshape(-1)[: absmax.size]
    return codes, scale, offset


def dequantize_absmax(
    codes: UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"],
    offset: Float32[Array, ""],
) -> Float32[Array, " blocks"]:
    """`DYNAMIC_MAP[codes] * nested_absmax[j // 256] + offset` in float32."""
    padded = jnp.pad(codes, (0, nested_absmax.size * NESTED_BLOCK_SIZE - codes.size))
    values = jnp.asarray(DYNAMIC_MAP)[padded].reshape(-1, NESTED_BLOCK_SIZE)
    values = (values * nested_absmax[:, None]).reshape(-1)[: codes.size]
    # The barrier keeps the compiler from fusing product and sum into one rounding, so that the
    # scales are those of bitsandbytes to the bit.
    return jax.lax.optimization_barrier(values) + offset
