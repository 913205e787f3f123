"""Hugging Face folders: `config.json` with one or many safetensors files.

What is in a file is said by its header, which is read and checked in `safetensors_header.py`; the
tensors are then read from their places, one at a time, bfloat16 without torch, and no page of the
file stays in memory (see `files.py`).
"""

import math
import pathlib
from typing import Any

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import (
    MAX_INDEX_BYTES,
    MAX_JSON_BYTES,
    check_inside,
    read_json_object,
)
from qlora_jax.models import families
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights.checksums import Checksums
from qlora_jax.weights.files import PICKLE_SUFFIXES, read_array, refuse_pickle
from qlora_jax.weights.fused import FUSED_NAMINGS, find_fused, fused_modules, piece_name
from qlora_jax.weights.names import naming_of
from qlora_jax.weights.packed import PackedFormat
from qlora_jax.weights.safetensors_header import Entry, read_header


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
        self._checksums = Checksums.read(path)
        config = read_json(path / "config.json", "the model's configuration")
        self.config = families.text_config(config)
        self.naming = naming_of(self.config.get("model_type"), "hf")
        self.formats: dict[str, PackedFormat] = {}
        self._entries: dict[str, Entry] = {}
        for file, wanted in _find_shards(path).items():
            check_inside(file)
            found = read_header(file)
            if wanted is not None and (absent := wanted - found.keys()):
                raise WeightsError(
                    f"{file} lacks {len(absent)} tensors that model.safetensors.index.json says "
                    f"are in it: {', '.join(sorted(absent)[:10])}. Download both files again."
                )
            if twice := self._entries.keys() & found.keys():
                raise WeightsError(
                    f"{file} and another file have the tensor {min(twice)!r}. Download them again."
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
        return self._verified(name, self._entries[name], read_entry(self._entries[name]))

    def _verified(self, name: str, entry: Entry, array: np.ndarray) -> np.ndarray:
        """An array that was read, compared with its hash in a folder that has hashes."""
        if self._checksums is not None:
            self._checksums.check(entry.path, entry.offset, array, name)
        return array


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


def read_json(path: pathlib.Path, purpose: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a model's folder.

    Args:
      path: of the file.
      purpose: what the file is for, for the message.
      max_bytes: more than such a file has.

    Returns:
      The object.

    Raises:
      WeightsError: there is no such file, it leads out of its folder, or it holds no JSON object.

    Example:
      >>> read_json(pathlib.Path("/nowhere/config.json"), "the model's configuration")
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: /nowhere/config.json (the model's configuration) is missing...
    """
    try:
        return read_json_object(path, max_bytes)
    except FileNotFoundError:
        raise WeightsError(
            f"{path} ({purpose}) is missing. A Hugging Face model folder holds config.json, "
            "tokenizer.json and model.safetensors (or its shards and index)."
        ) from None


def _find_shards(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Returns the safetensors files, each with the names the index expects in it."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if single.is_file():
            return {single: None}
        raise WeightsError(_explain_no_weights(path))
    said = read_json(index, "the index of the shards", MAX_INDEX_BYTES)
    weight_map = said.get("weight_map")
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
