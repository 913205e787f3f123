"""One way to look into a model on disk, whatever its format."""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.weights.bitsandbytes import BitsandbytesCheckpoint
from qlora_jax.weights.files import refuse_pickle
from qlora_jax.weights.gguf import GGUFCheckpoint
from qlora_jax.weights.names import Style
from qlora_jax.weights.packed import PackedFormat
from qlora_jax.weights.safetensors import SafetensorsCheckpoint, read_json
from qlora_jax.weights.stacked import StackedCheckpoint
from qlora_jax.weights.writing import JOURNAL


class Checkpoint(Protocol):
    """Tensors on disk: their names and shapes are known, their contents are read on demand.

    Attributes:
      path: the folder or file.
      style: the format, "hf" or "gguf".
      naming: how the tensors are named, a key of `names.NAMINGS`.
      config: `config.json`, or GGUF's metadata.
      formats: of the tensors that are in 4 bits already, by name.
    """

    path: pathlib.Path
    style: Style
    naming: str
    config: dict[str, Any]
    formats: Mapping[str, PackedFormat]

    def names(self) -> list[str]:
        """Returns all names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `[out_features, in_features]` for a weight."""

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives."""

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Reads one tensor, in the row order of Hugging Face; a 4-bit one as it is."""


def open_checkpoint(path: pathlib.Path | str) -> Checkpoint:
    """Opens a model on disk.

    Args:
      path: a Hugging Face folder (`config.json`, safetensors), also in 4 bits of bitsandbytes, a
        folder that scripts/quantize.py wrote, or a GGUF file.

    Returns:
      A checkpoint; only headers have been read.

    Raises:
      WeightsError: there is nothing, or something damaged, a pickle, or a format not supported.

    Example:
      >>> open_checkpoint("/nowhere/model")
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: /nowhere/model does not exist...
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist. Give a Hugging Face model folder or a .gguf file."
        )
    refuse_pickle(path)
    if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
        raise WeightsError(
            f"{path} is a part of a model folder. Give the folder {path.parent}, which also holds "
            "config.json and tokenizer.json."
        )
    return GGUFCheckpoint(path)


def _open_folder(path: pathlib.Path) -> Checkpoint:
    """Opens a folder as what its `config.json` says it is."""
    if (path / JOURNAL).exists() and not (path / "config.json").exists():
        raise WeightsError(
            f"{path} is not finished: scripts/quantize.py was stopped while it wrote it. Run the "
            "same command again; it continues."
        )
    config = read_json(path / "config.json", "the model's configuration")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        quantization = {}
    method = quantization.get("quant_method", "an unnamed method")
    if not quantization:
        return SafetensorsCheckpoint(path)
    if method == StackedCheckpoint.METHOD:
        return StackedCheckpoint(path)
    if method == "bitsandbytes" and quantization.get("load_in_4bit"):
        return BitsandbytesCheckpoint(path)
    bits = " in 8 bits" if quantization.get("load_in_8bit") else ""
    raise WeightsError(
        f"{path} is quantized already{bits} (quant_method {method!r} in config.json). Give the "
        "original 16- or 32-bit model, which is quantized to 4 bits while it is loaded, or a 4-bit "
        "one of bitsandbytes."
    )
