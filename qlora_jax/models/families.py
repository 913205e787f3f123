"""How the families of decoders differ, as their `config.json` says it or leaves it unsaid.

Hugging Face's configurations name one thing differently from family to family, leave out what is
the family's default, and say nothing at all of what every model of the family has (biases, norms).
Here each becomes the fields of `models.config.LlamaConfig`, which calls these functions.
"""

import array
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import WeightsError
from qlora_jax.models.rope import RopeScaling

# What a config.json that leaves a key out means by it; "pattern": every so-manieth layer of a model
# with windows has full attention.
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {
        **_GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "pattern": 2,
    },
    "gemma3_text": {
        **_GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "pattern": 6,
    },
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "opt": {
        "max_position_embeddings": 2048,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "attention_bias": True,
    },
}
# Other names of what is the same: of a key in one family, or of an activation.
_RENAMED = {
    "gemma2": {"hidden_activation": "hidden_act"},
    "gemma3_text": {"hidden_activation": "hidden_act", "sliding_window_pattern": "pattern"},
    "opt": {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    "gpt_neox": {
        "layer_norm_eps": "rms_norm_eps",
        "rotary_pct": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta",
    },
}
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_GELUS = ("gelu", "gelu_pytorch_tanh")
_FAMILY_ACTIVATIONS = {
    "gemma2": ("gelu_pytorch_tanh",),
    "gemma3_text": ("gelu_pytorch_tanh",),
    "opt": ("relu", *_GELUS),
    "gpt_neox": ("relu", *_GELUS),
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_LINEAR_KEYS = ("factor",)
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a model that also sees pictures, as that of its language model.

    >>> text_config({"model_type": "gemma3", "text_config": {"hidden_size": 8}})["hidden_size"]
    8
    """
    if config.get("model_type") != "gemma3" or not isinstance(config.get("text_config"), Mapping):
        return dict(config)
    outer = ("bos_token_id", "eos_token_id", "torch_dtype", "dtype", "quantization_config")
    return {
        **{key: config[key] for key in outer if key in config},
        **config["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
    }


def normalize(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of Llama's config.json, whatever the family calls them, with its defaults.

    Args:
      config: of a family in `DEFAULTS`.

    Raises:
      WeightsError: a model of the family that is built differently.

    >>> normalize({"model_type": "opt", "ffn_dim": 16})["intermediate_size"]
    16
    """
    family = config["model_type"]
    values = {**DEFAULTS[family], **config}
    for key, name in _RENAMED.get(family, {}).items():
        if config.get(key) is not None:
            values[name] = config[key]
    if family in ("opt", "gpt_neox"):  # read none of these, whatever the file says
        values |= dict(num_key_value_heads=None, head_dim=None)
    _refuse(family, values)
    return values


def _refuse(family: str, values: Mapping[str, Any]) -> None:
    """What a family can also be and what is not supported, by name."""
    hidden = values.get("hidden_size")
    found = None
    if family == "opt":
        width = values.get("word_embed_proj_dim") or hidden
        if width != hidden or not values.get("do_layer_norm_before", True):
            found = (
                f"word_embed_proj_dim {width} with hidden_size {hidden} (project_in, project_out) "
                "and norms behind attention and MLP, as only opt-350m has them"
            )
        elif not values.get("layer_norm_elementwise_affine", True):
            found = "layer_norm_elementwise_affine false"
        elif values.get("_remove_final_layer_norm"):
            found = "_remove_final_layer_norm true"
    elif values.get("use_bidirectional_attention"):
        found = "use_bidirectional_attention true"
    if found:
        raise WeightsError(
            f"config.json of this {family} model has {found}, which is not supported. Take another "
            "model of the family."
        )


def activation(values: Mapping[str, Any]) -> str:
    """The MLP's activation, by the name of `mlp.ACTIVATIONS`."""
    name = values.get("hidden_act", "silu")
    allowed = _FAMILY_ACTIVATIONS.get(values["model_type"], ("silu",))
    if (known := _ACTIVATIONS.get(name, name)) not in allowed:
        supported = " and ".join(map(repr, allowed))
        raise WeightsError(f"config.json has hidden_act {name!r}; only {supported} is supported.")
    return known


def variants(values: Mapping[str, Any]) -> dict[str, Any]:
    """Biases, norms and whatever else all models of a family have."""
    family = values["model_type"]
    bias = bool(values.get("attention_bias"))
    if family == "llama":
        return dict(qkv_bias=bias, o_bias=bias, mlp_bias=bool(values.get("mlp_bias")))
    if family == "qwen2":
        return dict(qkv_bias=True)
    if family == "qwen3":
        return dict(qkv_bias=bias, o_bias=bias, qk_norm=True)
    if family in ("gemma2", "gemma3_text"):
        return dict(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=family == "gemma3_text",
            norm="rms_plus_one",
            post_norms=True,
            scale_embeddings=True,
            query_pre_attn_scalar=float(values["query_pre_attn_scalar"]),
            attn_logit_softcapping=values.get("attn_logit_softcapping"),
            final_logit_softcapping=values.get("final_logit_softcapping"),
        )
    if family == "opt":
        bias = bool(values.get("enable_bias", True))
        every = dict(qkv_bias=bias, o_bias=bias, mlp_bias=bias)
        return every | dict(norm="layer", gated_mlp=False, position_offset=2, rotary_dim=0)
    if family == "gpt_neox":
        return dict(
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=True,
            norm="layer",
            gated_mlp=False,
            parallel_residual=bool(values.get("use_parallel_residual", True)),
        )
    return {}


def rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotations, from the keys of transformers 4 or 5."""
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    family, local = values["model_type"], values.get("rope_local_base_freq")
    if "full_attention" in found or "sliding_attention" in found:  # transformers 5, by layer type
        local = (found.get("sliding_attention") or {}).get("rope_theta") or local
        found = found.get("full_attention") or {}
    theta = float(found.get("rope_theta") or values.get("rope_theta") or 10000.0)
    scaling = _scaling(found, values)
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    if family == "gemma3_text":
        fields["rope_local_base_freq"] = float(local)
    part = found.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        if family not in ("gpt_neox", "phi3"):
            raise WeightsError("config.json sets partial_rotary_factor, which is not supported.")
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        fields["rotary_dim"] = int(head_dim * part)
    return fields


def _scaling(found: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling | None:
    kind = found.get("rope_type") or found.get("type") or "default"
    needed = {"linear": _LINEAR_KEYS, "llama3": _LLAMA3_KEYS}.get(kind, ())
    if missing := [key for key in needed if found.get(key) is None]:
        raise WeightsError(f"config.json has RoPE scaling {kind!r} without {', '.join(missing)}.")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(found["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_max_position_embeddings=int(
                found.get("original_max_position_embeddings") or values["max_position_embeddings"]
            ),
        )
    if kind == "factors" and found.get("factors"):  # of `to_hf`; no other project writes it
        return RopeScaling("factors", factors=tuple(found["factors"]))
    hint = ""
    if kind in ("longrope", "su"):
        hint = " Of the Phi family, Phi-3-mini-4k, Phi-3-medium-4k and Phi-4 do without LongRoPE."
    raise WeightsError(
        f"config.json has RoPE scaling {kind!r}; supported: 'default', 'linear', 'llama3'.{hint}"
    )


def windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """sliding_window and full_attention_layers.

    Mistral and Phi-3 use their window in every layer. Gemma alternates: every second (Gemma 2) or
    sixth (Gemma 3) layer sees everything. Qwen2 and Qwen3 state a window that is off unless
    `use_sliding_window`, and then holds from layer `max_window_layers` on. Where `layer_types`
    lists the layers one by one, it decides.
    """
    window, layers = values.get("sliding_window"), range(values["num_hidden_layers"])
    family = values["model_type"]
    if window and (family in ("mistral", "phi3") or values.get("window_in_every_layer")):
        return {"sliding_window": window}
    if family in ("llama", "opt", "gpt_neox") or not window:
        return {}
    gemma = family.startswith("gemma")
    if not gemma and not values.get("use_sliding_window"):
        return {}
    types = values.get("layer_types")
    if types is not None:
        full = tuple(i for i in layers if types[i] == "full_attention")
    elif gemma:
        full = tuple(i for i in layers if (i + 1) % values["pattern"] == 0)
    else:
        full = tuple(i for i in layers if i < values["max_window_layers"])
    if len(full) == len(layers):
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def gguf_values(
    metadata: Mapping[str, Any], arch: str, layers: int, head_dim: int, hidden_a_head: int
) -> dict[str, Any]:
    """What GGUF metadata say or imply, by the keys that a config.json has after `normalize`.

    llama.cpp knows of some families what its files do not say: which layers see everything, and
    that the 27B models of Gemma divide scores by other than the root of a head's size.

    Args:
      metadata: of the file.
      arch: one of `GGUF_ARCHITECTURES`.
      layers: of the model.
      head_dim: size of a head.
      hidden_a_head: the width of the residual stream, divided by the number of query heads.

    >>> gguf_values({}, "gemma2", 46, 128, 144)["query_pre_attn_scalar"]
    144
    """
    family = "gemma3_text" if arch == "gemma3" else arch
    values = {**DEFAULTS[family], "model_type": family, "num_hidden_layers": layers}
    values["sliding_window"] = metadata.get(f"{arch}.attention.sliding_window") or None
    if not family.startswith("gemma"):
        return values | {"window_in_every_layer": True}
    large = (arch, layers) in (("gemma2", 46), ("gemma3", 62))
    values["query_pre_attn_scalar"] = hidden_a_head if large else head_dim
    pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list | array.array):  # whether a layer has the window
        values["layer_types"] = ["sliding_attention" if w else "full_attention" for w in pattern]
    elif pattern:
        values["pattern"] = pattern
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if f"{arch}.{key}" in metadata:
            values[key] = float(metadata[f"{arch}.{key}"])
    if arch == "gemma3":
        values["rope_local_base_freq"] = float(metadata.get(f"{arch}.rope.freq_base_swa", 10000.0))
    return values
