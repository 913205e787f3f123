"""A decoder's shape as a Hugging Face `config.json`: the inverse of `LlamaConfig.from_hf`."""

import dataclasses
from typing import Any

from qlora_jax.errors import WeightsError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# Fields that no config.json has: the family says them, or other keys.
_OURS = (
    *("qkv_bias", "o_bias", "qk_norm", "full_attention_layers", "gated_mlp", "norm", "post_norms"),
    *("parallel_residual", "scale_embeddings", "position_offset", "rotary_dim"),
)
_GEMMA = (
    *("rope_local_base_freq", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Writes the dict of a `config.json` that describes the same model.

    RoPE factors that only GGUF files have are written as the type "factors", which this project
    reads and transformers does not.

    Args:
      config: of a model, for instance from GGUF metadata.

    Returns:
      The dict, with the keys of transformers 4, which transformers 5 reads too.

    Raises:
      WeightsError: no `config.json` describes such a model.

    Example:
      >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, head_dim=4,
      ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
      >>> LlamaConfig.from_hf(to_hf(config)) == config
      True
    """
    family = config.model_type
    if family == "llama" and config.sliding_window:  # GGUF files call Mistral "llama"
        family = "mistral"
    if family not in _ARCHITECTURES:
        raise WeightsError(
            f"a GGUF file of the family {family} cannot be turned into a Hugging Face folder. "
            "Take the original Hugging Face model instead."
        )
    values = dataclasses.asdict(config) | {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "attention_bias": config.o_bias,
        "rope_scaling": _rope_scaling(config.rope_scaling),
    }
    if family.startswith(("qwen", "gemma")):
        full = set(config.full_attention_layers)
        values["use_sliding_window"] = config.sliding_window is not None
        values["layer_types"] = [
            "full_attention" if i in full or not config.sliding_window else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
    if family.startswith("gemma"):
        values["hidden_activation"] = values["hidden_act"]
    for name in (*_OURS, *(() if family.startswith("gemma") else _GEMMA)):
        del values[name]
    read = LlamaConfig.from_hf(values)
    if dataclasses.replace(read, model_type=config.model_type) != config:
        raise WeightsError(
            f"no config.json of the family {family} describes this model ({config}). Take the "
            "original Hugging Face model instead of a converted file."
        )
    return values


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        "factors": ("factors",),
    }
    return {"rope_type": scaling.kind} | {key: getattr(scaling, key) for key in keys[scaling.kind]}
