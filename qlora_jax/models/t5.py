"""T5 (arXiv 1910.10683) and its relatives T5 1.1, FLAN-T5 and mT5, as one plain Flax NNX model.

    encoder, for each layer:  x += attention(norm(x));  x += mlp(norm(x))
    decoder, for each layer:  y += attention(norm(y));  y += cross(norm(y), x);  y += mlp(norm(y))
    logits = head(norm(y))

Source tokens go through the encoder once; the decoder reads the target so far and, in every layer,
the encoder's output. As in `models.llama` the layers of a stack are one module under a scan, and
whatever is callable on [..., in] can take the place of an `nnx.Linear`.

What these models need of float16 is in `models.t5_layer`.

Paths: `encoder.layers.self_attn.q.kernel` is Hugging Face's
`encoder.block.{0..L-1}.layer.0.SelfAttention.q.weight`, transposed and stacked; see
`weights.t5_names`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import ConfigError
from qlora_jax.models.attention import attention_mask
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.llama import vocabulary_product
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.relative_attention import RelativePositionBias
from qlora_jax.models.remat import check_remat, rematerialize
from qlora_jax.models.t5_config import T5Config
from qlora_jax.models.t5_layer import T5Layer, residual_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Cache:
    """What decoding needs of the source and of the target so far; a pytree of fixed shape.

    Attributes:
      target: keys and values of the decoder's own attention.
      cross_keys: [L, B, S, N, H], of the encoder's output.
      cross_values: likewise.
      source_segment_ids: [B, S]; 0 is padding.
    """

    target: KVCache
    cross_keys: Float[Array, "L B S N H"]
    cross_values: Float[Array, "L B S N H"]
    source_segment_ids: Int[Array, "B S"]


class T5Stack(nnx.Module):
    """The encoder or the decoder: layers, the bias of positions that they share, and a norm."""

    def __init__(self, config: T5Config, *, is_decoder: bool, rngs: nnx.Rngs, dtype, param_dtype):
        @nnx.split_rngs(splits=config.num_decoder_layers if is_decoder else config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> T5Layer:
            kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
            return T5Layer(config, is_decoder=is_decoder, **kwargs)

        self.layers = stacked_layers(rngs)
        self.relative_attention_bias = RelativePositionBias(
            config, bidirectional=not is_decoder, rngs=rngs, param_dtype=param_dtype
        )
        self.final_layer_norm = RMSNorm(
            config.d_model, eps=config.layer_norm_epsilon, param_dtype=param_dtype
        )


class T5(nnx.Module):
    """An encoder-decoder of the T5, T5 1.1, FLAN-T5 or mT5 family.

    Args:
      config: the model's shape.
      rngs: stream "params" for the random initial weights.
      dtype: dtype of the computation and of the cache; see the module for float16. Norm statistics,
        softmax and logits are in float32 whatever it is.
      param_dtype: dtype of the initial weights.
      remat: what is stored for the backward pass; see `Llama`.
      sequence_chunk: must be 0: long rows are not computed in chunks here.

    >>> config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=2,
    ...     num_decoder_layers=3)
    >>> model = T5(config, rngs=nnx.Rngs(0))
    >>> model.decoder.layers.cross_attn.q.kernel.shape
    (3, 8, 8)
    >>> model(jnp.array([[0, 4]]), source=jnp.array([[1, 2, 3]])).shape
    (1, 2, 16)
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "full",
        sequence_chunk: int = 0,
    ):
        check_remat(remat)
        if sequence_chunk:
            raise ConfigError(
                f"sequence_chunk={sequence_chunk} is for decoder-only models; a T5 needs 0."
            )
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.shared = nnx.Embed(config.vocab_size, config.d_model, **kwargs)
        self.encoder = T5Stack(config, is_decoder=False, **kwargs)
        self.decoder = T5Stack(config, is_decoder=True, **kwargs)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                preferred_element_type=jnp.float32,
                **kwargs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: T5Cache | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], T5Cache]:
        """Logits of the token behind each of the target's.

        Args:
          tokens: the target so far, `decoder_start_token_id` first; with a cache only what is new.
          source: what to answer; with a cache nothing.
          source_segment_ids: source tokens see only those with the same id; 0 is padding. One
            segment a row when left out.
          segment_ids: likewise of the target, which sees the source tokens with its id.
          positions: not needed, because only distances count; taken as `Llama` takes it.
          cache: of `init_cache`.

        Returns:
          float32 logits; with a cache, the pair of logits and the cache with the new tokens in it.
        """
        del positions
        if cache is not None:
            hidden, cache = self.decode_cached(tokens, cache)
            return self.head(hidden), cache
        if source is None:
            raise ValueError("a T5 needs a source, or a cache of one")
        encoded = self.encode(source, source_segment_ids)
        return self.head(self.decode(tokens, encoded, segment_ids, source_segment_ids))

    def encode(
        self, source: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """The encoder's output; arguments as in `__call__`."""
        slots = jnp.arange(source.shape[1])
        segments = jnp.ones_like(source) if segment_ids is None else segment_ids
        mask = _same_segment(segments, segments)
        bias = self.encoder.relative_attention_bias(slots, source.shape[1])
        graphdef, state = nnx.split(self.encoder.layers)

        def body(x, state):
            x = checkpoint_name(x, "layer_input")
            return nnx.merge(graphdef, state)(x, bias, mask)[0], None

        x, _ = jax.lax.scan(rematerialize(body, self.remat), self._embed(source), state)
        return self.encoder.final_layer_norm(x).astype(self.dtype)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        segment_ids: Int[Array, "B T"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalised output of the decoder's last layer; arguments as in `__call__`."""
        slots = jnp.arange(tokens.shape[1])
        segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        if source_segment_ids is None:
            source_segment_ids = jnp.ones(encoded.shape[:2], jnp.int32)
        mask = attention_mask(slots, segments, segments)
        cross_mask = _same_segment(segments, source_segment_ids)
        bias = self.decoder.relative_attention_bias(slots, tokens.shape[1])
        graphdef, state = nnx.split(self.decoder.layers)

        def body(x, state):
            x = checkpoint_name(x, "layer_input")
            layer = nnx.merge(graphdef, state)
            cross = layer.cross_attn.keys_and_values(encoded), cross_mask
            return layer(x, bias, mask, cross)[0], None

        x, _ = jax.lax.scan(rematerialize(body, self.remat), self._embed(tokens), state)
        return self.decoder.final_layer_norm(x).astype(self.dtype)

    def decode_cached(
        self, tokens: Int[Array, "B T"], cache: T5Cache
    ) -> tuple[Float[Array, "B T D"], T5Cache]:
        """`decode` of what follows the tokens in a cache, and the cache with the new tokens."""
        ones = jnp.ones_like(tokens)
        target = cache.target.append_segments(ones)
        slots = target.length + jnp.arange(tokens.shape[1])
        mask = attention_mask(slots, ones, target.segment_ids)
        cross_mask = _same_segment(ones, cache.source_segment_ids)
        bias = self.decoder.relative_attention_bias(slots, target.segment_ids.shape[1])
        graphdef, state = nnx.split(self.decoder.layers)

        def body(carry, scanned):
            x, target = carry
            state, layer, *cross = scanned
            layer_fn = nnx.merge(graphdef, state)
            return layer_fn(x, bias, mask, (tuple(cross), cross_mask), target, layer), None

        indices = jnp.arange(self.config.num_decoder_layers)
        scanned = (state, indices, cache.cross_keys, cache.cross_values)
        (x, target), _ = jax.lax.scan(body, (self._embed(tokens), target), scanned)
        hidden = self.decoder.final_layer_norm(x).astype(self.dtype)
        return hidden, dataclasses.replace(cache, target=target.advance(tokens.shape[1]))

    def init_cache(
        self,
        source: Int[Array, "B S"],
        max_len: int,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> T5Cache:
        """Encodes sources for decoding.

        Args:
          source: what to answer.
          max_len: room for the target, in tokens a row.
          source_segment_ids: 1 for a token, 0 for padding (on either side); all tokens when left
            out.
        """
        if source_segment_ids is None:
            source_segment_ids = jnp.ones_like(source)
        encoded = self.encode(source, source_segment_ids)
        graphdef, state = nnx.split(self.decoder.layers)

        def body(_, state):
            return None, nnx.merge(graphdef, state).cross_attn.keys_and_values(encoded)

        _, (keys, values) = jax.lax.scan(body, None, state)
        config = self.config
        shape = (config.num_decoder_layers, source.shape[0], max_len, config.num_heads, config.d_kv)
        target = KVCache.empty(shape, self.dtype)
        return T5Cache(target, keys, values, source_segment_ids)

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of final-normed hidden states."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * jnp.asarray(self.config.d_model**-0.5, hidden.dtype)
        if self.lm_head is None:
            if type(self.shared) is not nnx.Embed:
                return self.shared.attend(hidden).astype(jnp.float32)
            return vocabulary_product(hidden, self.shared.embedding[...].T)
        if type(self.lm_head) is nnx.Linear:
            return vocabulary_product(hidden, self.lm_head.kernel[...])
        return self.lm_head(hidden).astype(jnp.float32)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.shared(tokens).astype(residual_dtype(self.dtype))


def _same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    return (queries[:, :, None] == keys[:, None, :])[:, None]
