"""The Llama decoder and its relatives, as one plain Flax NNX model.

    x = embed(tokens)
    for each layer:  x += attention(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

What other families change in these three lines is in the config: Gemma scales the embedding, has
norms behind attention and MLP too, and caps logits; OPT and GPT-NeoX have LayerNorms and an MLP
without gate; OPT adds learned positions instead of rotating; GPT-NeoX computes attention and MLP of
a layer from the same input.

The layers are one module whose variables carry a leading layer axis, and `jax.lax.scan` walks over
it: program size and compile time do not grow with depth. The scan splits the module into its graph
and its state and puts it together again inside, so it does not matter what the linear layers are:
whatever is callable on [..., in] and keeps its arrays under a leading layer axis can take the place
of an `nnx.Linear`. State is read-only inside the scan; whatever a layer writes into its own
variables there is dropped.

With `sequence_chunk` a layer is computed as `models.long_rows` does: for rows so long that a few
arrays of their size fill the memory.

Paths mirror Hugging Face's names: `layers.self_attn.q_proj.kernel` is
`model.layers.{0..L-1}.self_attn.q_proj.weight`, transposed and stacked.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import ConfigError
from qlora_jax.models.attention import Attention, attention_mask
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.long_rows import layer_in_chunks
from qlora_jax.models.mlp import MLP
from qlora_jax.models.norm import make_norm
from qlora_jax.models.remat import check_remat, rematerialize
from qlora_jax.models.rope import inverse_frequencies, rope_tables
from qlora_jax.models.unscanned import split_layers


@jax.custom_vjp
def vocabulary_product(
    hidden: Float[Array, "*B D"], kernel: Float[Array, "D V"]
) -> Float[Array, "*B V"]:
    """`hidden @ kernel` in float32, of factors in `hidden.dtype`, in both directions.

    Left to itself, JAX would multiply the float32 gradient of the logits with the kernel in
    float32: for 16-bit models several times slower, and with a copy of the kernel in float32.

    >>> vocabulary_product(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 3))).dtype
    dtype('float32')
    """
    kernel = kernel.astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def _vocabulary_product_forward(hidden, kernel):
    return vocabulary_product(hidden, kernel), (hidden, kernel)


def _vocabulary_product_backward(residuals, g):
    hidden, kernel = residuals
    g = g.astype(hidden.dtype)
    d_hidden = jnp.einsum("...v,dv->...d", g, kernel.astype(hidden.dtype))
    d_kernel = jnp.einsum("...d,...v->dv", hidden, g, preferred_element_type=jnp.float32)
    # A tied embedding transposes this. XLA would take that into the product, which it then cannot
    # compute on a CPU (bfloat16 factors, a float32 result).
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    return d_hidden, d_kernel.astype(kernel.dtype)


vocabulary_product.defvjp(_vocabulary_product_forward, _vocabulary_product_backward)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.input_layernorm = make_norm(config, config.hidden_size, param_dtype=param_dtype)
        self.self_attn = Attention(config, **kwargs)
        # Before the MLP, but with `post_norms` behind the attention, as Hugging Face calls them.
        self.post_attention_layernorm = make_norm(
            config, config.hidden_size, param_dtype=param_dtype
        )
        if config.post_norms:
            self.pre_feedforward_layernorm = make_norm(
                config, config.hidden_size, param_dtype=param_dtype
            )
            self.post_feedforward_layernorm = make_norm(
                config, config.hidden_size, param_dtype=param_dtype
            )
        self.mlp = MLP(config, **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], *attention_args
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """One layer; `attention_args` go to `Attention` behind the normalised input."""
        y, cache = self.self_attn(self.input_layernorm(x), *attention_args)
        return self.finish(x, y), cache

    def finish(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, of its input and the attention's output `y`."""
        if self.config.parallel_residual:
            return x + y + self.mlp(self.post_attention_layernorm(x))
        if self.config.post_norms:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """A decoder-only language model of one of the families in `config.SUPPORTED`.

    Args:
      config: the model's shape.
      rngs: stream "params" for the random initial weights. For a model without memory, wrap the
        call in `nnx.eval_shape`.
      dtype: dtype of the computation and of the cache. Norm statistics, rotations, softmax and
        logits are in float32 whatever it is.
      param_dtype: dtype of the initial weights.
      remat: what is stored for the backward pass: "none" (everything; no recomputation) or a key of
        `remat.REMAT_POLICIES`.
      sequence_chunk: 0, or the number of tokens that long rows are computed for at a time; see
        `long_rows`. Nothing inside a layer is then stored: "projections" and "dots" mean "full".

    >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, head_dim=4,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model.layers.self_attn.q_proj.kernel.shape
    (2, 8, 8)
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 16)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "full",
        sequence_chunk: int = 0,
    ):
        check_remat(remat)
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.sequence_chunk = sequence_chunk
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if config.position_offset is not None:
            rows = config.max_position_embeddings + config.position_offset
            self.embed_positions = nnx.Embed(
                rows, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        self.layers = stacked_layers(rngs)
        self.norm = make_norm(config, config.hidden_size, param_dtype=param_dtype)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], KVCache]:
        """Next-token logits.

        Args:
          tokens: token ids.
          positions: position of each token in its own sequence; counted along the row when left
            out.
          segment_ids: tokens see only tokens with the same id; 0 is padding. One segment a row when
            left out.
          cache: what came before. There must be room for T more tokens (under `jit` this cannot be
            checked).

        Returns:
          float32 logits; with a cache, the pair of logits and the cache with the new tokens in it.
        """
        if cache is None:
            return self.head(
                self.hidden_states(tokens, positions=positions, segment_ids=segment_ids)
            )
        hidden, cache = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        return self.head(hidden), cache

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache]:
        """The normalised output of the last layer; arguments and cache as in `__call__`.

        With `head` applied to a piece of it at a time, the logits of a whole batch need never
        exist.
        """
        if cache is None:
            self._check_length(tokens.shape[1])
            x = self.embed(tokens, positions)
            return self.norm(self.layer_outputs(x, positions=positions, segment_ids=segment_ids))
        slots = cache.slots(tokens.shape[1])
        if positions is None:
            positions = jnp.broadcast_to(slots, tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        cache = cache.append_segments(segment_ids)
        x = self.embed(tokens, positions)
        x, cache = self._scan_layers(x, slots, positions, segment_ids, cache)
        return self.norm(x), cache.advance(tokens.shape[1])

    def layer_outputs(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the layers make of `x`, of `embed` or of other layers; the rest as in `__call__`."""
        slots = jnp.arange(x.shape[1])
        if positions is None:
            positions = jnp.broadcast_to(slots, x.shape[:2])
        return self._scan_layers(x, slots, positions, segment_ids, None)[0]

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What goes into the first layer; arguments as in `__call__`."""
        x = self.embed_tokens(tokens)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        if self.config.position_offset is not None:
            if positions is None:
                positions = jnp.arange(tokens.shape[1])[None]
            x = x + self.embed_positions(positions + self.config.position_offset)
        return x

    def _check_length(self, length: int) -> None:
        """There is no row for a learned position that was never trained."""
        limit = self.config.max_position_embeddings
        if self.config.position_offset is not None and length > limit:
            raise ConfigError(
                f"rows of {length} tokens are too long for this model: it has learned positions, "
                f"and those of {limit} tokens only. Lower data.max_len."
            )

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of final-normed hidden states."""
        logits, cap = self._logits(hidden), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        if self.lm_head is None:
            if type(self.embed_tokens) is not nnx.Embed:
                return self.embed_tokens.attend(hidden).astype(jnp.float32)
            return vocabulary_product(hidden, self.embed_tokens.embedding[...].T)
        if type(self.lm_head) is nnx.Linear:
            return vocabulary_product(hidden, self.lm_head.kernel[...])
        return self.lm_head(hidden).astype(jnp.float32)

    def init_cache(
        self, batch_size: int, max_len: int, *, ragged: bool = False, dtype=None
    ) -> KVCache:
        """An empty cache with room for `max_len` tokens a row.

        Args:
          batch_size: rows.
          max_len: slots a row.
          ragged: whether each row has a length of its own; see `KVCache`.
          dtype: of keys and values: None (the model's), or `jnp.int8`.
        """
        heads = (self.config.num_key_value_heads, self.config.head_dim)
        shape = (self.config.num_hidden_layers, batch_size, max_len, *heads)
        return KVCache.empty(shape, dtype or self.dtype, ragged=ragged)

    def _scan_layers(self, x, slots, positions, segment_ids, cache):
        config = self.config
        in_chunks = cache is None and 0 < self.sequence_chunk < positions.size
        # How far back a layer sees; an array, and its masks in the scan, where layers differ.
        differ = bool(config.full_attention_layers)
        indices = jnp.arange(config.num_hidden_layers)
        is_full = jnp.isin(indices, jnp.array(config.full_attention_layers, jnp.int32))
        key_segments = segment_ids if cache is None else cache.visible_segments
        shared = 0 if cache is None else cache.shared

        def mask_of(window: Int[Array, ""] | int | None) -> Bool[Array, "B 1 T S"] | None:
            if segment_ids is None:  # nothing but causal: `attend` knows that
                return None
            return attention_mask(slots, segment_ids, key_segments, window, shared=shared)

        mask = None if differ else mask_of(config.sliding_window)
        ropes = self._ropes(positions, in_chunks)
        graphdef, state, whole_state = split_layers(self.layers)

        def body(carry, scanned):
            x, cache = carry
            state, layer, is_full = scanned
            state = whole_state(state, layer)
            x = checkpoint_name(x, "layer_input")
            seen, window = mask, config.sliding_window
            if differ:
                window = jnp.where(is_full, jnp.iinfo(jnp.int32).max, window)
                seen = mask_of(window)
            rope = ropes[0]
            if len(ropes) > 1:
                rope = jax.tree.map(lambda full, local: jnp.where(is_full, full, local), *ropes)
            if in_chunks:
                layer_args = (config, x, positions, rope, seen, window, self.sequence_chunk)
                return (layer_in_chunks(graphdef, state, *layer_args), None), None
            return nnx.merge(graphdef, state)(x, rope, seen, window, cache, layer), None

        if cache is None:
            recomputes_all = in_chunks and self.remat not in ("none", "offload")
            body = rematerialize(body, "full" if recomputes_all else self.remat)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (state, indices, is_full))
        return x, cache

    def _ropes(self, positions: Int[Array, "B T"], in_chunks: bool) -> list:
        """The rotations of layers with full attention and, where theirs differ, with a window.

        Tables of cosines and sines; for chunks, which compute these where they need them, the
        frequencies; None where nothing is rotated.
        """
        config, tables = self.config, []
        if config.rotary_dim == 0:
            return [None]
        size = config.rotary_dim or config.head_dim
        frequencies = [inverse_frequencies(size, config.rope_theta, config.rope_scaling)]
        if config.rope_local_base_freq is not None:
            frequencies.append(inverse_frequencies(size, config.rope_local_base_freq))
        for one in frequencies:
            tables.append(jnp.asarray(one) if in_chunks else rope_tables(positions, one))
        return tables
