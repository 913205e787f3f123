"""4-bit codes to numbers in plain JAX: the meaning, and what CPU and TPU run.

A look-up by four levels of `where` on the code's bits (a *select tree*) becomes vector blends; a
gather of 16 entries stays scalar on most CPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import CODEBOOKS, plane_size
from pallas_kernels.quantize_4bit.xla import dequantize_absmax


def decode(codes: UInt8[Array, "*n"], quant_type: str) -> Float32[Array, "*n"]:
    """The codebook's values at `codes` (0 to 15)."""
    # Differentiating a scan moves what does not depend on its inputs in front of it: without this
    # zero, `where` would broadcast 16 constants to dense arrays there, and read them in every step.
    zero = (codes.reshape(-1)[0] & 0).astype(jnp.float32)
    values = [jnp.float32(v) + zero for v in CODEBOOKS[quant_type]]
    for level in range(4):
        bit = (codes & (1 << level)) != 0
        pairs = zip(values[0::2], values[1::2], strict=True)
        values = [jnp.where(bit, odd, even) for even, odd in pairs]
    return values[0]


def cast(x: Float32[Array, "*n"], dtype: jnp.dtype) -> Float[Array, "*n"]:
    """`x.astype(dtype)` for finite numbers, rounded to the nearest and ties to even.

    XLA's own conversion to bfloat16 looks for NaN at every element, which on a CPU costs as much as
    the decoding.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def scales(
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
) -> Float32[Array, " blocks"]:
    """absmax in float32, double quantization undone where there is one."""
    if nested_absmax is None:
        return absmax
    return dequantize_absmax(absmax, nested_absmax, offset)


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
) -> Float[Array, ...]:
    """`codebook[codes] * absmax` in float32, cast once to `dtype`, in the tensor's shape."""
    size = 1
    for n in shape:
        size *= n
    half = plane_size(size, block_size) // block_size
    absmax = scales(absmax, nested_absmax, offset)
    absmax = jnp.pad(absmax, (0, 2 * half - absmax.size)).reshape(2, half, 1)
    planes = [
        cast((decode(nibble, quant_type).reshape(half, block_size) * scale).reshape(-1), dtype)
        for nibble, scale in zip((codes >> 4, codes & 15), absmax, strict=True)
    ]
    return jnp.concatenate(planes)[:size].reshape(shape)


def splits_by_rows(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether blocks lie inside rows and the two planes are the upper and the lower rows."""
    return len(shape) == 2 and shape[0] % 2 == 0 and shape[1] % block_size == 0


def dequantize_transposed(
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "in out"]:
    """The transposed matrix; only where `splits_by_rows(shape, block_size)`.

    The bytes are transposed, which is cheap, and decoded in that order: a transpose of the
    decoded matrix would cost more than the decoding.
    """
    rows, columns = shape[0] // 2, shape[1]
    codes = codes.reshape(rows, columns).T
    absmax = scales(absmax, nested_absmax, offset)
    absmax = absmax.reshape(2, rows, columns // block_size).transpose(0, 2, 1)[:, :, None, :]
    planes = [
        cast(decode(nibble, quant_type).reshape(-1, block_size, rows) * scale, dtype).reshape(
            columns, rows
        )
        for nibble, scale in zip((codes >> 4, codes & 15), absmax, strict=True)
    ]
    return jnp.concatenate(planes, axis=1)
