"""A model that is run from its file, one layer at a time, so that it never has to fit into memory.

Measuring a 16-bit model must not need the memory of a 16-bit model, where making it did not. All
held-out rows go through one layer before the next layer is read:

    x = embed(tokens)
    for each layer:  read its tensors;  x = layer(x), for every batch
    logits = head(norm(x)), a piece at a time

Beside embedding and head, there is one layer in memory. It serves any checkpoint: 16 bits, 4 bits,
GGUF, also one that exists in no file (`qlora_jax.merging`).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import release_unused_memory
from qlora_jax.conversion import Rule, convert
from qlora_jax.layer_formats import formats_of_layer, packed_linears, quantize_as
from qlora_jax.loading import frozen_variables, read_config
from qlora_jax.models.llama import Llama
from qlora_jax.weights import Checkpoint, Slot
from qlora_jax.weights.matching import read_slot, slot_names
from qlora_jax.weights.packed import MixedFormat

Batch = Mapping[str, Array]


class StreamedModel:
    """A `Llama` with one layer at a time.

    Attributes:
      config: of the whole model.
      model: embedding, norm and head, and the layer that was read last.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: DTypeLike):
        """Reads what is not in the layers.

        Args:
          checkpoint: an open model of any kind.
          dtype: of the computation.
        """
        self.checkpoint, self.config = checkpoint, read_config(checkpoint)
        self._names = slot_names(checkpoint)
        one = dataclasses.replace(self.config, num_hidden_layers=1, full_attention_layers=())
        model = nnx.eval_shape(
            lambda: Llama(one, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat="none")
        )
        self._dense, self._packed = model, packed_linears(checkpoint)
        self.model = quantize_as(model, formats_of_layer(self._packed, 0))
        self._fill(None)

    def hidden_states(self, batches: Sequence[Batch]) -> list[Float[Array, "B T D"]]:
        """What `Llama.hidden_states` gives for each batch.

        Args:
          batches: `tokens`, `positions` and `segment_ids`, int32 [B, T], all of one shape.
        """
        xs = [
            self.model.embed(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]))
            for batch in batches
        ]
        for layer in range(self.config.num_hidden_layers):
            self._fill(layer)
            # A layer of the whole model is the only one here, so it is layer 0.
            full = (0,) if layer in self.config.full_attention_layers else ()
            self.model.config = dataclasses.replace(self.model.config, full_attention_layers=full)
            graphdef, state = nnx.split(self.model)
            for i, batch in enumerate(batches):
                xs[i] = _apply_layer(
                    graphdef, state, xs[i], batch["positions"], batch["segment_ids"]
                )
            jax.block_until_ready(xs)
            del state
        return [self.model.norm(x) for x in xs]

    def _fill(self, layer: int | None) -> None:
        """Reads a layer, or what is outside of the layers."""
        if layer is not None and any(isinstance(k, MixedFormat) for k in self._packed.values()):
            kinds = formats_of_layer(self._packed, layer)
            self.model.layers = quantize_as(nnx.clone(self._dense), kinds).layers
        for path, variable in frozen_variables(self.model).items():
            if path.startswith("layers/") == (layer is None):
                continue
            slot = Slot(path, layer)
            rule = Rule.of(slot, variable.get_value())
            weight = read_slot(self.checkpoint, self._names.get(slot), slot)
            value = convert(weight, rule)
            if layer is not None:
                value = jax.tree.map(lambda leaf: leaf[None], value)
            variable.set_value(jax.block_until_ready(value))
            # As in `fill_model`: on the CPU JAX uses the file's bytes in place.
            del weight, value
            gc.collect(0)
        if not layer:
            release_unused_memory()


@functools.partial(jax.jit, static_argnames="graphdef")
def _apply_layer(graphdef, state, x, positions, segment_ids):
    model = nnx.merge(graphdef, state)
    return model.layer_outputs(x, positions=positions, segment_ids=segment_ids)
