"""Names for the leaves of any pytree.

A leaf's path is its keys joined by "/": ``params["layers"]["q_proj"]["kernel"]`` is
"layers/q_proj/kernel". The same name comes out for nested dicts, lists, dataclasses, optax states
and ``flax.nnx.State``; a Flax ``Variable`` is transparent (its inner "value" key is left out), so
one regular expression works on an NNX state and on the plain dict of the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from qlora_jax.errors import ConfigError

Key = str | int


def key_parts(key_path: tuple[Any, ...]) -> tuple[Key, ...]:
    """Turns a JAX key path into plain keys.

    Args:
        key_path: what ``jax.tree_util.tree_flatten_with_path`` gives beside a leaf.

    Returns:
        Dict keys and attribute names as they are, sequence positions as int.

    Example:
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"a": [1, 2]})
        >>> [key_parts(path) for path, _ in leaves]
        [('a', 0), ('a', 1)]
    """
    parts: list[Key] = []
    for key in key_path:
        match key:
            case DictKey(key=name) | FlattenedIndexKey(key=name):
                parts.append(name)
            case SequenceKey(idx=index):
                parts.append(index)
            # flax.nnx.Variable flattens to one attribute of this name, which says nothing.
            case GetAttrKey(name="value"):
                continue
            case GetAttrKey(name=name):
                parts.append(name)
            case _:
                parts.append(str(key))
    return tuple(parts)


def join_path(parts: tuple[Key, ...]) -> str:
    """Joins keys to a path string.

    Example:
        >>> join_path(("layers", 0, "kernel"))
        'layers/0/kernel'
    """
    return "/".join(str(part) for part in parts)


def flatten_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Flattens a pytree into a dict from path string to leaf, in JAX's leaf order.

    Args:
        tree: any pytree.
        is_leaf: as in ``jax.tree.flatten``: subtrees for which it is true are not entered.

    Returns:
        One entry per leaf; a tree that is itself a leaf has the path "".

    Example:
        >>> flatten_paths({"norm": {"scale": 1}, "layers": [{"kernel": 2}]})
        {'layers/0/kernel': 2, 'norm/scale': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {join_path(key_parts(key_path)): leaf for key_path, leaf in leaves}


def matches(where: str, path: str) -> bool:
    """Whether a regular expression matches a whole path (``re.fullmatch``).

    The whole path, because a fragment that happens to occur in another name ("q_proj" in
    "eq_proj_norm") is the usual way to adapt the wrong weight. Begin with ".*" to match by ending.

    Args:
        where: a Python regular expression.
        path: a path as ``flatten_paths`` names it.

    Raises:
        ConfigError: ``where`` is no regular expression.

    Example:
        >>> matches(r".*/(q|v)_proj", "layers/self_attn/q_proj")
        True
        >>> matches("q_proj", "layers/self_attn/q_proj")
        False
    """
    try:
        return re.fullmatch(where, path) is not None
    except re.error as error:
        raise ConfigError(
            f"where={where!r} is not a regular expression ({error}); expected one that matches a "
            'whole path, for example ".*/q_proj". A literal "*", "+" or "(" needs a backslash.'
        ) from None


def map_leading(function: Callable[..., Any], leading_shape: tuple[int, ...], *args: Any) -> Any:
    """Applies a function to each entry of stacked pytrees, one after the other.

    Unlike ``jax.vmap`` this holds the temporaries of one entry only.

    Args:
        function: from unstacked arguments to a pytree of arrays.
        leading_shape: the axes [*L] that all arrays in ``args`` begin with; for () ``function`` is
            called once.
        *args: pytrees.

    Returns:
        The results, stacked to [*L, ...].

    Example:
        >>> map_leading(jax.numpy.sum, (2,), jax.numpy.ones((2, 3)))
        Array([3., 3.], dtype=float32)
    """
    if not leading_shape:
        return function(*args)
    depth = len(leading_shape)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[depth:]), args)
    stacked = jax.lax.map(lambda entry: function(*entry), flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading_shape, *leaf.shape[1:]), stacked)
