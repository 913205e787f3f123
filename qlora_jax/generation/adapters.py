"""Several adapters on one base, each row of a batch with its own.

The adapters of a projection are laid side by side: A_1 .. A_n become one matrix [in, r_1 + .. +
r_n], B_1 .. B_n one [r_1 + .. + r_n, out]. A row multiplies with all of A, keeps the columns of its
own adapter (times that adapter's scaling) and sets the others to zero:

    y = x @ W.T + ((x @ [A_1 .. A_n]) * s[row]) @ [B_1; ..; B_n]

Compared with a gather of each row's matrices nothing is copied, and the adapters are read once a
batch and not once a row; it is also what the fused 4-bit product takes as its epilogue. A row
without an adapter keeps no column: its update is exactly zero, and its logits are the base's.

DoRA's factor m / n (`qlora_jax.dora`) does not depend on the input, so it is computed once, and
there it is a gather: a vector for each adapter, ones for none.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.dora import adapted_norm
from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import substitute
from qlora_jax.linear_layers import linear_layers
from qlora_jax.lora import is_quantized, lora_scaling
from qlora_jax.mixed import map_layers
from qlora_jax.models.unscanned import UnscannedVariable
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.quantized import matmul
from qlora_jax.tree import join_path

# The name of the adapter that a model brings along.
OWN = "adapter"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The number of each row's adapter, the same in all layers; 0 is none."""

    numbers: Int[Array, " B"]

    def at(self, layer: Int[Array, ""]) -> "Rows":
        """What a layer sees."""
        del layer
        return self


class RowsVariable(UnscannedVariable):
    """Holds `Rows`; shared by all layers of a model."""


class FrozenAdapter(nnx.Variable):
    """An array of adapters that are only read."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The adapter of one projection that some rows have."""

    owner: int
    lora: dict[str, Array]
    scaling: float


class RowLoRALinear(nnx.Module):
    """A linear layer whose rows have different adapters; see the module.

    Attributes:
        base: the layer without adapter and bias.
        bias: of the layer, or None.
        rows: whose adapter a row has.
        lora_a: [*L, in, r_1 + .. + r_n].
        lora_b: [*L, r_1 + .. + r_n, out].
        factor: [*L, n + 1, out] of DoRA, or None.
        owners: the number of each column's adapter; 0: of what an initialisation took out of the
            kernel, which belongs to it for the rows that have no adapter.
        scalings: of each column.
    """

    def __init__(self, linear: QLoRALinear, parts: list[_Part], count: int, rows: RowsVariable):
        """Takes over the variables of a layer.

        Args:
            linear: the layer.
            parts: its adapters.
            count: adapters that a row may have, here or elsewhere in the model.
            rows: shared by all layers.
        """
        ranks = [part.lora["lora_a"].shape[-1] for part in parts]
        self.owners = tuple(
            part.owner for part, r in zip(parts, ranks, strict=True) for _ in [0] * r
        )
        self.scalings = tuple(
            part.scaling for part, r in zip(parts, ranks, strict=True) for _ in [0] * r
        )
        self.rows = rows
        self.lora_a = FrozenAdapter(jnp.concatenate([p.lora["lora_a"] for p in parts], axis=-1))
        self.lora_b = FrozenAdapter(jnp.concatenate([p.lora["lora_b"] for p in parts], axis=-2))
        self.factor = nnx.data(_factors(linear.matrix_kernel, parts, count))
        self.bias = nnx.data(linear.bias)
        self.dtype = linear.dtype
        self.base = linear.with_kernel(linear.matrix_kernel)
        self.base.bias = nnx.data(None)

    def __call__(self, x: Float[Array, "B *T K"]) -> Float[Array, "B *T N"]:
        """Applies the layer; the first axis of the input is that of the rows."""
        numbers = self.rows.get_value().numbers
        owners = np.array(self.owners)
        own = owners == numbers[:, None]
        beside = (x.shape[0], *[1] * (x.ndim - 2), -1)
        x = x if self.dtype is None else x.astype(self.dtype)
        scale = jnp.where(own, np.array(self.scalings, np.float32), 0).reshape(beside)
        xa = (x @ self.lora_a.get_value().astype(x.dtype)) * scale.astype(x.dtype)
        b = self.lora_b.get_value().astype(x.dtype)
        kernel = self.base.matrix_kernel if isinstance(self.base, QLoRALinear) else None
        if is_quantized(kernel):
            y = matmul(x, kernel, lora=(xa, b))
        else:
            y = self.base(x) + xa @ b
        if self.factor is not None:
            y = y * self.factor.get_value()[numbers].reshape(beside).astype(y.dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def serve_adapters(
    model: nnx.Module, adapters: Mapping[str, Any] | None
) -> tuple[nnx.Module, tuple[str, ...]]:
    """A copy of a model, which shares its arrays, whose rows can have different adapters.

    Args:
        model: with an adapter of its own or without.
        adapters: by name: each a model with an adapter on the same base, or the state of its
            `nnx.LoRAParam`s, with the ranks and the scaling of `model`. None: the model's own, if
            it has one, under the name `OWN`.

    Returns:
        The model, and the names; adapter i has the number i + 1.

    Raises:
        ConfigError: an adapter does not belong to this base.
    """
    model = nnx.merge(*nnx.split(model))
    linears = linear_layers(model)
    own = {path: linear for path, linear in linears.items() if linear.rank}
    if adapters is None:
        adapters = {OWN: model} if own else {}
    parts: dict[str, list[_Part]] = {path: [] for path in linears}
    for path, linear in own.items():
        if linear.subtracted_a is not None:
            a, b = linear.subtracted_a.get_value(), linear.subtracted_b.get_value()
            scaling = lora_scaling(linear.rank, linear.alpha, linear.use_rslora)
            parts[path].append(_Part(0, {"lora_a": a, "lora_b": b}, scaling))
    for number, (name, adapter) in enumerate(adapters.items(), start=1):
        for path, part in _read_adapter(name, adapter, model, number).items():
            if path not in linears or not _fits(linears[path], part):
                raise ConfigError(
                    f"adapter {name!r} does not belong to this base: it has a part for {path}, "
                    "which the model has not, or in another size."
                )
            parts[path].append(part)
    rows = RowsVariable(Rows(jnp.zeros(1, jnp.int32)))
    replacements = {}
    for path, node in nnx.iter_graph(model):
        if (linear := linears.get(join_path(path))) is None:
            continue
        if parts[join_path(path)]:
            replacements[id(node)] = RowLoRALinear(
                linear, parts[join_path(path)], len(adapters), rows
            )
        elif linear.rank:
            replacements[id(node)] = linear.with_kernel(linear.matrix_kernel)
    model = substitute(model, replacements, {})
    if any(parts.values()):
        model.adapter_rows = rows
    return model, tuple(adapters)


def merge_for_rows(
    graphdef: nnx.GraphDef, state: nnx.State, numbers: Int[Array, " B"]
) -> nnx.Module:
    """A split model, of `serve_adapters` or not, told which adapter each row has."""

    def tell(variable: Any) -> Any:
        return variable.replace(Rows(numbers)) if isinstance(variable, RowsVariable) else variable

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(tell, state, is_leaf=is_variable))


