"""Normalisation over features: by the root mean square (arXiv 1910.07467), or LayerNorm.

Statistics are in float32. In which order the result is scaled and rounded to 16 bits differs from
family to family; here as transformers does it, so that 16-bit activations agree too.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.config import LlamaConfig


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis.

    The result is rounded to `x`'s dtype before it is scaled. With `plus_one`, as in Gemma, the
    factor is `1 + scale`, and both products are in float32.

    >>> RMSNorm(2, eps=0.0)(jnp.array([3.0, 3.0]))
    Array([1., 1.], dtype=float32)
    """

    def __init__(
        self, features: int, *, eps: float, plus_one: bool = False, param_dtype=jnp.float32
    ):
        self.eps, self.plus_one = eps, plus_one
        start = jnp.zeros if plus_one else jnp.ones
        self.scale = nnx.Param(start((features,), param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises `x`; the dtype stays."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        if self.plus_one:
            return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last axis, rounded once.

    >>> LayerNorm(2, eps=0.0)(jnp.array([3.0, 5.0]))
    Array([-1.,  1.], dtype=float32)
    """

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises `x`; the dtype stays."""
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (v[...].astype(jnp.float32) for v in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


def make_norm(config: LlamaConfig, features: int, *, param_dtype) -> RMSNorm | LayerNorm:
    """The norm that a family uses.

    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
    ...     num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, norm="layer")
    >>> make_norm(config, 8, param_dtype=jnp.float32).bias.shape
    (8,)
    """
    if config.norm == "layer":
        return LayerNorm(features, eps=config.rms_norm_eps, param_dtype=param_dtype)
    plus_one = config.norm == "rms_plus_one"
    return RMSNorm(features, eps=config.rms_norm_eps, plus_one=plus_one, param_dtype=param_dtype)
