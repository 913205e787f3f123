"""The shapes of well-known models, so that a run can be planned without their weights.

A name is the model's on the Hugging Face Hub; what is here are the fields of its `config.json` that
decide how many numbers there are and how they are computed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from qlora_jax import errors
from qlora_jax.files import resolve_path
from qlora_jax.guarded_files import read_json_object
from qlora_jax.models.kinds import Shape, read_shape


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


def _flan_t5(d_model: int, d_ff: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": d_model,
        "d_kv": 64,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
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


def _gemma2(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    sizes = _llama(hidden, intermediate, layers, heads, kv=kv, tie_word_embeddings=True)
    return sizes | {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        **more,
    }


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    """The language model; pictures are seen by another one in front of it."""
    sizes = _llama(hidden, intermediate, layers, heads, kv=kv, tie_word_embeddings=True)
    return sizes | {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        **more,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
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
    "google/gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "google/gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "google/gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "google/gemma-3-1b-pt": _gemma3(
        1152, 6912, 26, 4, 1, vocab_size=262144, sliding_window=512, rope_scaling=None
    )
    | {"max_position_embeddings": 32768},
    "google/gemma-3-4b-pt": _gemma3(2560, 10240, 34, 8, 4),
    "google/gemma-3-12b-pt": _gemma3(3840, 15360, 48, 16, 8),
    "google/gemma-3-27b-pt": _gemma3(
        5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168
    ),
    "microsoft/Phi-3-mini-4k-instruct": _llama(
        3072, 8192, 32, 32, model_type="phi3", vocab_size=32064, sliding_window=2047
    )
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "microsoft/phi-4": _llama(
        5120, 17920, 40, 40, kv=10, model_type="phi3", vocab_size=100352, rope_theta=250000.0
    )
    | {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5},
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, vocab=50432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, vocab=50688),
    "google/flan-t5-small": _flan_t5(512, 1024, 8, 6),
    "google/flan-t5-base": _flan_t5(768, 2048, 12, 12),
    "google/flan-t5-large": _flan_t5(1024, 2816, 24, 16),
    "google/flan-t5-xl": _flan_t5(2048, 5120, 24, 32),
    "google/flan-t5-xxl": _flan_t5(4096, 10240, 24, 64),
}


def model_shape(spec: str) -> Shape | None:
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
    values = model_config(spec)
    return None if values is None else read_shape(values)


def model_config(spec: str) -> Mapping[str, Any] | None:
    """The `config.json` that `model_shape` reads; arguments and errors are the same."""
    names = {name.lower(): name for name in SHAPES}
    if spec.lower() in names:
        return SHAPES[names[spec.lower()]]
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
    return _read(path)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except OSError as error:
        raise errors.WeightsError(f"{path} cannot be read: {error.strerror}") from None