def _read_adapter(name: str, adapter: Any, base: nnx.Module, number: int) -> dict[str, _Part]:
    if not isinstance(adapter, nnx.Module):
        adapter = _with_state(name, adapter, base)
    adapted = {path: linear for path, linear in linear_layers(adapter).items() if linear.rank}
    if not adapted:
        raise ConfigError(f"adapter {name!r}: the model has none.")
    parts = {}
    for path, linear in adapted.items():
        scaling = lora_scaling(linear.rank, linear.alpha, linear.use_rslora)
        parts[path] = _Part(number, linear.adapter, scaling)
    return parts


def _with_state(name: str, state: Any, base: nnx.Module) -> nnx.Module:
    """The base with the values of a state of `nnx.LoRAParam`s."""
    graphdef, own, rest = nnx.split(base, nnx.LoRAParam, ...)
    if jax.tree.map(jnp.shape, nnx.to_pure_dict(own)) != jax.tree.map(
        jnp.shape, nnx.to_pure_dict(state)
    ):
        raise ConfigError(
            f"adapter {name!r} has other parts or ranks than the model's own; give the model that "
            "it was loaded into, of load_adapter or load_trained, instead of its state."
        )
    return nnx.merge(graphdef, state, rest)


def _fits(linear: QLoRALinear, part: _Part) -> bool:
    a, b = part.lora["lora_a"].shape, part.lora["lora_b"].shape
    expected = (*linear.leading_shape, linear.in_features), linear.out_features
    return (a[:-1], b[-1]) == expected


def _factors(kernel: Any, parts: list[_Part], count: int) -> FrozenAdapter | None:
    """DoRA's factor of every adapter, ones for the others."""
    if not any("lora_magnitude" in part.lora for part in parts):
        return None

    def factor(kernel: Any, lora: dict[str, Array], scaling: float) -> Float[Array, " N"]:
        weight = kernel if is_quantized(kernel) else kernel.T
        norm = adapted_norm(weight, lora["lora_a"], lora["lora_b"], scaling)
        return lora["lora_magnitude"].astype(jnp.float32) / norm

    leading = parts[0].lora["lora_a"].shape[:-2]
    out_features = parts[0].lora["lora_b"].shape[-1]
    factors = [jnp.ones((*leading, out_features), jnp.float32)] * (count + 1)
    for part in parts:
        if "lora_magnitude" in part.lora:
            scaling = part.scaling
            of_layer = lambda kernel, lora, s=scaling: factor(kernel, lora, s)  # noqa: E731
            factors[part.owner] = map_layers(of_layer, leading, kernel, part.lora)
    return FrozenAdapter(jnp.stack(factors, axis=len(leading)))
