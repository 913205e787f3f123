"""GGUF files: metadata, tokenizer and tensors in one file, as llama.cpp writes them.

The header is read and checked in `gguf_header.py`; the quantized types are decoded by
`gguf.quants`, a few rows at a time.

llama.cpp computes RoPE on interleaved pairs, so its converter reorders the rows of `attn_q` and
`attn_k` of Llama-like models; `read` puts them back into the order of Hugging Face. For Gemma it
adds 1 to the factors of the norms; `read` takes it off again.
"""

import math
import pathlib
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qlora_jax.errors import WeightsError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights.files import empty_aligned, read_array, refuse_pickle
from qlora_jax.weights.fused import FUSED_NAMINGS, find_fused, fused_modules, piece_name
from qlora_jax.weights.gguf_header import GGUFEntry, read_gguf_header
from qlora_jax.weights.names import naming_of
from qlora_jax.weights.packed import PackedFormat

_PERMUTED_ARCHITECTURES = ("llama",)
_CHUNK_BYTES = 4 << 20


class GGUFCheckpoint:
    """The tensors of a GGUF file, decoded to float32 one at a time.

    Attributes:
      path: the file.
      style: "gguf", the format.
      naming: how the architecture names its tensors.
      config: the metadata, with GGUF's own keys (`llama.block_count`, `tokenizer.ggml.tokens`, …).
      formats: of tensors that are taken in 4 bits; there are none, GGUF's own types are decoded.
    """

    style = "gguf"

    def __init__(self, path: pathlib.Path):
        """Reads the metadata and the table of tensors; no tensor yet.

        Args:
          path: of the file.

        Raises:
          WeightsError: not a GGUF file, damaged, one part of several, or with tensors in a type
            that is not supported; all such types are named.
        """
        self.path = path
        self.formats: dict[str, PackedFormat] = {}
        refuse_pickle(path)
        if not path.is_file():
            raise WeightsError(
                f"{path} is not a regular file. Give a copy of the model's own file."
            )
        self.config, self._entries = read_gguf_header(path)
        self.naming = naming_of(self.config.get("general.architecture"), "gguf")
        if self.naming in FUSED_NAMINGS:
            self._entries = _split_fused(self._entries, self.config)
        self._head_counts = permuted_heads(self.config)

    def names(self) -> list[str]:
        """Returns the names of all tensors in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `[out_features, in_features]` for a weight."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives: always float32."""
        return np.dtype(np.float32)

    def type_name(self, name: str) -> str:
        """Returns how a tensor is stored, such as "Q4_1"."""
        return self._entries[name].type.name

    def read(self, name: str) -> np.ndarray:
        """Reads and decodes one tensor, and undoes the row order of `attn_q` and `attn_k`.

        Args:
          name: one of `names()`.

        Returns:
          A float32 array.

        Raises:
          WeightsError: the file has become shorter than its header says.
        """
        entry = self._entries[name]
        with open(self.path, "rb", buffering=0) as file:
            array = _read_decoded(file, entry)
        if self.naming == "gguf_gemma" and name.endswith("norm.weight"):
            array = array - np.float32(1)
        if heads := self._head_counts.get(name.split(".")[-2] if "." in name else name):
            return unpermute_rows(array, heads)
        return array


def unpermute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Turns rows for interleaved RoPE (GGUF) into rows for half-split RoPE (Hugging Face).

    Args:
      weight: `[num_heads * head_dim, ...]`; in each head the two halves lie interleaved.
      num_heads: number of query or of key heads.

    Returns:
      The weight with the first halves of each head's pairs before the second ones.

    Example:
      >>> unpermute_rows(np.array([0, 10, 1, 11, 2, 12, 3, 13]), 2)
      array([ 0,  1, 10, 11,  2,  3, 12, 13])
    """
    head_dim = weight.shape[0] // num_heads
    pairs = weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def permute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Turns rows for half-split RoPE into rows for interleaved RoPE: undoes `unpermute_rows`.

    Args:
      weight: `[num_heads * head_dim, ...]`; in each head one half after the other.
      num_heads: number of query or of key heads.

    Example:
      >>> permute_rows(np.array([0, 1, 10, 11, 2, 3, 12, 13]), 2)
      array([ 0, 10,  1, 11,  2, 12,  3, 13])
    """
    head_dim = weight.shape[0] // num_heads
    halves = weight.reshape(num_heads, 2, head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def permuted_heads(config: dict[str, Any]) -> dict[str, int]:
    """Returns the number of heads for each tensor kind whose rows the converter reordered."""
    architecture = config.get("general.architecture")
    if architecture not in _PERMUTED_ARCHITECTURES:
        return {}
    heads = config.get(f"{architecture}.attention.head_count")
    key_value_heads = config.get(f"{architecture}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(key_value_heads, int):
        raise WeightsError(
            f"GGUF metadata: {architecture}.attention.head_count and head_count_kv must be single "
            f"integers, got {heads!r} and {key_value_heads!r}. Models whose layers differ in their "
            "number of heads are not supported."
        )
    return {"attn_q": heads, "attn_k": key_value_heads}


def _split_fused(entries: dict[str, GGUFEntry], config: dict[str, Any]) -> dict[str, GGUFEntry]:
    """Puts the pieces of fused tensors in their place; see `weights.fused`."""
    modules = fused_modules(LlamaConfig.from_gguf(config))
    split: dict[str, GGUFEntry] = {}
    for name, entry in entries.items():
        fused = find_fused(name, modules)
        if fused is None or entry.shape[:1] != (fused.rows,):
            split[name] = entry
            continue
        offset = entry.offset
        for index, rows in enumerate(fused.sizes):
            split[piece_name(name, index)] = GGUFEntry(offset, (rows, entry.shape[1]), entry.type)
            block, block_bytes = GGML_QUANT_SIZES[entry.type]
            offset += rows * entry.shape[1] // block * block_bytes
    return split


def _read_decoded(file: BinaryIO, entry: GGUFEntry) -> np.ndarray:
    """Decodes a tensor in chunks of rows, so that only the result is large."""
    if entry.type == GGMLQuantizationType.F32:
        return read_array(file, entry.offset, entry.shape, np.dtype(np.float32))
    block, block_bytes = GGML_QUANT_SIZES[entry.type]
    columns = entry.shape[-1] if entry.shape else 1
    rows = math.prod(entry.shape) // columns
    row_bytes = columns // block * block_bytes
    out = empty_aligned((rows, columns), np.dtype(np.float32))
    step = max(1, _CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = read_array(
            file, entry.offset + start * row_bytes, (count, row_bytes), np.dtype(np.uint8)
        )
        out[start : start + count] = dequantize(raw, entry.type)
    return out.reshape(entry.shape)
