"""This project's own packed checkpoint: the arrays of the model as they are in memory.

A folder that `scripts/quantize.py` writes once, so that later runs neither quantize nor copy:

    config.json, tokenizer.json, …   as in the original; config.json says what the folder is
    qlora_jax.json                   version, format, fingerprint, size and hash of each file
    model-00001-of-00007.safetensors

The safetensors hold one tensor for each array of the model, named by its path: dense ones
(`embed_tokens/embedding`) in the dtype of the original, and of a 4-bit kernel `<path>.codes`,
`.absmax`, `.nested_absmax` and `.offset` (see `QuantizedTensor`). All layers of a projection are
one array, in planar order. So a file can be mapped into memory and its bytes used where they are:
on a CPU loading takes no time and no memory of its own, to a GPU they are copied directly. Pages of
a mapped file are the kernel's to drop and to read again; the file must not be changed meanwhile.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.quantized import QuantizedTensor, abstract_quantized
from qlora_jax.weights.files import file_size
from qlora_jax.weights.packed import PackedFormat
from qlora_jax.weights.safetensors import DTYPES, Entry, SafetensorsCheckpoint, read_json

INDEX = "qlora_jax.json"
VERSION = 1
PARTS = ("codes", "absmax", "nested_absmax", "offset")


class StackedCheckpoint(SafetensorsCheckpoint):
    """A folder of stacked arrays; names are paths in the model.

    Attributes:
      METHOD: `quant_method` in `config.json`.
      formats: of the 4-bit kernels by path.
      fingerprint: of the base (`qlora_jax.loading.base_fingerprint`).
    """

    METHOD = "qlora_jax"

    def __init__(self, path: pathlib.Path):
        """Reads the index and the headers, and checks that they agree.

        Args:
          path: the folder.

        Raises:
          WeightsError: something is missing, damaged, or of a later version.
        """
        super().__init__(path)
        index = read_json(path / INDEX, "the index of the packed checkpoint")
        if index.get("version") != VERSION:
            raise WeightsError(
                f"{path / INDEX} has version {index.get('version')!r}, this is made for "
                f"{VERSION}. Update qlora_jax, or quantize the original model again."
            )
        try:
            self.fingerprint = str(index["base_fingerprint"])
            for name, said in index["files"].items():
                size = file_size(path / name) if (path / name).exists() else None
                if size != said["bytes"]:
                    raise ValueError(f"{name} has {size} bytes, must have {said['bytes']}")
            self._kernels = {
                kernel: self._abstract(kernel, said) for kernel, said in index["kernels"].items()
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise WeightsError(
                f"{path} is damaged: {said}. Quantize the original model again."
            ) from None
        self.formats = {kernel: PackedFormat.of(q) for kernel, q in self._kernels.items()}

    def names(self) -> list[str]:
        """Returns the paths of all arrays of the model."""
        dense = [name for name in self._entries if name.rpartition(".")[0] not in self._kernels]
        return [*dense, *self._kernels]

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, of a 4-bit kernel the one it had before."""
        return np.dtype(self._kernels[name].dtype) if name in self._kernels else super().dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Maps an array of the model; nothing is read until it is used.

        Args:
          name: one of `names()`.

        Returns:
          A read-only array, or a `QuantizedTensor` of such arrays with the axis of the layers.
        """
        if name not in self._kernels:
            return map_entry(self._entries[name])
        q = self._kernels[name]
        entries = [self._entries.get(f"{name}.{part}") for part in PARTS]
        arrays = [entry and map_entry(entry) for entry in entries]
        return QuantizedTensor(*arrays, q.quant_type, q.block_size, q.shape, q.dtype)

    def _abstract(self, kernel: str, said: Mapping[str, Any]) -> QuantizedTensor:
        """The shapes that a kernel must have, compared with those of the files."""
        layers = said["layers"]
        q = abstract_quantized(
            tuple(said["shape"]),
            leading_shape=() if layers is None else (layers,),
            quant_type=said["quant_type"],
            block_size=said["block_size"],
            double_quant=said["double_quant"],
            dtype=DTYPES[said["dtype"]],
        )
        for part in PARTS:
            leaf, entry = getattr(q, part), self._entries.get(f"{kernel}.{part}")
            wanted = None if leaf is None else (tuple(leaf.shape), np.dtype(leaf.dtype))
            found = None if entry is None else (entry.shape, entry.dtype)
            if wanted != found:
                raise ValueError(f"{kernel}.{part} is {found}, must be {wanted}")
        return q


def map_entry(entry: Entry) -> np.ndarray:
    """A tensor's bytes in the file as a read-only array; nothing is read until it is used."""
    return np.memmap(entry.path, entry.dtype, "r", entry.offset, entry.shape).view(np.ndarray)
