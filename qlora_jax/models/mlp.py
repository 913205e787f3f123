"""The part of a layer that treats every token alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.models.config import LlamaConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """The gated MLP, `down(silu(gate(x)) * up(x))`, or without gate `down(act(up(x)))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        linear = functools.partial(
            nnx.Linear, use_bias=config.mlp_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.hidden_act = config.hidden_act
        if config.gated_mlp:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        else:
            self.gate_proj = None
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to every token."""
        activation, up = ACTIVATIONS[self.hidden_act], checkpoint_name(self.up_proj(x), "up_proj")
        # In float32 and rounded once: 16-bit steps in between would cost more than they save.
        if self.gate_proj is None:
            return self.down_proj(activation(up.astype(jnp.float32)).astype(up.dtype))
        gate = checkpoint_name(self.gate_proj(x), "gate_proj")
        product = activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return self.down_proj(product.astype(gate.dtype))
