"""Grouped-query self-attention: rotary positions, packed sequences, sliding windows, a cache.

Who sees whom is one rule everywhere: a query at slot i sees a key at slot j when j <= i, when both
carry the same segment id, and when i - j < window. A slot is the index in the sequence axis (of the
cache, when there is one). With left-padded prompts and one segment per row this is also the
distance in positions, so the same rule serves training on packed rows and batched decoding of
prompts of different lengths.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.devices import current_target
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.kv_cache import EMPTY_SLOT, KVCache
from qlora_jax.models.norm import make_norm
from qlora_jax.models.rope import apply_rope


def attention_mask(
    query_slots: Int[Array, "*B T"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    *,
    shared: int = 0,
) -> Bool[Array, "B 1 T S"]:
    """True where a query may look at a key: not later, of the same segment, within the window.

    The slots of the queries are those of every row, or each row has its own. The first `shared`
    slots are of every segment, as far as they are in use.

    >>> segments = jnp.array([[1, 1, 2]])
    >>> attention_mask(jnp.arange(3), segments, segments)[0, 0].astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 1]], dtype=int32)
    """
    distance = query_slots[..., None] - jnp.arange(key_segments.shape[-1])
    near = distance >= 0
    if window is not None:
        near &= distance < window
    same = query_segments[:, :, None] == key_segments[:, None, :]
    if shared:
        in_use = (jnp.arange(key_segments.shape[-1]) < shared) & (key_segments != EMPTY_SLOT)
        same |= in_use[:, None, :]
    return (near & same)[:, None]


def grouped_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention` for the CPU: the same values, a faster backward pass.

    The query heads that share a key head are laid behind each other as more rows of one matrix
    product, with the batch axes in front, where the CPU's matrix product wants them in forward and
    backward pass alike. Softmax is in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: who sees whom.
      scale: of the scores; None: 1 / sqrt(H).
      softcap: scores become `softcap * tanh(scores / softcap)` before they are masked (Gemma 2,
        arXiv 2408.00118, section 2); None: they stay.

    >>> q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8))
    >>> grouped_attention(q, k, k, jnp.ones((1, 1, 2, 2), bool)).shape
    (1, 2, 4, 8)
    """
    (batch, length, heads, head_dim), (_, span, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * length, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, kv_heads, group, length, span)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, group * length, span)
    y = jnp.einsum("bkts,bksh->bkth", weights, v)
    y = y.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads, head_dim)


