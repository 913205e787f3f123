"""The shape of a decoder, read from a Hugging Face `config.json` or from GGUF metadata.

One frozen dataclass describes every supported family; the families differ only in which biases,
norms and windows they have (`models.families`). What a checkpoint leaves out is filled in with the
defaults of its own family (transformers writes only some of them), and what this project cannot run
is refused here, before any weight is read.
"""

import array
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from qlora_jax.errors import WeightsError
from qlora_jax.models import families
from qlora_jax.models.rope import RopeScaling

SUPPORTED = tuple(families.DEFAULTS)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MOST_LAYERS, _LARGEST_SIZE = 4096, 1 << 24


def _explained(read: Callable) -> Callable:
    """Says of whatever a value of the wrong kind led to that the configuration is the reason."""

    @functools.wraps(read)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return read(*args, **options)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise WeightsError(
                f"the model's configuration has a value of the wrong kind: {error}. Take the "
                "complete configuration that belongs to the weights."
            ) from error

    return wrapped


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants of one decoder; names as in Hugging Face's `config.json`.

    Attributes:
      model_type: the family: one of `SUPPORTED`.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: decoder layers.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides `num_attention_heads`.
      head_dim: size of one head; not always `hidden_size / num_attention_heads`.
      max_position_embeddings: longest context, in tokens.
      rms_norm_eps: added to the mean square (in LayerNorms the variance) in every norm.
      rope_theta: base of the rotation frequencies.
      rope_scaling: stretch of the frequencies, or None.
      tie_word_embeddings: the output head is the embedding.
      qkv_bias: q, k and v projections have a bias.
      o_bias: the output projection of the attention has a bias.
      mlp_bias: the three MLP projections have biases.
      qk_norm: queries and keys are RMS-normalised per head before the rotation.
      sliding_window: a token sees itself and the `sliding_window - 1` before it; None: all before
        it.
      full_attention_layers: indices of the layers that ignore `sliding_window`.
      hidden_act: the MLP's activation, a key of `mlp.ACTIVATIONS`.
      gated_mlp: the MLP has a gate.
      norm: "rms"; "rms_plus_one", whose factor is 1 + scale; or "layer", LayerNorm with bias.
      post_norms: attention and MLP have a norm behind them as well.
      parallel_residual: attention and MLP of a layer have the same input.
      scale_embeddings: the embedding is multiplied by sqrt(hidden_size).
      position_offset: positions are learned, and position 0 has this row; None: not learned.
      rotary_dim: how much of a head is rotated, from its start; None: all of it; 0: nothing.
      rope_local_base_freq: `rope_theta` of the layers with a window, which are not stretched; None:
        as the others.
      query_pre_attn_scalar: scores are divided by its square root; None: by that of `head_dim`.
      attn_logit_softcapping: see `attention.grouped_attention`; None: scores are not capped.
      final_logit_softcapping: the same of the logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    post_norms: bool = False
    parallel_residual: bool = False
    scale_embeddings: bool = False
    position_offset: int | None = None
    rotary_dim: int | None = None
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "llama"

    def __post_init__(self):
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise WeightsError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: the model's config is damaged."
            )
        if self.head_dim % 2:
            raise WeightsError(f"head_dim={self.head_dim} must be even for rotary embeddings.")

    @classmethod
    @_explained
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Args:
          config: the parsed JSON, of transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`).

        Raises:
          WeightsError: the family, the activation or the RoPE scaling is not supported, or sizes
          are missing.

        >>> LlamaConfig.from_hf({"model_type": "qwen2", "vocab_size": 8, "hidden_size": 8,
        ...     "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        ...     "num_key_value_heads": 1}).qkv_bias
        True
        """
        config = families.text_config(config)
        model_type = config.get("model_type")
        if model_type not in families.DEFAULTS:
            raise _unsupported(f"config.json has model_type {model_type!r}")
        values = families.normalize(config)
        if missing := [key for key in _REQUIRED if values.get(key) is None]:
            raise WeightsError(
                f"config.json of this {model_type} model has no {', '.join(missing)}: "
                "expected the complete config.json that belongs to the weights."
            )
        for key in _REQUIRED:
            if type(values[key]) is not int:
                raise WeightsError(
                    f"config.json has {key} {values[key]!r}, which must be a whole number."
                )
            _check_size(key, values[key])
        heads = values["num_attention_heads"]
        return cls(
            **{key: values[key] for key in _REQUIRED},
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            max_position_embeddings=values["max_position_embeddings"],
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            model_type=model_type,
            hidden_act=families.activation(values),
            **families.rope(values),
            **families.windows(values),
            **families.variants(values),
        )

    @classmethod
    @_explained
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tie_word_embeddings: bool = True,
        rope_factors: tuple[float, ...] | None = None,
    ) -> "LlamaConfig":
        """Reads GGUF metadata (`llama.block_count` and so on).

        Two facts are in a GGUF file's tensors and not in its metadata, so the caller has to say
        them.

        Args:
          metadata: keys as in the file, values as plain Python objects.
          tie_word_embeddings: the file has no tensor `output.weight`.
          rope_factors: the values of the tensor `rope_freqs.weight` (Llama 3.1 and later), if the
            file has one.

        Raises:
          WeightsError: the architecture or its RoPE scaling is not supported, or sizes are missing.

        >>> LlamaConfig.from_gguf({"general.architecture": "llama", "llama.block_count": 2,
        ...     "llama.vocab_size": 8, "llama.embedding_length": 8,
        ...     "llama.feed_forward_length": 16, "llama.context_length": 64,
        ...     "llama.attention.head_count": 2,
        ...     "llama.attention.layer_norm_rms_epsilon": 1e-5}).head_dim
        4
        """
        arch = metadata.get("general.architecture")
        # Mistral is written as the architecture llama; a dense model has no expert_count, or 0.
        if arch not in families.GGUF_ARCHITECTURES or metadata.get(f"{arch}.expert_count"):
            raise _unsupported(f"the GGUF file has general.architecture {arch!r}", metadata, arch)
        heads = _gguf(metadata, arch, "attention.head_count")
        _check_size("attention.head_count", heads)
        hidden = _gguf(metadata, arch, "embedding_length")
        head_dim = metadata.get(f"{arch}.attention.key_length") or hidden // heads
        if metadata.get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
            raise WeightsError(
                f"the GGUF file rotates {metadata[f'{arch}.rope.dimension_count']} of {head_dim} "
                "dimensions of a head; partial rotary embeddings are not supported."
            )
        vocab_size = metadata.get(f"{arch}.vocab_size")
        vocab_size = vocab_size or len(metadata.get("tokenizer.ggml.tokens", ()))
        if not vocab_size:
            raise WeightsError(
                f"the GGUF file's metadata has neither {arch}.vocab_size nor tokenizer.ggml.tokens."
            )
        layers = _gguf(metadata, arch, "block_count")
        values = families.gguf_values(metadata, arch, layers, head_dim, hidden // heads)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_gguf(metadata, arch, "feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_gguf(metadata, arch, "attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=_gguf(metadata, arch, "context_length"),
            rms_norm_eps=float(_gguf(metadata, arch, "attention.layer_norm_rms_epsilon")),
            rope_theta=float(
                metadata.get(f"{arch}.rope.freq_base", values.get("rope_theta", 10000.0))
            ),
            rope_local_base_freq=values.get("rope_local_base_freq"),
            rope_scaling=_gguf_rope_scaling(metadata, arch, rope_factors),
            tie_word_embeddings=tie_word_embeddings,
            model_type=values["model_type"],
            hidden_act=families.activation(values),
            **families.windows(values),
            **families.variants(values),
        )


def _check_size(name: str, value: int) -> None:
    """Refuses what would be computed with before any tensor is looked at."""
    largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
    if not isinstance(value, int) or not 1 <= value <= largest:
        raise WeightsError(
            f"the model's configuration has {name} {value!r}, expected is a whole number from 1 "
            f"to {largest}: it is damaged. Download it again."
        )


def _unsupported(
    found: str, metadata: Mapping[str, Any] | None = None, arch: str | None = None
) -> WeightsError:
    if metadata and (experts := metadata.get(f"{arch}.expert_count")):
        found += f" with {experts} experts"
    names = SUPPORTED if metadata is None else families.GGUF_ARCHITECTURES
    return WeightsError(
        f"{found}, which is not supported. Supported are dense decoders of the families "
        f"{', '.join(names)} (Llama 1 to 3.2, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3, "
        "Gemma 2 and 3, Phi-3 and 4, OPT, Pythia); mixtures of experts are not."
    )


def _gguf(metadata: Mapping[str, Any], arch: str, key: str, default: Any = None) -> Any:
    value = metadata.get(f"{arch}.{key}", default)
    if value is None:
        raise WeightsError(f"the GGUF file's metadata has no {arch}.{key}: the file is incomplete.")
    if isinstance(value, list | tuple | array.array):
        raise WeightsError(
            f"the GGUF file's {arch}.{key} differs between layers ({value}); only models whose "
            "layers all have the same shape are supported."
        )
    return value


def _gguf_rope_scaling(
    metadata: Mapping[str, Any], arch: str, factors: tuple[float, ...] | None
) -> RopeScaling | None:
    if factors is not None:
        return RopeScaling("factors", factors=tuple(float(x) for x in factors))
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if f"{arch}.rope.scaling.attn_factor" in metadata:
        kind = "longrope"
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(metadata[f"{arch}.rope.scaling.factor"]))
    raise WeightsError(
        f"the GGUF file has RoPE scaling {kind!r}; supported are 'none' and 'linear'."
    )
