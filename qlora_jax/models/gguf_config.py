"""A decoder's shape as GGUF metadata: the inverse of `LlamaConfig.from_gguf`."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from qlora_jax.errors import WeightsError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import inverse_frequencies

# GGUF files call Mistral "llama".
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def to_gguf(config: LlamaConfig) -> dict[str, Any]:
    """Writes the metadata that describes the same model, without its tokenizer.

    Args:
      config: of a model, for instance from a `config.json`.

    Returns:
      Values by key, `general.architecture` among them. What scales RoPE other than linearly is no
      metadata but a tensor, see `rope_factors`.

    Raises:
      WeightsError: no GGUF metadata describes such a model.

    Example:
      >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, head_dim=4,
      ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
      >>> metadata = to_gguf(config)
      >>> metadata["general.architecture"], metadata["llama.attention.head_count_kv"]
      ('llama', 1)
    """
    arch = _ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise WeightsError(
            f"models of the family {config.model_type} cannot be written as GGUF here; those of "
            f"{', '.join(_ARCHITECTURES)} can. Choose format hf."
        )
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(config.rope_scaling.factor)
    metadata = {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in values.items()}
    factors = rope_factors(config)
    read = LlamaConfig.from_gguf(
        metadata,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_factors=None if factors is None else tuple(map(float, factors)),
    )
    told = dataclasses.replace(
        config,
        model_type=arch,
        rms_norm_eps=read.rms_norm_eps,
        rope_scaling=read.rope_scaling,
    )
    if read != told:
        differing = [
            f.name
            for f in dataclasses.fields(read)
            if getattr(read, f.name) != getattr(told, f.name)
        ]
        raise WeightsError(
            f"no GGUF metadata describes this model of the family {config.model_type}: "
            f"{', '.join(differing)} cannot be said. Choose format hf."
        )
    return metadata


def rope_factors(config: LlamaConfig) -> Float32[np.ndarray, " half"] | None:
    """The tensor `rope_freqs.weight`: by what each rotation frequency is divided, or None.

    Example:
      >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, head_dim=4,
      ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
      >>> rope_factors(config) is None
      True
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return None
    if scaling.kind == "factors":
        return np.asarray(scaling.factors, np.float32)
    plain = inverse_frequencies(config.head_dim, config.rope_theta)
    return plain / inverse_frequencies(config.head_dim, config.rope_theta, scaling)
