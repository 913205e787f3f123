"""In which memory the arrays of a pytree lie: the device's, or the host's pinned memory.

JAX says so by the memory kind of an array's sharding. Here are trees without values that know it,
counts by memory, and moves from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree


def eval_placed(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Like `jax.eval_shape`, and the result says what lies in the host's memory.

    Args:
        function: anything that can be jitted.
        *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        `jax.ShapeDtypeStruct`s; those in the host's memory have a sharding of that memory kind.

    >>> to_host = lambda x: jax.device_put(x, jax.memory.Space.Host)
    >>> eval_placed(to_host, jax.ShapeDtypeStruct((3,), "float32")).sharding.memory_kind
    'pinned_host'
    """
    host = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    traced = jax.jit(function).trace(*args)
    leaves = []
    for aval in traced.jaxpr.out_avals:
        sharding = host if aval.memory_space == jax.memory.Space.Host else None
        leaves.append(
            jax.ShapeDtypeStruct(
                aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type
            )
        )
    return jax.tree.structure(traced.out_info).unflatten(leaves)


def memory_kind(leaf: Any) -> str:
    """`device` or `pinned_host`; what does not say is on the device."""
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) or "device"


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an array, also of one without values."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, wherever they lie.

    >>> tree_bytes({"a": jax.ShapeDtypeStruct((3,), "float32"), "b": None})
    12
    """
    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def bytes_by_memory(tree: PyTree) -> dict[str, int]:
    """Bytes of a tree by the memory that they lie in.

    >>> bytes_by_memory({"a": jax.ShapeDtypeStruct((3,), "float32")})
    {'device': 12, 'pinned_host': 0}
    """
    found = {"device": 0, "pinned_host": 0}
    for leaf in jax.tree.leaves(tree):
        found[memory_kind(leaf)] += leaf_bytes(leaf)
    return found


def place_abstract(like: PyTree, device: jax.Device) -> PyTree:
    """The same tree without values, every leaf with a sharding on that device."""

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(device, memory_kind=memory_kind(leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, like)


def place(tree: PyTree, like: PyTree, device: jax.Device) -> PyTree:
    """Moves what lies in another memory than `like` says, leaf by leaf.

    Args:
        tree: arrays; those that move are deleted, so that at most one of them is there twice.
        like: the same tree, also without values.
        device: of both.
    """

    def placed(leaf: Array, wanted: Any) -> Array:
        sharding = SingleDeviceSharding(device, memory_kind=memory_kind(wanted))
        found = jax.device_put(leaf, sharding)
        if memory_kind(leaf) != sharding.memory_kind:
            jax.block_until_ready(found)
            leaf.delete()  # JAX donates within one memory only
        return found

    return jax.tree.map(placed, tree, like)
