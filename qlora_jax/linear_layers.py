"""Which modules of a model are linear layers, and which of them are its output head."""

from __future__ import annotations

from typing import Any

from flax import nnx

from qlora_jax.errors import ConfigError
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.tree import join_path, matches

# Last names of output heads, which "all-linear" leaves alone, as QLoRA and PEFT do. A module in a
# list of layers or in a stack is never a head: BERT's "layers/0/output" is an ordinary layer.
HEAD_NAMES = frozenset(
    "lm_head head output output_head output_layer output_projection logits logits_dense unembed "
    "unembedding embed_out classifier score".split()
)


def linear_paths(model: nnx.Module, where: str | None = None) -> list[str]:
    """The linear layers of a model, or those that a ``where`` chooses.

    Args:
        model: any NNX model, before or after the surgery, also an abstract one.
        where: None: all. Otherwise as in ``apply_qlora``.

    Returns:
        Paths ("layers/0/attention/query"); a module shared by several parents comes once.

    Raises:
        ConfigError: ``where`` chooses nothing.

    Example:
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up = nnx.Linear(4, 8, rngs=rngs)
        ...         self.lm_head = nnx.Linear(8, 9, rngs=rngs)
        >>> model = Model(nnx.Rngs(0))
        >>> linear_paths(model), linear_paths(model, "all-linear")
        (['lm_head', 'up'], ['up'])
    """
    linears = {path: node for path, node in nnx.iter_graph(model) if is_linear(node)}
    names = {join_path(path): path for path in linears}
    if where is None:
        return list(names)
    if where == "all-linear":
        chosen = [name for name, path in names.items() if not is_head(path, linears[path])]
    else:
        chosen = [name for name in names if matches(where, name)]
    if not chosen:
        raise ConfigError(
            f"where={where!r} chooses no linear layer; expected 'all-linear' (all but the output "
            "head) or a regular expression that matches a whole path, for example '.*/q_proj'. "
            f"Linear layers of this model: {', '.join(names) or 'none'}."
        )
    return chosen


def linear_layers(model: nnx.Module, where: str | None = None) -> dict[str, QLoRALinear]:
    """The modules that `linear_paths` names, all with the interface of a `QLoRALinear`.

    Args:
        model: any NNX model, before or after the surgery, also an abstract one.
        where: see `linear_paths`.

    Returns:
        By path; plain ones as views that share the model's variables.

    Example:
        >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> linear_layers(nnx.Sequential(linear))["layers/0"].out_features
        8
    """
    paths = set(linear_paths(model, where))
    return {
        name: as_qlora_linear(node)
        for path, node in nnx.iter_graph(model)
        if (name := join_path(path)) in paths
    }


def is_linear(node: Any) -> bool:
    """Whether the surgery knows what a module computes (no subclass with its own ``__call__``)."""
    if isinstance(node, nnx.LinearGeneral):
        return type(node).__call__ is nnx.LinearGeneral.__call__ and not node.batch_axis
    if isinstance(node, nnx.Linear):
        return type(node).__call__ is nnx.Linear.__call__
    return isinstance(node, QLoRALinear)


def is_head(path: tuple[Any, ...], linear: nnx.Module) -> bool:
    """Whether a linear layer is an output head, by its name and place; see ``HEAD_NAMES``."""
    if not path or path[-1] not in HEAD_NAMES or any(isinstance(part, int) for part in path):
        return False
    return not as_qlora_linear(linear).leading_shape


def as_qlora_linear(linear: nnx.Module) -> QLoRALinear:
    """The layer, or a view of a plain one that shares its variables."""
    return linear if isinstance(linear, QLoRALinear) else QLoRALinear.from_linear(linear)
