"""One layer of a T5: attention, in a decoder cross-attention, and an MLP, each behind a norm.

float16: activations of these models leave its range (up to 65,504) where the MLP's output is
computed and in the residual stream. As in transformers, `wo` then works in float32, which makes the
residual stream float32, and what a 16-bit layer adds to it is clamped. bfloat16, in which they were
trained, has the range.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.mlp import ACTIVATIONS
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.relative_attention import T5Attention, biased_attention
from qlora_jax.models.t5_config import T5Config

KeysAndValues = tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]


class T5MLP(nnx.Module):
    """`wo(act(wi_0(x)) * wi_1(x))`, or without a gate `wo(act(wi(x)))`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype, param_dtype):
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.activation, self.is_gated = config.activation, config.is_gated_act
        if config.is_gated_act:
            self.wi_0 = linear(config.d_model, config.d_ff, dtype=dtype)
            self.wi_1 = linear(config.d_model, config.d_ff, dtype=dtype)
        else:
            self.wi = linear(config.d_model, config.d_ff, dtype=dtype)
        self.wo_dtype = residual_dtype(dtype)
        self.wo = linear(config.d_ff, config.d_model, dtype=self.wo_dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to every token."""
        first = checkpoint_name((self.wi_0 if self.is_gated else self.wi)(x), "gate_proj")
        # In float32 and rounded once, as in `mlp.MLP`.
        product = ACTIVATIONS[self.activation](first.astype(jnp.float32))
        if self.is_gated:
            product *= checkpoint_name(self.wi_1(x), "up_proj").astype(jnp.float32)
        return self.wo(product.astype(self.wo_dtype))


def residual_dtype(dtype) -> jnp.dtype:
    """The dtype of the residual stream; see the module.

    >>> residual_dtype(jnp.float16), residual_dtype(jnp.bfloat16)
    (dtype('float32'), dtype(bfloat16))
    """
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def add_residual(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`x + y`, where infinities of a float16 `y` are its largest number.

    >>> add_residual(jnp.ones(1), jnp.full(1, jnp.inf, jnp.float16)).tolist()
    [65505.0]
    """
    if y.dtype == jnp.float16:
        largest = jnp.finfo(y.dtype).max
        y = jnp.clip(y, -largest, largest)
    return x + y.astype(x.dtype)


class T5Layer(nnx.Module):
    """A layer of the encoder, or of the decoder, which also has cross-attention."""

    def __init__(self, config: T5Config, *, is_decoder: bool, rngs: nnx.Rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        def norm() -> RMSNorm:
            return RMSNorm(config.d_model, eps=config.layer_norm_epsilon, param_dtype=param_dtype)

        self.self_attn_norm, self.self_attn = norm(), T5Attention(config, **kwargs)
        if is_decoder:
            self.cross_attn_norm, self.cross_attn = norm(), T5Attention(config, **kwargs)
        self.mlp_norm, self.mlp = norm(), T5MLP(config, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "1 N T S"],
        mask: Bool[Array, "B 1 T S"],
        cross: tuple[KeysAndValues, Bool[Array, "B 1 T S"]] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """One layer.

        Args:
          x: the residual stream.
          bias: of the positions, for the layer's own attention.
          mask: who sees whom in it.
          cross: keys and values of the source, and who sees what of it; of a decoder.
          cache: keys and values of earlier tokens, or None.
          layer: this layer's index in the cache.

        Returns:
          The residual stream, and the cache with this layer's new keys and values.
        """
        normed = self.self_attn_norm(x)
        k, v = self.self_attn.keys_and_values(normed)
        if cache is not None:
            cache = cache.append(layer, k, v)
            k, v = cache.layer(layer, k.dtype)
        y = biased_attention(self.self_attn.queries(normed), k, v, bias, mask)
        x = add_residual(x, self.self_attn.output(y))
        if cross is not None:
            (k, v), mask = cross
            q = self.cross_attn.queries(self.cross_attn_norm(x))
            y = biased_attention(q, k, v, None, mask)
            x = add_residual(x, self.cross_attn.output(y))
        return add_residual(x, self.mlp(self.mlp_norm(x))), cache
