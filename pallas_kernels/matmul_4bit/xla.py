"""`x @ W.T` and `g @ W` with a 4-bit `W` in plain JAX: dequantize, then a dense product.

At most one dense weight is alive at a time, and none outlives the product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.dequantize_4bit.xla import dequantize, dequantize_transposed, splits_by_rows


def matmul(
    x: Float[Array, "*b in"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"],
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
) -> Float[Array, "*b out"]:
    """`x @ W.T` in `x.dtype`."""
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape, dtype=x.dtype)

    def plain(x, codes, absmax):
        return jnp.einsum("...i,oi->...o", x, dequantize(codes, absmax, **static))

    def transposed(x, codes, absmax):
        return x @ dequantize_transposed(codes, absmax, **static)

    if x.dtype == jnp.float32 or not splits_by_rows(shape, block_size):
        return plain(x, codes, absmax)
    # XLA on CPU multiplies 16-bit matrices natively only when neither is transposed; otherwise
    # it converts both to float32, which takes twice as long.
    return jax.lax.platform_dependent(x, codes, absmax, cpu=transposed, default=plain)


def matmul_transposed(
    g: Float[Array, "*b out"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"],
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
) -> Float[Array, "*b in"]:
    """`g @ W` in `g.dtype`."""
    w = dequantize(
        codes, absmax, quant_type=quant_type, block_size=block_size, shape=shape, dtype=g.dtype
    )
    return g @ w
