"""Root-mean-square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis.

    The statistics are in float32 and the result is rounded to `x`'s dtype before it is scaled, in
    the order in which transformers rounds, so that 16-bit activations agree too.

    >>> RMSNorm(2, eps=0.0)(jnp.array([3.0, 3.0]))
    Array([1., 1.], dtype=float32)
    """

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises `x`; the dtype stays."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)
