"""One way to look into a model on disk, whatever its format."""

import pathlib
from typing import Any, Protocol

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.weights.files import refuse_pickle
from qlora_jax.weights.gguf import GGUFCheckpoint
from qlora_jax.weights.names import Style
from qlora_jax.weights.safetensors import SafetensorsCheckpoint


class Checkpoint(Protocol):
    """Tensors on disk: their names and shapes are known, their contents are read on demand.

    Attributes:
      path: the folder or file.
      style: how the tensors are named.
      config: `config.json`, or GGUF's metadata.
    """

    path: pathlib.Path
    style: Style
    config: dict[str, Any]

    def names(self) -> list[str]:
        """Returns all names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `[out_features, in_features]` for a weight."""

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into memory of its own, in the row order of Hugging Face."""


def open_checkpoint(path: pathlib.Path | str) -> Checkpoint:
    """Opens a model on disk.

    Args:
      path: a Hugging Face folder (`config.json`, safetensors) or a GGUF file.

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
        return SafetensorsCheckpoint(path)
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
