"""Checkpoints: a pytree and what is known about it, on disk whole or not at all.

One directory a step, written by Orbax (its v1 interface) under a temporary name and renamed when
complete:

    checkpoints/100/state/…               the leaves by path ("opt_state/0/mu/layers/…"), OCDBT
    checkpoints/100/_CHECKPOINT_METADATA  the metadata, JSON

The leaves are stored by path and not by container, so that a tree can be restored into dicts,
NamedTuples, dataclasses or an `nnx.State` alike, and so that everything that does not fit can be
named at once, before a byte of it is read. Saving returns when the step is on disk: the arrays may
be donated to the next training step right away, which an asynchronous save would not survive.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from qlora_jax.errors import CheckpointError
from qlora_jax.tree import flatten_paths

_STATE = "state"
# All of them are there when Orbax has finished; a copy that broke off lacks one.
_COMPLETE = ("_CHECKPOINT_METADATA", f"{_STATE}/_METADATA", f"{_STATE}/manifest.ocdbt")
_TEMPORARY_MARK = ".orbax-checkpoint-tmp"


class Checkpointer:
    """The checkpoints of one run, the newest `keep` of them.

    Opening one reads nothing and changes nothing, so a run can be looked at while it is training.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     checkpointer = Checkpointer(directory)
        ...     checkpointer.save(10, {"w": jnp.ones(2)}, {"loss": 1.5})
        ...     tree, metadata = checkpointer.restore(10, like={"w": jnp.zeros(2)})
        ...     checkpointer.latest_step(), tree, metadata
        (10, {'w': Array([1., 1.], dtype=float32)}, {'loss': 1.5})
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        """Names the directory; it is made by the first `save`.

        Args:
            directory: where the steps are.
            keep: how many of the newest stay on disk, at least 1.

        Raises:
            ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        # Orbax takes absolute paths only.
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._closed = False

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, ascending; half-written ones are none."""
        if not self._directory.is_dir():
            return []
        paths = [path for path in self._directory.iterdir() if path.name.isdecimal()]
        whole = [path for path in paths if all((path / name).is_file() for name in _COMPLETE)]
        return sorted(int(path.name) for path in whole)

    def latest_step(self) -> int | None:
        """Returns the newest step that can be restored, or None when there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """Writes one step, then removes those that are too old.

        A step that exists is replaced. When writing fails, all other steps are as they were.

        Args:
            step: optimizer steps that are done.
            tree: a pytree of JAX arrays (PRNG keys too, in any memory kind), NumPy arrays and
                Python numbers. `None` is no leaf.
            metadata: anything that JSON keeps as it is.

        Raises:
            CheckpointError: the disk is full or read-only, or tree or metadata cannot be stored.
            RuntimeError: the checkpointer is closed.
        """
        if self._closed:
            raise RuntimeError(f"the checkpointer of {self._directory} is closed")
        metadata = _checked_metadata(metadata)
        leaves = {path: _to_storable(leaf) for path, leaf in _flatten(tree).items()}
        path = self._directory / str(step)
        context = ocp.Context()
        # In the background Orbax waits 20 minutes for a directory that it could not make.
        context.async_options.create_directories_asynchronously = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            with context, _without_logging():
                ocp.save(path, leaves, overwrite=True, custom_metadata=metadata)
            self._remove_old(step)
        except (OSError, ValueError, TypeError) as error:
            self._remove_leftovers()
            raise CheckpointError(
                f"step {step} cannot be saved to {self._directory}: {_first_line(error)}; "
                f"saved steps: {self.steps() or 'none'}. Is the disk full or read-only?"
            ) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one step into the structure, dtypes and placement of `like`.

        Args:
            step: one of `steps()`.
            like: a pytree of arrays or `jax.ShapeDtypeStruct`; a leaf's sharding (its memory kind
                included) is where the array goes, the default device if it has none.

        Returns:
            The tree, and the metadata it was saved with.

        Raises:
            CheckpointError: there is no such step, it is damaged, or leaves are missing, left
                over, or of another shape or dtype; all of them are listed.
        """
        if step not in self.steps():
            raise CheckpointError(
                f"{self._directory} holds no step {step}; steps there: {self.steps() or 'none'}"
            )
        path = self._directory / str(step)
        wanted = {name: _Leaf.of(leaf) for name, leaf in _flatten(like).items()}
        try:
            with _without_logging():
                stored = ocp.metadata(path)
                _check_fit(path, stored.metadata, wanted)
                leaves = ocp.load(path, {name: leaf.target() for name, leaf in wanted.items()})
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises Exception itself where an array cannot be read.
            raise CheckpointError(
                f"{path} is damaged: {_first_line(error)}; remove that directory to go on from an "
                "older step"
            ) from error
        restored = [leaf.finish(leaves[name]) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored), stored.custom_metadata or {}

    def close(self) -> None:
        """Ends saving. Nothing is pending then, because `save` returns when the step is on disk."""
        self._closed = True

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _remove_leftovers(self) -> None:
        for path in self._directory.glob(f"*{_TEMPORARY_MARK}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, saved: int) -> None:
        for step in self.steps()[: -self._keep]:
            if step != saved:
                shutil.rmtree(self._directory / str(step))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """How a leaf is stored, and how it comes back."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding | None  # None: NumPy
    like: Any

    @classmethod
    def of(cls, like: Any) -> "_Leaf":
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

    def finish(self, value: Any) -> Any:
        """Turns what Orbax gives into what `like` is."""
        if isinstance(self.like, bool | int | float):
            return type(self.like)(value.item())
        if _is_key(self.like):
            return jax.random.wrap_key_data(value, impl=_key_impl(self.like))
        return value

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


@contextlib.contextmanager
def _without_logging() -> Iterator[None]:
    """Silences Orbax, whose threads print the traceback of an error that is raised as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(key: Any) -> Any:
    """Which generator a key is for, also one without a value."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _to_storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = flatten_paths(tree)
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise CheckpointError(
            "two leaves of the tree have the same path, for example of the keys a/b and a, b; "
            "rename one of them"
        )
    return leaves


def _check_fit(path: pathlib.Path, stored: Mapping[str, Any], wanted: Mapping[str, _Leaf]) -> None:
    problems = [f"{name}: missing in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name}: in the checkpoint, but not expected" for name in stored.keys() - wanted]
    for name in wanted.keys() & stored.keys():
        found = _Leaf(tuple(stored[name].shape), np.dtype(stored[name].dtype), None, None)
        if str(found) != str(wanted[name]):
            problems.append(f"{name}: the checkpoint has {found}, expected is {wanted[name]}")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(f"{path} does not fit what it is restored into:{lines}")


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata of a checkpoint must be JSON: {error}") from error
    return kept


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}"
