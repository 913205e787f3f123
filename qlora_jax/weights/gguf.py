"""GGUF files: metadata, tokenizer and tensors in one file, as llama.cpp writes them.

The header is parsed here and not by `gguf.GGUFReader`: for SmolLM2's 98,000 strings that class
takes 2.7 seconds and 160 MB (it keeps a NumPy view for every string), holds the file's pages in
memory through a map, and on a damaged header can loop without end. The quantized types are decoded
by `gguf.quants`.

llama.cpp computes RoPE on interleaved pairs, so its converter reorders the rows of `attn_q` and
`attn_k` of Llama-like models; `read` puts them back into the order of Hugging Face. For Gemma it
adds 1 to the factors of the norms; `read` takes it off again.
"""

import math
import pathlib
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qlora_jax.errors import WeightsError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights.files import (
    empty_aligned,
    explain_bytes,
    file_size,
    read_array,
    refuse_pickle,
)
from qlora_jax.weights.fused import FUSED_NAMINGS, find_fused, fused_modules, piece_name
from qlora_jax.weights.names import naming_of
from qlora_jax.weights.packed import PackedFormat

SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q8_0"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"),
)
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Metadata value types of the format, by their number.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_PERMUTED_ARCHITECTURES = ("llama",)
_CHUNK_BYTES = 4 << 20


class _Entry(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType


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
        with open(path, "rb") as file:
            self.config, self._entries = _Header(path, file).parse()
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


def _split_fused(entries: dict[str, _Entry], config: dict[str, Any]) -> dict[str, _Entry]:
    """Puts the pieces of fused tensors in their place; see `weights.fused`."""
    modules = fused_modules(LlamaConfig.from_gguf(config))
    split: dict[str, _Entry] = {}
    for name, entry in entries.items():
        fused = find_fused(name, modules)
        if fused is None or entry.shape[:1] != (fused.rows,):
            split[name] = entry
            continue
        offset = entry.offset
        for index, rows in enumerate(fused.sizes):
            split[piece_name(name, index)] = _Entry(offset, (rows, entry.shape[1]), entry.type)
            block, block_bytes = GGML_QUANT_SIZES[entry.type]
            offset += rows * entry.shape[1] // block * block_bytes
    return split


def _read_decoded(file: BinaryIO, entry: _Entry) -> np.ndarray:
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


class _Header:
    """A parser that checks every length against the size of the file before it believes it."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self._path, self._file, self._size = path, file, file_size(path)
        self._order = "<"

    def parse(self) -> tuple[dict[str, Any], dict[str, _Entry]]:
        """Returns the metadata and the table of tensors."""
        if self._file.read(4) != _MAGIC:
            raise WeightsError(explain_bytes(self._path, "a GGUF file"))
        version = self._scalar("I")
        if version not in _VERSIONS:
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise WeightsError(
                f"{self._path} is GGUF version {version}{hint}; versions 2 and 3, little-endian, "
                "are supported. Convert it again with a current llama.cpp."
            )
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        config: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            config[key] = self._value(self._scalar("I"))
        if (parts := config.get("split.count", 1)) not in (0, 1):
            raise WeightsError(
                f"{self._path} is one of {parts} parts. Join them first: "
                "`llama-gguf-split --merge FIRST_PART OUTPUT.gguf`."
            )
        table = [self._tensor_info() for _ in range(tensor_count)]
        return config, self._place(table, config.get("general.alignment", 32))

    def _place(self, table: list[tuple], alignment: int) -> dict[str, _Entry]:
        """Turns the table into checked places in the file."""
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        entries: dict[str, _Entry] = {}
        refused: dict[str, list[str]] = {}
        for name, shape, number, offset in table:
            if name in entries:
                raise self._damaged(f"two tensors named {name!r}")
            known = {kind.value: kind.name for kind in GGMLQuantizationType}
            kind = known.get(number, f"number {number}")
            if kind not in SUPPORTED_TYPES:
                refused.setdefault(kind, []).append(name)
                continue
            entry = _Entry(start + offset, shape, GGMLQuantizationType[kind])
            self._check(name, entry)
            entries[name] = entry
        if refused:
            listing = "; ".join(
                f"{kind} ({len(names)}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for kind, names in sorted(refused.items())
            )
            raise WeightsError(
                f"{self._path} has tensors of types that are not supported: {listing}. Supported "
                f"are {', '.join(SUPPORTED_TYPES)}. Take another quantization of the model."
            )
        return entries

    def _check(self, name: str, entry: _Entry) -> None:
        """Refuses a tensor that does not lie inside the file in whole blocks."""
        block, block_bytes = GGML_QUANT_SIZES[entry.type]
        if not entry.shape or 0 in entry.shape or entry.shape[-1] % block:
            raise self._damaged(f"{name!r} of shape {list(entry.shape)} in {entry.type.name}")
        end = entry.offset + math.prod(entry.shape) // block * block_bytes
        if end > self._size:
            raise WeightsError(
                f"{self._path} is cut off: tensor {name!r} reaches to byte {end}, the file has "
                f"{self._size}. Download it again."
            )

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape (row-major), type number and offset of the next tensor."""
        name = self._string()
        dims = self._scalar("I")
        if dims > 4:
            raise self._damaged(f"tensor {name!r} with {dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        """Returns the next metadata value."""
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._damaged(f"metadata of type {kind}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind == _STRING:
            self._require(8 * count)
            return [self._string() for _ in range(count)]
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))
        raise self._damaged(f"a metadata array of type {item_kind}")

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"text that is not UTF-8 ({error.reason})") from None

    def _take(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def _require(self, count: int) -> None:
        position = self._file.tell()
        if position + count > self._size:
            raise WeightsError(
                f"{self._path} is cut off or damaged: its header needs {count} bytes at byte "
                f"{position}, the file has {self._size}. Download it again."
            )

    def _damaged(self, found: str) -> WeightsError:
        return WeightsError(f"{self._path} is damaged: its header has {found}. Download it again.")
