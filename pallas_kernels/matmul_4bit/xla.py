"""`x @ W.T` and `g @ W` with a 4-bit `W` in plain JAX: dequantize, then a dense product.

At most one dense weight is alive at a time, and none outlives the product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.dequantize_4bit.xla import dequantize, dequantize_transposed, splits_by_rows


def add_epilogue(
    y: Float[Array, "m out"],
    bias: Float[Array, " out"] | None,
    lora: tuple[Float[Array, "m r"], Float[Array, "r out"]] | None,
) -> Float[Array, "m out"]:
    """`y + xa @ b + bias`, whichever of them there are, in `y.dtype`."""
    if lora is not None:
        xa, b = lora
        y = y + jnp.matmul(xa, b, preferred_element_type=jnp.float32).astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y


def matmul(
    x: Float[Array, "m in"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
    bias: Float[Array, " out"] | None = None,
    lora: tuple[Float[Array, "m r"], Float[Array, "r out"]] | None = None,
) -> Float[Array, "m out"]:
    """`x @ W.T + xa @ b + bias` in `x.dtype`."""
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape, dtype=x.dtype)

    def plain(x, *packed):
        return jnp.einsum("...i,oi->...o", x, dequantize(*packed, **static))

    def transposed(x, *packed):
        return x @ dequantize_transposed(*packed, **static)

    packed = codes, absmax, nested_absmax, offset
    if x.dtype == jnp.float32 or not splits_by_rows(shape, block_size):
        y = plain(x, *packed)
    else:
        # XLA on CPU multiplies 16-bit matrices natively only when neither is transposed;
        # otherwise it converts both to float32, which takes twice as long.
        y = jax.lax.platform_dependent(x, *packed, cpu=transposed, default=plain)
    return add_epilogue(y, bias, lora)


def matmul_transposed(
    g: Float[Array, "m out"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
) -> Float[Array, "m in"]:
    """`g @ W` in `g.dtype`."""
    dense = functools.partial(
        dequantize, quant_type=quant_type, block_size=block_size, shape=shape, dtype=g.dtype
    )
    return g @ dense(codes, absmax, nested_absmax, offset)
