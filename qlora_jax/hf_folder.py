"""The small files of a Hugging Face folder: configuration, tokenizer, index of the shards.

A model that came from such a folder keeps its files. One that came from a GGUF file gets new ones,
made from the metadata: `config.json` from the shape, the tokenizer from its tokens and merges.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import MAX_TOKENIZER_BYTES, parse_json, read_guarded
from qlora_jax.loading import read_config, read_tokenizer
from qlora_jax.models.hf_config import to_hf
from qlora_jax.weights import Checkpoint

_TEMPLATE_FILE = "chat_template.jinja"
# Files that go along from a Hugging Face folder, where they are there.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    _TEMPLATE_FILE,
    "generation_config.json",
)


def model_config(source: Checkpoint) -> dict[str, Any]:
    """The `config.json` of a model itself, without what says how it is quantized.

    Args:
      source: an open model.
    """
    if source.style == "hf":
        return {k: v for k, v in source.config.items() if k != "quantization_config"}
    tokenizer = read_tokenizer(source)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=list(tokenizer.eos_token_ids))
    return to_hf(read_config(source)) | ends | {"torch_dtype": "float32"}


def check_transformers_reads(config: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses a `config.json` that only this project reads.

    Args:
      config: of `model_config`.
      path: of the model, for the message.

    Raises:
      WeightsError: it has RoPE factors that come from a GGUF file.
    """
    if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
        raise WeightsError(
            f"{path} has RoPE factors that no config.json of transformers can say. Give the "
            "original Hugging Face model, or choose format qlora_jax."
        )


def companion_files(source: Checkpoint, tokenizer: Tokenizer | None = None) -> dict[str, bytes]:
    """Tokenizer and generation settings: files of a model, or made from GGUF's metadata.

    Args:
      source: an open model.
      tokenizer: that of a run; a chat format that is not the model's own goes into the files.

    Returns:
      Contents by file name.
    """
    if source.style == "hf":  # which need not have a tokenizer, to be packed
        paths = [source.path / name for name in _COMPANIONS]
        files = {
            path.name: read_guarded(path, MAX_TOKENIZER_BYTES) for path in paths if path.is_file()
        }
    else:
        files = {name: text.encode() for name, text in read_tokenizer(source).to_files().items()}
    if tokenizer is not None and tokenizer.chat_template != read_tokenizer(source).chat_template:
        files |= _chat_format(files, tokenizer)
    return files


def _chat_format(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that say how conversations are written, with another template in them."""

    def read(name: str) -> dict[str, Any]:
        return parse_json(files.get(name, b"{}"))

    settings = read("tokenizer_config.json")
    settings.pop("chat_template", None)
    changed = {"tokenizer_config.json": json_bytes(settings)}
    changed[_TEMPLATE_FILE] = (tokenizer.chat_template or "").encode()
    if tokenizer.stop_strings:
        generation = read("generation_config.json")
        generation["stop_strings"] = list(tokenizer.stop_strings)
        changed["generation_config.json"] = json_bytes(generation)
    return changed


def weight_index(weight_map: Mapping[str, str]) -> dict[str, bytes]:
    """The index that several files need.

    Args:
      weight_map: the file of each tensor.

    Returns:
      Content by file name; nothing for a single file.

    Example:
      >>> weight_index({"a": "model.safetensors"})
      {}
    """
    if len(set(weight_map.values())) == 1:
        return {}
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    return {"model.safetensors.index.json": json_bytes(index)}


def json_bytes(value: Any) -> bytes:
    """A JSON file as a person would read it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
