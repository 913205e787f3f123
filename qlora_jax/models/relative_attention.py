"""T5's attention: a learned bias for the distance between two tokens, and no scaling of the scores.

    scores[t, s] = q[t] . k[s] + bias[bucket(s - t)]

Distances share buckets: each short one has its own, longer ones share them in logarithmic steps,
and from `max_distance` on there is one for all (arXiv 1910.10683, section 2.1). An encoder has
buckets for both directions, a decoder for what lies behind only. Because only distances count, rows
may begin anywhere and hold several sequences, and there is no longest sequence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.t5_config import T5Config


def distance_buckets(num_buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """The bucket of every distance from 0 to `max_distance`, of one direction.

    A table made on the host: a logarithm in float32 may fall on either side of a whole number, and
    devices do not agree on which.

    >>> distance_buckets(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = num_buckets // 2
    distances = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(num_buckets - exact)
    shared = np.minimum(exact + steps.astype(np.int32), num_buckets - 1)
    return np.where(distances < exact, distances, shared).astype(np.int32)


class RelativePositionBias(nnx.Module):
    """The table of one stack, which all of its layers use.

    Attributes:
      embedding: [buckets, heads].
      bidirectional: whether keys may stand behind their queries, as in an encoder.
    """

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs, param_dtype):
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance
        shape = (config.relative_attention_num_buckets, config.num_heads)
        scale = config.d_model**-0.5
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), shape, param_dtype))

    def __call__(self, query_slots: Int[Array, " T"], span: int) -> Float[Array, "1 N T S"]:
        """What is added to the scores of queries in some slots and keys in the slots 0 to `span`.

        Args:
          query_slots: where the queries are.
          span: how many slots keys have.
        """
        buckets = self.embedding.shape[0] // (2 if self.bidirectional else 1)
        ahead = jnp.arange(span) - query_slots[:, None]
        distance = jnp.abs(ahead) if self.bidirectional else jnp.maximum(-ahead, 0)
        table = jnp.asarray(distance_buckets(buckets, self.max_distance))
        bucket = table[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket += jnp.where(ahead > 0, buckets, 0)
        return self.embedding[...][bucket].transpose(2, 0, 1)[None]


def biased_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    bias: Float[Array, "1 N T S"] | None,
    mask: Bool[Array, "#B 1 T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention without a scale; scores and softmax are in float32.

    >>> q = k = v = jnp.ones((1, 2, 1, 4))
    >>> biased_attention(q, k, v, None, jnp.ones((1, 1, 2, 2), bool)).shape
    (1, 2, 1, 4)
    """
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.astype(jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


class T5Attention(nnx.Module):
    """The four projections; keys and values may come from elsewhere than the queries."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype, param_dtype):
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = linear(config.d_model, inner)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries of normalised input."""
        return self._heads(checkpoint_name(self.q(x), "q_proj"))

    def keys_and_values(
        self, x: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Keys and values of normalised input, or of what an encoder made."""
        k = checkpoint_name(self.k(x), "k_proj")
        return self._heads(k), self._heads(checkpoint_name(self.v(x), "v_proj"))

    def output(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output of all heads, projected."""
        return checkpoint_name(self.o(y.reshape(*y.shape[:2], -1)), "o_proj")

    def _heads(self, y: Float[Array, "B T F"]) -> Float[Array, "B T N H"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1)
