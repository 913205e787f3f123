"""The linear layers of a model as transformers, and so PEFT, has them.

In most families these are the projections of the model. Where transformers keeps several
projections in one layer (`weights.fused`), PEFT has one adapter for all of them:

    [Wq; Wk; Wv] + s [Bq; Bk; Bv] A          one A, and the rows of B belong to the projections

So reading is exact: every projection gets the same A and its rows of B. Writing is exact, too, at
the price of a higher rank, because projections that were trained here have each its own A:

    [Bq Aq; Bk Ak; Bv Av] = diag(Bq, Bk, Bv) [Aq; Ak; Av]

Where they still have the same A, in all layers, it is written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from qlora_jax.errors import ConfigError
from qlora_jax.lora import lora_scaling
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.weights import Slot
from qlora_jax.weights.fused import Fused, find_fused, fused_modules, whole_module
from qlora_jax.weights.names import find_slot, naming_of, tensor_name


class Layer(NamedTuple):
    """One layer of a projection in transformers' model.

    Attributes:
      name: of the linear layer there.
      fused: how that is made up of several projections; None: it is this one.
      piece: which of them this is.
    """

    name: str
    fused: Fused | None = None
    piece: int = 0

    def rows(self, out_features: int) -> int:
        """Of the linear layer there."""
        return out_features if self.fused is None else self.fused.rows

    def take(self, array: np.ndarray) -> np.ndarray:
        """The projection's part of an array whose first axis are the layer's rows."""
        return array if self.fused is None else self.fused.split(array)[self.piece]


class PeftStack(NamedTuple):
    """The adapters of one linear layer of transformers in all layers of the model.

    Attributes:
      names: of each layer.
      arrays: by PEFT's kind, with the axis of the layers where there are several: A [L, in, r],
        B [L, r, out] and for DoRA the magnitudes [L, out].
      alpha: as `use_rslora` reads it.
      use_rslora: see `lora_scaling`.
      dropout: on the adapter's input.
    """

    names: list[str]
    arrays: tuple[np.ndarray, ...]
    alpha: float
    use_rslora: bool
    dropout: float

    @property
    def rank(self) -> int:
        """Of the adapter."""
        return self.arrays[0].shape[-1]

    @property
    def last_name(self) -> str:
        """What the layer is called in each layer of the model."""
        return self.names[0].rpartition(".")[2]


def layers_of(model: nnx.Module, place: str, linear: QLoRALinear) -> list[Layer]:
    """Where a projection is in transformers' model, for each layer, or for the one in none.

    Args:
      model: of `load_model`.
      place: the projection's path.
      linear: the projection.

    Raises:
      ConfigError: transformers has no such layer.
    """
    config = getattr(model, "config", None)
    naming = naming_of(getattr(config, "model_type", None), "hf")
    leading = linear.leading_shape
    layers = []
    for layer in range(leading[0]) if leading else (None,):
        slot = Slot(f"{place}/kernel", layer)
        name = tensor_name(slot, naming)
        if find_slot(name, naming) != slot:
            raise ConfigError(
                f"{place} has no name in PEFT; adapters can be exchanged for the models that "
                "load_model makes."
            )
        module, piece = whole_module(name.removesuffix(".weight"))
        if piece is None:
            layers.append(Layer(module))
        else:
            layers.append(Layer(module, find_fused(module, fused_modules(config)), piece))
    return layers


def peft_stacks(model: nnx.Module, adapted: Mapping[str, QLoRALinear]) -> list[PeftStack]:
    """The adapters of a model as PEFT has them.

    Args:
      model: of `load_model`, with adapters.
      adapted: the projections with an adapter, by path.

    Raises:
      ConfigError: a projection has no name in PEFT, or one of several in a layer has no adapter
        while others have DoRA's.
    """
    found: dict[str, dict[int, tuple[list[Layer], QLoRALinear]]] = {}
    for place, linear in adapted.items():
        layers = layers_of(model, place, linear)
        found.setdefault(layers[0].name, {})[layers[0].piece] = layers, linear
    return [_stack(pieces) for pieces in found.values()]


def _stack(pieces: Mapping[int, tuple[list[Layer], QLoRALinear]]) -> PeftStack:
    layers, linear = next(iter(pieces.values()))
    names, fused = [layer.name for layer in layers], layers[0].fused
    if fused is None:
        adapter, alpha = linear.original_adapter
        arrays = tuple(np.asarray(array) for array in adapter.values())
        return PeftStack(names, arrays, alpha, linear.use_rslora, linear.dropout)
    linears = {piece: linear for piece, (_, linear) in sorted(pieces.items())}
    parts, scalings = {}, {}
    for i, one in linears.items():
        adapter, alpha = one.original_adapter
        parts[i] = [np.asarray(array) for array in adapter.values()]
        scalings[i] = lora_scaling(parts[i][0].shape[-1], alpha, one.use_rslora)
    scaling = max(scalings.values(), key=abs)
    if len({len(part) for part in parts.values()}) > 1 or (
        len(linears) < len(fused.sizes) and len(parts[min(parts)]) > 2
    ):
        raise ConfigError(
            f"{names[0]} is several projections, of which only some have an adapter of DoRA, which "
            "one PEFT adapter cannot hold. Give all of them adapters (lora.where)."
        )
    rests = {i: part[1] * np.float32(scalings[i] / scaling) for i, part in parts.items()}
    if set(scalings.values()) == {scaling}:
        rests = {i: part[1] for i, part in parts.items()}
    a, b = _shared(fused, parts, rests) or _side_by_side(fused, parts, rests)
    arrays = [a, b]
    if len(parts[min(parts)]) > 2:
        magnitudes = [_rows_first(parts[i][2]) for i in range(len(fused.sizes))]
        arrays.append(np.moveaxis(fused.join(magnitudes), 0, -1))
    rank, use_rslora = a.shape[-1], all(one.use_rslora for one in linears.values())
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    dropout = max(one.dropout for one in linears.values())
    return PeftStack(names, tuple(arrays), round(alpha, 9), use_rslora, dropout)


def _shared(
    fused: Fused, parts: Mapping[int, list[np.ndarray]], rests: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """A and B of rank r, where all projections have the same A."""
    first = parts[min(parts)][0]
    if len(parts) < len(fused.sizes):
        return None
    if not all(np.array_equal(part[0], first) for part in parts.values()):
        return None
    rows = [_rows_first(rests[i]) for i in range(len(fused.sizes))]
    return first, np.moveaxis(fused.join(rows), 0, -1)


def _side_by_side(
    fused: Fused, parts: Mapping[int, list[np.ndarray]], rests: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the sum of the ranks; projections without an adapter have rows of zeros."""
    a = np.concatenate([part[0] for part in parts.values()], axis=-1)
    rank, start, rows = a.shape[-1], 0, []
    dtype = np.result_type(*rests.values())
    leading = a.shape[:-2]
    for i in range(len(fused.sizes)):
        b = np.zeros((*leading, rank, fused.piece_rows(i)), dtype)
        if i in rests:
            own = rests[i].shape[-2]
            b[..., start : start + own, :] = rests[i]
            start += own
        rows.append(_rows_first(b))
    return a, np.moveaxis(fused.join(rows), 0, -1)


def _rows_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 0)
