"""A merged model as a checkpoint that exists in no file: each tensor is made when it is read.

An adapter was trained on weights that had been rounded to 4 bits, dequantize(W4), and has learned
to make up for that rounding. So there are two models that can be meant by "merged":

    dequantize(W4) + delta    what was trained, to the rounding of the file's dtype
    W16 + delta               better weights, but not those that the adapter knows

`MergedCheckpoint` gives either, one tensor at a time and under Hugging Face's names, to whatever
reads checkpoints: the writers of folders and of GGUF, and the evaluation.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qlora_jax.conversion import Rule, check_finite
from qlora_jax.errors import ConfigError
from qlora_jax.hf_folder import model_config
from qlora_jax.layer_formats import packed_linears
from qlora_jax.loading import frozen_variables, slots
from qlora_jax.lora import Adapter, is_quantized, lora_scaling, merged_kernel
from qlora_jax.mixed import MixedStack, take_layer
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.quantized import QuantizedTensor, dequantize
from qlora_jax.tree import join_path
from qlora_jax.vocabulary import Int8Rows, dequantize_rows
from qlora_jax.weights import Checkpoint, PackedFormat, Slot
from qlora_jax.weights.matching import read_slot, slot_names
from qlora_jax.weights.names import naming_of, tensor_name


class MergedCheckpoint:
    """The tensors of a model with its adapters merged, computed when they are read.

    Attributes:
      path: of the model that was adapted.
      style: "hf".
      naming: that of the family.
      config: the `config.json` of the merged model.
      formats: of tensors in 4 bits; there are none.
    """

    style = "hf"

    def __init__(
        self,
        model: nnx.Module,
        source: Checkpoint,
        *,
        original: Checkpoint | None = None,
        dtype: DTypeLike = np.float32,
    ):
        """Takes the parts; nothing is computed yet.

        Args:
          model: with adapters, as it was trained; its 4-bit weights are the base.
          source: the checkpoint that it was loaded from, for what is not in 4 bits.
          original: a checkpoint in 16 bits or more whose weights are to be the base instead.
          dtype: of all tensors; they are computed in float32 and rounded once.

        Raises:
          ConfigError: the model has no adapter, or `original` is in 4 bits.
        """
        if original is not None and packed_linears(original):
            raise ConfigError(
                f"{original.path} is in 4 bits, so it cannot be the original weights. Give the "
                "model that was quantized, or merge into the weights that were trained on."
            )
        self._linears = {
            join_path(path) + "/kernel": node
            for path, node in nnx.iter_graph(model)
            if isinstance(node, QLoRALinear) and node.rank
        }
        if not self._linears:
            raise ConfigError("the model has no adapter, so there is nothing to merge.")
        self.path: pathlib.Path = source.path
        self.formats: dict[str, PackedFormat] = {}
        self.source, self._original, self._dtype = source, original, np.dtype(dtype)
        self._stored = original or source
        self._stored_names = slot_names(self._stored)
        self._variables = frozen_variables(model)
        found = dict(slots(self._variables))
        self.config: dict[str, Any] = model_config(source) | {"torch_dtype": self._dtype.name}
        self.config.pop("dtype", None)  # transformers 5 writes this name, and reads both
        self.naming = naming_of(self.config["model_type"], "hf")
        self._slots = {tensor_name(slot, self.naming): slot for slot in found}
        self._shapes = {tensor_name(slot, self.naming): shape for slot, shape in found.items()}

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._slots)

    def slot(self, name: str) -> Slot:
        """Returns a tensor's place in the model."""
        return self._slots[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, `[out_features, in_features]` for a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives: the same for all."""
        return self._dtype

    def read(self, name: str) -> np.ndarray:
        """Computes one tensor.

        Args:
          name: one of `names()`.

        Returns:
          The rounded values.

        Raises:
          WeightsError: a value is infinite in the dtype, or NaN.
        """
        slot = self._slots[name]
        base = self._base(slot)
        linear = self._linears.get(slot.path)
        if linear is not None:
            index = () if slot.layer is None else slot.layer
            # Where something was taken out of the weights, the original ones get it back.
            adapter = linear.adapter if self._original is None else linear.original_adapter[0]
            adapter = {name: matrix[index] for name, matrix in adapter.items()}
            scaling = lora_scaling(linear.rank, linear.alpha, linear.use_rslora)
            base = _merge(base, adapter, scaling)
        elif is_quantized(base):
            base = dequantize(base, jnp.float32)
        value = np.asarray(base)
        check_finite(value, Rule(value.shape, self._dtype), f"{self.path}, merged: {name}")
        return value.astype(self._dtype, copy=False)

    def _base(self, slot: Slot) -> np.ndarray | QuantizedTensor:
        """The tensor without an adapter: as it was trained on, or as it was before."""
        value = self._variables[slot.path].get_value()
        if self._original is None or slot.path not in self._linears:
            if isinstance(value, QuantizedTensor | MixedStack) and slot.layer is not None:
                value = take_layer(value, slot.layer)
            if is_quantized(value):
                return value
        if isinstance(value, Int8Rows) and self._original is None:
            return np.asarray(dequantize_rows(value))
        # What is in 16 bits has the compute dtype in the model, and its own in the file.
        return read_slot(self._stored, self._stored_names.get(slot), slot)


@functools.partial(jax.jit, static_argnames="scaling")
def _merge(
    base: QuantizedTensor | Float[Array, "N K"], adapter: Adapter, scaling: float
) -> Float[Array, "N K"]:
    dense = dequantize(base, jnp.float32) if is_quantized(base) else base.astype(jnp.float32)
    return merged_kernel(dense.T, adapter, scaling).T
