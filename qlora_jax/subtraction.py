"""What goes out of the weights while a base is loaded, kept so that the base can be made again.

With PiSSA, OLoRA and LoftQ (``qlora_jax.weight_inits``) the 4-bit base is not that of the original
weights. `load_model` hands every dense weight to a `Prepare` before it is quantized:
`InitFromWeights` decomposes it, one weight at a time, and `Subtract` only takes out again what was
once taken out, so that a saved adapter finds the very base it was trained on, to the bit. Between
the two is one file:

    subtracted.safetensors    <path>/lora_a [*L, in, r] and <path>/lora_b [*L, r, out] in float32
"""

from __future__ import annotations

import os
import pathlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.errors import CheckpointError, WeightsError
from qlora_jax.lora import Adapter, lora_scaling
from qlora_jax.nnx_linear import QLoRALinear, SubtractedParam
from qlora_jax.tree import join_path
from qlora_jax.weight_inits import init_from_weight, subtract
from qlora_jax.weights import Slot
from qlora_jax.weights.safetensors import read_entry
from qlora_jax.weights.safetensors_header import read_header

SUBTRACTED_FILE = "subtracted.safetensors"
Adapters = dict[str, Adapter]


class Prepare(Protocol):
    """Changes a weight before it is quantized."""

    def __call__(self, slot: Slot, weight: np.ndarray, format: Mapping[str, Any]) -> np.ndarray:
        """Returns the weight to quantize.

        Args:
            slot: its place in the model.
            weight: dense, (out, in).
            format: ``quant_type``, ``block_size`` and ``double_quant`` that it will get.
        """


class InitFromWeights:
    """Makes the adapter of every weight that is quantized.

    Attributes:
        adapters: what training begins with, by the path of the layer, once the model is loaded.
        subtracted: what was taken out of the base; empty: nothing.
    """

    def __init__(
        self,
        init: str,
        *,
        rank: int,
        alpha: float,
        use_rslora: bool = False,
        dtype: DTypeLike = jnp.float32,
        loftq_iterations: int = 1,
    ):
        """Takes the arguments of ``init_from_weight``."""
        self._options = dict(
            rank=rank,
            alpha=alpha,
            use_rslora=use_rslora,
            dtype=dtype,
            loftq_iterations=loftq_iterations,
        )
        self._init, self._scaling = init, lora_scaling(rank, alpha, use_rslora)
        self._adapters: dict[str, dict[int | None, Adapter]] = defaultdict(dict)
        self._subtracted: dict[str, dict[int | None, Adapter]] = defaultdict(dict)

    def __call__(self, slot: Slot, weight: np.ndarray, format: Mapping[str, Any]) -> np.ndarray:
        """See `Prepare`."""
        found = init_from_weight(weight, self._init, **self._options, **format)
        place = slot.path.removesuffix("/kernel")
        # On the host, so that a GPU holds the base and the adapters only once.
        self._adapters[place][slot.layer] = _on_host(found.adapter)
        if found.subtracted is None:
            return weight
        if found.subtracted is found.adapter:
            self._subtracted[place][slot.layer] = self._adapters[place][slot.layer]
        else:
            self._subtracted[place][slot.layer] = _on_host(found.subtracted)
        return subtract(weight, self._subtracted[place][slot.layer], self._scaling)

    @property
    def adapters(self) -> Adapters:
        """See the class."""
        return {place: _stacked(layers) for place, layers in self._adapters.items()}

    @property
    def subtracted(self) -> Adapters:
        """See the class."""
        return {place: _stacked(layers) for place, layers in self._subtracted.items()}


class Subtract:
    """Takes out of each weight what was taken out of it before."""

    def __init__(self, subtracted: Adapters, scaling: float):
        """Takes what `read_subtracted` gives, and LoRA's scaling."""
        self._subtracted, self._scaling = subtracted, scaling

    def __call__(self, slot: Slot, weight: np.ndarray, format: Mapping[str, Any]) -> np.ndarray:
        """See `Prepare`."""
        place = slot.path.removesuffix("/kernel")
        if place not in self._subtracted:
            return weight
        adapter = self._subtracted[place]
        if slot.layer is not None:
            adapter = {name: matrix[slot.layer] for name, matrix in adapter.items()}
        return subtract(weight, adapter, self._scaling)


def write_subtracted(path: pathlib.Path, subtracted: Adapters) -> None:
    """Writes what was taken out of a base; the file is there whole or not at all.

    Raises:
        WeightsError: it cannot be written.
    """
    arrays = {
        f"{place}/{name}": np.ascontiguousarray(matrix, np.float32)
        for place, adapter in subtracted.items()
        for name, matrix in adapter.items()
    }
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        safetensors.numpy.save_file(arrays, partial)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{path} cannot be written: {error}. Make room and try again.") from None


def read_subtracted(path: pathlib.Path) -> Adapters:
    """Reads what was taken out of a base.

    Raises:
        CheckpointError: the file is not there.
        WeightsError: it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the run's base is the original model less what is in that file, "
            "and the adapter fits no other. Restore it, or train again in a new --workdir."
        )
    adapters: Adapters = defaultdict(dict)
    for name, entry in read_header(path).items():
        place, _, matrix = name.rpartition("/")
        adapters[place][matrix] = read_entry(entry)
    return dict(adapters)


def set_adapters(model: nnx.Module, adapters: Mapping[str, Adapter]) -> None:
    """Gives the adapters of a model other values; DoRA's magnitudes follow.

    Args:
        model: made by ``apply_qlora``; changed in place.
        adapters: ``lora_a`` and ``lora_b`` by the path of the layer.
    """
    for path, linear in nnx.iter_graph(model):
        if isinstance(linear, QLoRALinear) and (adapter := adapters.get(join_path(path))):
            linear.lora_a = nnx.LoRAParam(jnp.asarray(adapter["lora_a"]))
            linear.lora_b = nnx.LoRAParam(jnp.asarray(adapter["lora_b"]))
            if linear.lora_magnitude is not None:
                linear.add_magnitude()


def set_subtracted(model: nnx.Module, adapters: Mapping[str, Adapter]) -> None:
    """Tells the layers of a model what was taken out of their weights; see ``original_adapter``.

    Args:
        model: made by ``apply_qlora``; changed in place.
        adapters: ``lora_a`` and ``lora_b`` by the path of the layer.
    """
    for path, linear in nnx.iter_graph(model):
        if isinstance(linear, QLoRALinear) and (adapter := adapters.get(join_path(path))):
            linear.subtracted_a = SubtractedParam(jnp.asarray(adapter["lora_a"]))
            linear.subtracted_b = SubtractedParam(jnp.asarray(adapter["lora_b"]))


def _on_host(adapter: Adapter) -> Adapter:
    return {name: np.asarray(matrix) for name, matrix in adapter.items()}


def _stacked(layers: Mapping[int | None, Adapter]) -> Adapter:
    if None in layers:
        return layers[None]
    names = ("lora_a", "lora_b")
    return {name: np.stack([layers[i][name] for i in range(len(layers))]) for name in names}