def implementation(
    dtype, head_dim: int, query_len: int, key_len: int, softcap: float | None = None
) -> Literal["grouped", "cudnn", "xla"]:
    """Which implementation suits these shapes on the device that is traced for.

    "grouped" is `grouped_attention`; the others are those of `jax.nn.dot_product_attention`, which
    cannot cap scores.

    >>> implementation(jnp.float32, head_dim=64, query_len=256, key_len=256)
    'grouped'
    """
    target = current_target()
    if target.platform == "cpu" or softcap is not None:
        return "grouped"
    # cuDNN's flash attention: 16-bit types, NVIDIA sm_80 or newer, and, with a mask, even lengths.
    fits = (
        dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and query_len % 2 == key_len % 2 == 0
    )
    return "cudnn" if fits and target.platform == "gpu" and target.architecture >= (8, 0) else "xla"


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"] | None,
    window: int | Int[Array, ""] | None = None,
    query_chunk: int = 0,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention by the implementation that suits the device.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: who sees whom; None: the causal mask of one sequence a row, which cuDNN need not read.
      window: where `mask` is None, how far back a query sees; an array where layers differ in it.
      query_chunk: where the implementation holds the scores, those of how many queries at a time,
        and none of them for the backward pass; 0: of all. cuDNN never holds them.
      scale: of the scores; None: 1 / sqrt(H).
      softcap: see `grouped_attention`.

    Returns:
      The weighted values.

    >>> q = k = v = jnp.ones((1, 2, 2, 8))
    >>> attend(q, k, v, mask=None).shape
    (1, 2, 2, 8)
    """
    length, span = q.shape[1], k.shape[1]
    chosen = implementation(q.dtype, q.shape[-1], length, span, softcap)
    if chosen != "cudnn" and 0 < query_chunk < length:
        scores = dict(scale=scale, softcap=softcap)
        return _attend_by_queries(q, k, v, mask, window, query_chunk, scores)
    if mask is None and (chosen == "grouped" or isinstance(window, jax.Array)):
        mask = _causal_mask(jnp.arange(length), span, window)
    if chosen == "grouped":
        return grouped_attention(q, k, v, mask, scale=scale, softcap=softcap)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=mask is None,
        local_window_size=(window - 1, 0) if mask is None and window is not None else None,
        implementation=chosen,
    )


def _causal_mask(
    query_slots: Int[Array, " T"], span: int, window: int | Int[Array, ""] | None
) -> Bool[Array, "1 1 T S"]:
    """`attention_mask` of one segment."""
    ones = jnp.ones((1, query_slots.shape[0])), jnp.ones((1, span))
    return attention_mask(query_slots, *ones, window)


def _attend_by_queries(q, k, v, mask, window, chunk, scores):
    """`attend` for a chunk of queries after the other, so that only their scores exist."""
    (batch, length), dtype = q.shape[:2], k.dtype
    count = -(-length // chunk)
    padding = count * chunk - length

    def cut(array: Array, axis: int) -> Array:
        widths = [(0, padding if i == axis else 0) for i in range(array.ndim)]
        shape = (*array.shape[:axis], count, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, widths).reshape(shape), axis, 0)

    # In float32 outside, so that the gradients of all chunks are added up in float32.
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def some(scanned):
        index, q, mask = scanned
        if mask is None:
            mask = _causal_mask(index * chunk + jnp.arange(chunk), k.shape[1], window)
        return attend(q, k.astype(dtype), v.astype(dtype), mask, **scores)

    xs = jnp.arange(count), cut(q, 1), None if mask is None else cut(mask, 2)
    y = jnp.moveaxis(jax.lax.map(some, xs), 0, 1)
    return y.reshape(batch, count * chunk, *y.shape[3:])[:, :length]


def score_options(config: LlamaConfig) -> dict[str, float | None]:
    """What a family does to the scores, as arguments of `attend`.

    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
    ...     num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    ...     query_pre_attn_scalar=16.0, attn_logit_softcapping=50.0)
    >>> score_options(config)
    {'scale': 0.25, 'softcap': 50.0}
    """
    scalar = config.query_pre_attn_scalar
    return {
        "scale": None if scalar is None else scalar**-0.5,
        "softcap": config.attn_logit_softcapping,
    }


class Attention(nnx.Module):
    """Multi-head attention whose key and value heads may be fewer than its query heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        def linear(features_in: int, features_out: int, use_bias: bool) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        hidden, head_dim = config.hidden_size, config.head_dim
        self.config = config
        self.q_proj = linear(hidden, config.num_attention_heads * head_dim, config.qkv_bias)
        self.k_proj = linear(hidden, config.num_key_value_heads * head_dim, config.qkv_bias)
        self.v_proj = linear(hidden, config.num_key_value_heads * head_dim, config.qkv_bias)
        self.o_proj = linear(config.num_attention_heads * head_dim, hidden, config.o_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, head_dim, param_dtype=param_dtype)
            self.k_norm = make_norm(config, head_dim, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]] | None,
        mask: Bool[Array, "B 1 T S"] | None,
        window: int | Int[Array, ""] | None,
        cache: KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends.

        Args:
          x: normalised input.
          rope: cosines and sines of the positions of `x`; None: nothing is rotated.
          mask: who sees whom; None stands for the causal (and windowed) mask of one unpacked
            sequence a row.
          window: where `mask` is None, how far back a token sees.
          cache: keys and values of earlier tokens, or None.
          layer: this layer's index in the cache.

        Returns:
          The output, and the cache with this layer's new keys and values.
        """
        q, k, v = self.project(x, rope)
        if cache is not None:
            cache = cache.append(layer, k, v)
            k, v = cache.layer(layer, k.dtype)
        return self.output(attend(q, k, v, mask, window, **score_options(self.config))), cache

    def project(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Rotated queries, rotated keys, and values of normalised input."""

        def heads(projection: nnx.Linear, name: str) -> Float[Array, "B T N H"]:
            y = checkpoint_name(projection(x), name)
            return y.reshape(*x.shape[:2], -1, self.config.head_dim)

        q = heads(self.q_proj, "q_proj")
        k = heads(self.k_proj, "k_proj")
        v = heads(self.v_proj, "v_proj")
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:
            return q, k, v
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def output(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output of all heads, projected."""
        return checkpoint_name(self.o_proj(y.reshape(*y.shape[:2], -1)), "o_proj")
