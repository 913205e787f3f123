"""Hugging Face folders: `config.json` with one or many safetensors files.

A safetensors file is 8 bytes with the header's length, a JSON header of names, dtypes, shapes and
byte ranges, and the tensors. Reading it here takes thirty lines, gives bfloat16 without torch, and
keeps no page of the file in memory (see `files.py`).
"""

import json
import math
import pathlib
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.models import families
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights.files import (
    PICKLE_SUFFIXES,
    explain_bytes,
    file_size,
    read_array,
    refuse_pickle,
)
from qlora_jax.weights.fused import FUSED_NAMINGS, find_fused, fused_modules, piece_name
from qlora_jax.weights.names import naming_of
from qlora_jax.weights.packed import PackedFormat

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: of the file.
      offset: of its first byte.
      shape: of the tensor.
      dtype: of the tensor.
      runs: into how many runs of equal length its bytes are divided.
      step: bytes from the start of one run to that of the next.
    """

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    runs: int = 1
    step: int = 0


class SafetensorsCheckpoint:
    """The tensors of a Hugging Face folder, read one at a time.

    Attributes:
      path: the folder.
      style: "hf", the format.
      naming: how the family names its tensors.
      config: the contents of `config.json`; of a model that also sees pictures, of its language
        model.
      formats: of the 4-bit tensors by name; there are none here.
    """

    style = "hf"

    def __init__(self, path: pathlib.Path):
        """Reads the headers of all files; no tensor yet.

        Args:
          path: a folder with `config.json` and `model.safetensors` or its index.

        Raises:
          WeightsError: something is missing, damaged or a pickle.
        """
        self.path = path
        config = read_json(path / "config.json", "the model's configuration")
        self.config = families.text_config(config)
        self.naming = naming_of(self.config.get("model_type"), "hf")
        self.formats: dict[str, PackedFormat] = {}
        self._entries: dict[str, Entry] = {}
        for file, wanted in _find_shards(path).items():
            found = read_header(file)
            if wanted is not None and (absent := wanted - found.keys()):
                raise WeightsError(
                    f"{file} lacks {len(absent)} tensors that model.safetensors.index.json says "
                    f"are in it: {', '.join(sorted(absent)[:10])}. Download both files again."
                )
            self._entries |= found
        self._entries = _split_fused(self._entries, self.config)

    def names(self) -> list[str]:
        """Returns the names of all tensors in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `[out_features, in_features]` for a weight."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives, which is the file's."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into memory of its own.

        Args:
          name: one of `names()`.

        Returns:
          The tensor in the file's dtype, bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
          WeightsError: the file has become shorter than its header says.
        """
        return read_entry(self._entries[name])


def read_entry(entry: Entry) -> np.ndarray:
    """Reads a tensor from its place into memory of its own."""
    with open(entry.path, "rb", buffering=0) as file:
        if entry.runs == 1:
            return read_array(file, entry.offset, entry.shape, entry.dtype)
        shape = (entry.shape[0] // entry.runs, *entry.shape[1:])
        offsets = [entry.offset + run * entry.step for run in range(entry.runs)]
        return np.concatenate([read_array(file, start, shape, entry.dtype) for start in offsets])


def _split_fused(entries: dict[str, Entry], config: dict[str, Any]) -> dict[str, Entry]:
    """Puts the pieces of fused tensors in their place; see `weights.fused`."""
    if naming_of(config.get("model_type"), "hf") not in FUSED_NAMINGS:
        return entries
    modules = fused_modules(LlamaConfig.from_hf(config))
    split: dict[str, Entry] = {}
    for name, entry in entries.items():
        fused = find_fused(name, modules)
        if fused is None or entry.shape[:1] != (fused.rows,):
            split[name] = entry
            continue
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        step, offset = sum(fused.sizes) * row, entry.offset
        for index, size in enumerate(fused.sizes):
            shape = (fused.piece_rows(index), *entry.shape[1:])
            piece = Entry(entry.path, offset, shape, entry.dtype, fused.groups, step)
            split[piece_name(name, index)] = piece
            offset += size * row
    return split


def read_json(path: pathlib.Path, purpose: str) -> dict[str, Any]:
    """Reads a JSON object from a model's folder.

    Args:
      path: of the file.
      purpose: what the file is for, for the message.

    Returns:
      The object.

    Raises:
      WeightsError: there is no such file, or it holds no JSON object.

    Example:
      >>> read_json(pathlib.Path("/nowhere/config.json"), "the model's configuration")
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: /nowhere/config.json (the model's configuration) is missing...
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"{path} ({purpose}) is missing. A Hugging Face model folder holds config.json, "
            "tokenizer.json and model.safetensors (or its shards and index)."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} ({purpose}) is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} ({purpose}) holds {type(value).__name__}, not a JSON object.")
    return value


def _find_shards(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Returns the safetensors files, each with the names the index expects in it."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if single.is_file():
            return {single: None}
        raise WeightsError(_explain_no_weights(path))
    weight_map = read_json(index, "the index of the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no 'weight_map' from tensor names to files.")
    shards: dict[pathlib.Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise WeightsError(
                f"{index}: {name!r} is in {file!r}; expected is the name of a file in that folder."
            )
        shards.setdefault(path / file, set()).add(name)
    if missing := sorted(file.name for file in shards if not file.is_file()):
        raise WeightsError(
            f"{path} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}. "
            "Download them into the folder."
        )
    return dict(sorted(shards.items()))


def _explain_no_weights(path: pathlib.Path) -> str:
    """Says what a folder without safetensors has instead."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    if pickles := [file for file in files if file.suffix.lower() in PICKLE_SUFFIXES]:
        refuse_pickle(pickles[0])
    if ggufs := [file.name for file in files if file.suffix.lower() == ".gguf"]:
        return f"{path} holds GGUF files; give one of them: {', '.join(ggufs)}."
    names = ", ".join(file.name for file in files[:10]) or "no files"
    return (
        f"{path} has neither model.safetensors nor model.safetensors.index.json (it has {names}). "
        "Give a folder with the model's safetensors files, or a .gguf file."
    )


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """Reads one file's header and checks that every tensor lies inside the file.

    Args:
      path: of the file.

    Returns:
      The place of each tensor by its name.

    Raises:
      WeightsError: the file is damaged, cut off, or no safetensors file.
    """
    refuse_pickle(path)
    size = file_size(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise WeightsError(explain_bytes(path, "a safetensors file"))
        if 8 + length > size:
            raise WeightsError(
                f"{path} is cut off: its header has {length} bytes, the file only {size}. "
                "Download it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {name: _parse_entry(path, 8 + length, info) for name, info in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{explain_bytes(path, 'a safetensors file')} Its header cannot be read: {error!r}."
        ) from None


def _parse_entry(path: pathlib.Path, start: int, info: dict[str, Any]) -> Entry:
    """Turns one header entry into a place in the file."""
    if (dtype := DTYPES.get(info["dtype"])) is None:
        raise ValueError(f"unknown dtype {info['dtype']}, known are {', '.join(DTYPES)}")
    shape = tuple(int(dim) for dim in info["shape"])
    begin, end = info["data_offsets"]
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
        raise ValueError(f"{end - begin} bytes for {info['dtype']} {list(shape)}, not {nbytes}")
    if start + end > file_size(path):
        raise WeightsError(
            f"{path} is cut off: a tensor reaches to byte {start + end}, the file has "
            f"{file_size(path)}. Download it again."
        )
    return Entry(path, start + begin, shape, dtype)
