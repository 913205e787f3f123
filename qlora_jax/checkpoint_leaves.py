"""The leaves of a checkpoint: how each is stored, and how it comes back as what it was.

Orbax stores arrays. PRNG keys are stored as their numbers, Python numbers as NumPy arrays; which of
them a leaf is, and where it goes, is said by the tree that is restored into.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from qlora_jax.errors import CheckpointError
from qlora_jax.placement import memory_kind
from qlora_jax.tree import flatten_paths


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """How a leaf is stored, and how it comes back."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding | None  # None: NumPy
    like: Any

    @classmethod
    def of(cls, like: Any) -> "StoredLeaf":
        """How a leaf like this one is stored."""
        if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
            value = np.asarray(like)
            return cls(value.shape, value.dtype, None, like)
        sharding = like.sharding or SingleDeviceSharding(jax.devices()[0])
        if _is_key(like):
            numbers = jax.eval_shape(jax.random.key_data, like)
            return cls(numbers.shape, numbers.dtype, sharding, like)
        return cls(like.shape, np.dtype(like.dtype), sharding, like)

    def target(self) -> Any:
        """What Orbax is asked for."""
        if self.sharding is None:
            return np.empty(self.shape, self.dtype)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)

    def check_memory(self, name: str, value: Any) -> None:
        """Refuses an array that went into another memory than it was asked for."""
        if self.sharding is not None and memory_kind(value) != memory_kind(self.like):
            raise CheckpointError(
                f"{name} was restored into the memory {memory_kind(value)} instead of "
                f"{memory_kind(self.like)}; please report this version of Orbax"
            )

    def finish(self, value: Any) -> Any:
        """Turns what Orbax gives into what `like` is."""
        if isinstance(self.like, bool | int | float):
            return type(self.like)(value.item())
        if _is_key(self.like):
            return jax.random.wrap_key_data(value, impl=_key_impl(self.like))
        return value

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(key: Any) -> Any:
    """Which generator a key is for, also one without a value."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def to_storable(leaf: Any) -> Any:
    """A leaf as an array of numbers."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def flatten_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path.

    Raises:
        CheckpointError: two have the same path.
    """
    leaves = flatten_paths(tree)
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise CheckpointError(
            "two leaves of the tree have the same path, for example of the keys a/b and a, b; "
            "rename one of them"
        )
    return leaves


def check_fit(
    path: pathlib.Path, stored: Mapping[str, Any], wanted: Mapping[str, StoredLeaf]
) -> None:
    """Compares what a step holds with what it is restored into.

    Args:
        path: of the step, for the message.
        stored: what Orbax says of each leaf.
        wanted: by path.

    Raises:
        CheckpointError: naming all that is missing, left over, or of another shape or dtype.
    """
    problems = [f"{name}: missing in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name}: in the checkpoint, but not expected" for name in stored.keys() - wanted]
    for name in wanted.keys() & stored.keys():
        found = StoredLeaf(tuple(stored[name].shape), np.dtype(stored[name].dtype), None, None)
        if str(found) != str(wanted[name]):
            problems.append(f"{name}: the checkpoint has {found}, expected is {wanted[name]}")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(
            f"{path} does not fit what it is restored into:{lines}\nGive it the configuration and "
            "the version that saved it, or begin in a new directory"
        )
