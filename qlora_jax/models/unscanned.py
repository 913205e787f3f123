"""What stacked layers share while `jax.lax.scan` walks over them.

A scan hands the body one slice of every array. A variable that is no stack of slices (kernels of
several formats, each in a stack of its own length) is an `UnscannedVariable`: it goes into the body
whole, and there its value is told which layer it is asked for.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int


class UnscannedVariable(nnx.Variable):
    """A variable of stacked layers whose value has a method `at(layer)` instead of slices."""


def split_layers(
    layers: nnx.Module,
) -> tuple[nnx.GraphDef, nnx.State, Callable[[nnx.State, Int[Array, ""]], nnx.State]]:
    """Splits stacked layers for a scan.

    Args:
        layers: a module whose variables have a leading axis, but for `UnscannedVariable`s.

    Returns:
        The graph definition; the state to scan over; and a function of its slice and of the layer's
        number, to be called in the body, that gives the state of that layer.

    >>> graphdef, state, whole_state = split_layers(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> sorted(whole_state(state, 0))
    ['bias', 'kernel']
    """
    graphdef, shared, scanned = nnx.split(layers, UnscannedVariable, ...)

    def whole_state(scanned: nnx.State, layer: Int[Array, ""]) -> nnx.State:
        def at_layer(variable: Any) -> Any:
            return variable.replace(variable.get_value().at(layer))

        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        of_layer = jax.tree.map(at_layer, shared, is_leaf=is_variable)
        return nnx.merge_state(scanned, of_layer)

    return graphdef, scanned, whole_state
