"""The shapes of well-known models, so that a run can be planned without their weights.

A name is the model's on the Hugging Face Hub; what is here are the fields of its `config.json` that
decide how many numbers there are and how they are computed.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from qlora_jax import errors
from qlora_jax.files import resolve_path
from qlora_jax.models.config import LlamaConfig


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, *, kv: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **more,
    }


_LLAMA_3_1 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_2_5 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _llama(4096, 11008, 32, 32),
    "huggyllama/llama-13b": _llama(5120, 13824, 40, 40),
    "huggyllama/llama-30b": _llama(6656, 17920, 60, 52),
    "huggyllama/llama-65b": _llama(8192, 22016, 80, 64),
    "meta-llama/Llama-2-70b-hf": _llama(
        8192, 28672, 80, 64, kv=8, max_position_embeddings=4096, rms_norm_eps=1e-5
    ),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, kv=8, **_LLAMA_3_1),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64, kv=8, **_LLAMA_3_1),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 14336, 32, 32, kv=8)
    | {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
    "Qwen/Qwen2.5-7B": _llama(3584, 18944, 28, 28, kv=4, **_QWEN_2_5),
    "Qwen/Qwen2.5-14B": _llama(5120, 13824, 48, 40, kv=8, **_QWEN_2_5),
    "Qwen/Qwen2.5-32B": _llama(5120, 27648, 64, 40, kv=8, **_QWEN_2_5),
    "Qwen/Qwen2.5-72B": _llama(8192, 29568, 80, 64, kv=8, **_QWEN_2_5),
}


def model_shape(spec: str) -> LlamaConfig | None:
    """The shape of a model that is known by name, or of which there is a `config.json`.

    Args:
        spec: a name of `SHAPES` (upper and lower case are the same), a `config.json`, or a folder
            with one.

    Returns:
        The shape; None where `spec` is a file of another kind, which then must be opened.

    Raises:
        UserError: `spec` is no name and no file; the message holds the nearest name.
        WeightsError: the model is of a family that is not supported.

    >>> model_shape("huggyllama/llama-65b").num_hidden_layers
    80
    """
    names = {name.lower(): name for name in SHAPES}
    if spec.lower() in names:
        return LlamaConfig.from_hf(SHAPES[names[spec.lower()]])
    try:
        path = resolve_path(spec, kind="config")
    except errors.UserError as error:
        match = errors.nearest(spec, SHAPES)
        hint = f"; did you mean {match}?" if match else ""
        raise errors.UserError(
            f"{error}; nor is it one of the models that are known by name{hint} "
            f"({', '.join(SHAPES)})"
        ) from None
    if path.is_dir():
        path /= "config.json"
    if path.suffix != ".json":
        return None
    return LlamaConfig.from_hf(_read(path))


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise errors.WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise errors.WeightsError(f"{path} holds {type(values).__name__}, needed is an object")
    return values
