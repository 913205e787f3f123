"""This project's own packed checkpoint: the arrays of the model as they are in memory.

A folder that `scripts/quantize.py` writes once, so that later runs neither quantize nor copy:

    config.json, tokenizer.json, …   as in the original; config.json says what the folder is
    qlora_jax.json                   version, format, fingerprint, size and hash of each file
    qlora_jax_checksums.json         see `checksums`; older folders have none
    model-00001-of-00007.safetensors

The safetensors hold one tensor for each array of the model, named by its path: dense ones
(`embed_tokens/embedding`) in the dtype of the original, and of a 4-bit kernel `<path>.codes`,
`.absmax`, `.nested_absmax` and `.offset` (see `QuantizedTensor`). All layers of a projection are
one array, in planar order; where they differ in format (`qlora_jax.mixed`) there is one array for
each, `<path>[0,3]` for layers 0 and 3, and the version is 2. So a file can be mapped into memory
and its bytes used where they are: on a CPU loading takes no time and no memory of its own, to a GPU
they are copied directly. Pages of a mapped file are the kernel's to drop and to read again; the
file must not be changed meanwhile.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.mixed import MixedStack, one_format_each, part_name
from qlora_jax.quantized import QuantizedTensor, abstract_quantized
from qlora_jax.weights.files import file_size
from qlora_jax.weights.packed import MixedFormat, PackedFormat
from qlora_jax.weights.safetensors import SafetensorsCheckpoint, read_json
from qlora_jax.weights.safetensors_header import DTYPES, Entry

INDEX = "qlora_jax.json"
VERSIONS = (1, 2)  # 2: layers of a projection may differ
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
        if index.get("version") not in VERSIONS:
            raise WeightsError(
                f"{path / INDEX} has version {index.get('version')!r}, this is made for "
                f"at most {VERSIONS[-1]}. Update qlora_jax, or quantize the original model again."
            )
        try:
            self.fingerprint = str(index["base_fingerprint"])
            for name, said in index["files"].items():
                if pathlib.PurePath(name).name != name:
                    raise ValueError(f"it names the file {name!r}, which is not in that folder")
                size = file_size(path / name) if (path / name).exists() else None
                if size != said["bytes"]:
                    raise ValueError(f"{name} has {size} bytes, must have {said['bytes']}")
            self._kernels = {
                kernel: self._abstract(kernel, said) for kernel, said in index["kernels"].items()
            }
            self._mixed = {
                path: self._abstract_mixed(path, places)
                for path, places in index.get("mixed", {}).items()
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise WeightsError(
                f"{path} is damaged: {said}. Quantize the original model again."
            ) from None
        parts = dict(one_format_each(self._mixed))
        formats = {k: PackedFormat.of(q) for k, q in self._kernels.items() if k not in parts}
        mixed = {path: MixedFormat.of_stack(stack) for path, stack in self._mixed.items()}
        self.formats: dict[str, PackedFormat | MixedFormat] = formats | mixed

    def names(self) -> list[str]:
        """Returns the paths of all arrays of the model."""
        dense = [name for name in self._entries if name.rpartition(".")[0] not in self._kernels]
        parts = dict(one_format_each(self._mixed))
        return [*(name for name in [*dense, *self._kernels] if name not in parts), *self._mixed]

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, of a 4-bit kernel the one it had before."""
        if name in self._mixed:
            name = next(one_format_each({name: self._mixed[name]}))[0]
        return np.dtype(self._kernels[name].dtype) if name in self._kernels else super().dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor | MixedStack:
        """Maps an array of the model, and reads it once where there are hashes to compare with.

        Args:
          name: one of `names()`.

        Returns:
          A read-only array, or a `QuantizedTensor` of such arrays with the axis of the layers, or
          a `MixedStack` of both.
        """
        if name in self._mixed:
            stack = self._mixed[name]
            parts = tuple(self.read(part) for part, _ in one_format_each({name: stack}))
            return dataclasses.replace(stack, parts=parts)
        if name not in self._kernels:
            return self._map(name)
        q = self._kernels[name]
        parts = [f"{name}.{part}" for part in PARTS]
        arrays = [self._map(part) if part in self._entries else None for part in parts]
        return QuantizedTensor(*arrays, q.quant_type, q.block_size, q.shape, q.dtype)

    def _map(self, name: str) -> np.ndarray:
        """A tensor of the files."""
        return self._verified(name, self._entries[name], map_entry(self._entries[name]))

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

    def _abstract_mixed(self, path: str, places: list[list[int]]) -> MixedStack:
        """The shapes of a projection whose layers differ, put together from those of its parts."""
        names = [part_name(path, layers) for layers in places]
        if sorted(sum(places, [])) != list(range(len(sum(places, [])))):
            raise ValueError(f"{path} has the layers {places}")
        parts = []
        for name, layers in zip(names, places, strict=True):
            part = self._kernels.get(name)
            if part is None:
                entry = self._entries[name]
                part = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            leading = part.leading_shape if name in self._kernels else part.shape[:1]
            if tuple(leading) != (len(layers),):
                raise ValueError(f"{name} has {leading} layers, must have {len(layers)}")
            parts.append(part)
        return MixedStack(tuple(parts), None, tuple(map(tuple, places)))


def map_entry(entry: Entry) -> np.ndarray:
    """A tensor's bytes in the file as a read-only array; nothing is read until it is used."""
    return np.memmap(entry.path, entry.dtype, "r", entry.offset, entry.shape).view(np.ndarray)
