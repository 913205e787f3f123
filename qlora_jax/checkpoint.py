"""Checkpoints: a pytree and what is known about it, on disk whole or not at all, and verified.

One directory a step:

    checkpoints/100/state/…               the leaves by path ("opt_state/0/mu/layers/…"), OCDBT
    checkpoints/100/_CHECKPOINT_METADATA  Orbax's own
    checkpoints/100/manifest.json         hashes of all of it and the metadata, see `manifest.py`
    checkpoints/100.damaged/              a step that could not be trusted, set aside

Orbax (its v1 interface) writes a step under a hidden name; the manifest joins it; when all of that
is on the disk, one rename makes it a step, and only then what is too old goes, by a rename too. So
a process can be killed anywhere: what is left is the old steps, or those and the new one, and
hidden directories that the next save removes. `phases.SAVING` names the points between.

The leaves are stored by path and not by container, so that a tree can be restored into dicts,
NamedTuples, dataclasses or an `nnx.State` alike, and so that everything that does not fit can be
named at once, before a byte of it is read.

Saving returns when the step is on disk. That is a choice: the arrays may be donated to the next
training step right away, an error is raised where it happens, and there is nothing to join. What it
costs is said in docs/reliability.md; adapters and their moments are small.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qlora_jax import phases
from qlora_jax.checkpoint_leaves import StoredLeaf, check_fit, flatten_leaves, to_storable
from qlora_jax.errors import CheckpointError, DamagedCheckpointError
from qlora_jax.manifest import LeafRecord, Manifest, sync
from qlora_jax.orbax_errors import damage_explained, first_line, without_logging

_STATE = "state"
# All of them are there when Orbax has finished; a copy that broke off lacks one.
_COMPLETE = ("_CHECKPOINT_METADATA", f"{_STATE}/_METADATA", f"{_STATE}/manifest.ocdbt")
# In Orbax's metadata of every step that has a manifest: one that lost it is damaged, not old.
_HAS_MANIFEST = "qlora_jax_manifest"
# Only one process saves to a directory, so all of these are of processes that are gone.
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", ".*.partial-*", ".*.removed")
_REPLACED = ".replaced"
_SLACK_BYTES = 1 << 20  # for what describes the arrays
# The metadata by which the best step is known.
HELDOUT_LOSS = "heldout_loss"


@dataclasses.dataclass(frozen=True)
class Restored:
    """The newest step that could be used.

    Attributes:
        step: its number.
        tree: what was saved.
        metadata: what it was saved with.
        verified: whether it has a manifest, which steps of older versions lack.
        damaged: newer steps that could not be used, and why.
    """

    step: int
    tree: Any
    metadata: dict[str, Any]
    verified: bool
    damaged: dict[int, str]


class Checkpointer:
    """The checkpoints of one run: the newest `keep` of them, and the best.

    The best is the one with the lowest `heldout_loss` in its metadata, if any has one.

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

    def __init__(self, directory: str | pathlib.Path, keep: int = 2, keep_best: bool = True):
        """Names the directory; it is made by the first `save`.

        Args:
            directory: where the steps are.
            keep: how many of the newest stay on disk, at least 1.
            keep_best: whether the best stays, too, when it is older.

        Raises:
            ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        # Orbax takes absolute paths only.
        self._directory = pathlib.Path(directory).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._closed = False

    def numbers(self) -> list[int]:
        """Returns all steps that have a directory, whatever is in it, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def steps(self) -> list[int]:
        """Returns the steps that are complete, ascending; whether they are whole shows reading."""
        return [step for step in self.numbers() if self.missing(step) is None]

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None when there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the lowest held-out loss, or None where none has any."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(CheckpointError):
                manifest = self.manifest(step)
                loss = manifest and manifest.metadata.get(HELDOUT_LOSS)
                losses |= {step: loss} if isinstance(loss, float) and math.isfinite(loss) else {}
        return min(losses, key=losses.get, default=None)

    def manifest(self, step: int) -> Manifest | None:
        """Returns the manifest of a step, see `Manifest.read`; the rest of it is not looked at."""
        return Manifest.read(self._directory / str(step))

    def missing(self, step: int) -> str | None:
        """Returns the first file that a step lacks, or None."""
        path = self._directory / str(step)
        return next((name for name in _COMPLETE if not (path / name).is_file()), None)

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
        leaves = {path: to_storable(leaf) for path, leaf in flatten_leaves(tree).items()}
        manifest = Manifest(
            step, {name: LeafRecord.of(leaf) for name, leaf in leaves.items()}, metadata
        )
        phases.enter("saving: begun")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.clean()
            self._check_space(step, sum(leaf.nbytes for leaf in leaves.values()))
            partial = self._directory / f".{step}.partial-{os.getpid()}"
            context = ocp.Context()
            # In the background Orbax waits 20 minutes for a directory that it could not make.
            context.async_options.create_directories_asynchronously = False
            with context, without_logging():
                ocp.save(partial, leaves, custom_metadata={_HAS_MANIFEST: True})
            phases.enter("saving: leaves written")
            manifest.write(partial)
            phases.enter("saving: manifest written")
            self._give_name(partial, step)
            phases.enter("saving: named")
            self._remove_old(step)
            phases.enter("saving: done")
        except (OSError, ValueError, TypeError) as error:
            with contextlib.suppress(OSError):
                self.clean()
            raise CheckpointError(
                f"step {step} cannot be saved to {self._directory}: {first_line(error)}; "
                f"saved steps: {self.steps() or 'none'}. Is the disk full or read-only?"
            ) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one step into the structure, dtypes and placement of `like`, and verifies it.

        Args:
            step: one of `steps()`.
            like: a pytree of arrays or `jax.ShapeDtypeStruct`; a leaf's sharding (its memory kind
                included) is where the array goes, the default device if it has none.

        Returns:
            The tree, and the metadata it was saved with.

        Raises:
            DamagedCheckpointError: it is not what was saved.
            CheckpointError: there is no such step, or leaves are missing, left over, or of another
                shape or dtype; all of them are listed.
        """
        if step not in self.steps():
            raise CheckpointError(
                f"{self._directory} holds no step {step}; steps there: {self.steps() or 'none'}"
            )
        try:
            restored = self._restore(step, like, {})
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}; remove that directory to go on from an older step"
            ) from error
        return restored.tree, restored.metadata

    def find_damaged(self) -> dict[int, str]:
        """Returns the steps that are newer than the newest good one, and what is wrong with them.

        Only files are read, as far as they must be, and nothing is restored.

        Raises:
            CheckpointError: there are steps, and all are damaged.
        """
        damaged = {}
        for step in reversed(self.numbers()):
            try:
                self._verified_files(step)
                return damaged
            except DamagedCheckpointError as error:
                damaged[step] = str(error)
        self._raise_if_any(damaged)
        return {}

    def restore_newest(self, like: Any) -> Restored | None:
        """Reads the newest step that is what was saved; damaged ones are passed over, and named.

        Args:
            like: as in `restore`.

        Returns:
            The step, or None where there is none at all.

        Raises:
            CheckpointError: all steps are damaged, or the newest good one does not fit `like`.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.numbers()):
            try:
                return self._restore(step, like, damaged)
            except DamagedCheckpointError as error:
                damaged[step] = str(error)
        self._raise_if_any(damaged)
        return None

    def verify(self, step: int) -> Manifest | None:
        """Reads all of one step, whatever it is for, and compares it with its manifest.

        Returns:
            The manifest, or None if the step is of an older version, which wrote none.

        Raises:
            DamagedCheckpointError: it is not what was saved.
        """
        manifest = self._verified_files(step)
        path = self._directory / str(step)
        with damage_explained(path):
            stored = ocp.metadata(path).metadata
            like = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
            leaves = ocp.load(path, like)
        if manifest is not None:
            manifest.check_leaves(path, leaves)
        return manifest

    def set_aside(self, step: int) -> pathlib.Path:
        """Renames a step so that it is none any more, and nothing of it is lost.

        Returns:
            Where it is now.
        """
        path, number = self._directory / f"{step}.damaged", 2
        while path.exists():
            path, number = self._directory / f"{step}.damaged-{number}", number + 1
        os.rename(self._directory / str(step), path)
        return path

    def clean(self) -> None:
        """Removes what saves that were killed have left; only for the one process that saves."""
        for path in self._directory.glob(f".*{_REPLACED}"):
            target = path.with_name(path.name[1:].removesuffix(_REPLACED))
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:  # killed between two renames
                os.rename(path, target)
        for pattern in _LEFTOVERS:
            for path in self._directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Ends saving. Nothing is pending then, because `save` returns when the step is on disk."""
        self._closed = True

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _raise_if_any(self, damaged: Mapping[int, str]) -> None:
        if damaged:
            lines = "".join(f"\n  {reason}" for reason in damaged.values())
            raise CheckpointError(
                f"no step in {self._directory} can be used:{lines}\nPut a copy of one back, or "
                "start again in a new directory"
            )

    def _restore(self, step: int, like: Any, damaged: dict[int, str]) -> Restored:
        manifest = self._verified_files(step)
        path = self._directory / str(step)
        wanted = {name: StoredLeaf.of(leaf) for name, leaf in flatten_leaves(like).items()}
        with damage_explained(path):
            stored = ocp.metadata(path)
            check_fit(path, stored.metadata, wanted)
            leaves = ocp.load(path, {name: leaf.target() for name, leaf in wanted.items()})
        metadata = stored.custom_metadata or {}
        if manifest is not None:
            manifest.check_leaves(path, leaves)
            metadata = manifest.metadata
        for name, leaf in wanted.items():
            leaf.check_memory(name, leaves[name])
        restored = [leaf.finish(leaves[name]) for name, leaf in wanted.items()]
        tree = jax.tree.unflatten(jax.tree.structure(like), restored)
        return Restored(step, tree, metadata, manifest is not None, damaged)

    def _verified_files(self, step: int) -> Manifest | None:
        """The manifest of a step whose files are those that were written."""
        path = self._directory / str(step)
        if name := self.missing(step):
            raise DamagedCheckpointError(f"{path} is damaged: it lacks {name}")
        manifest = Manifest.read(path)
        if manifest is not None:
            manifest.check_files(path)
            return manifest
        with damage_explained(path):
            custom = ocp.metadata(path).custom_metadata or {}
        if _HAS_MANIFEST in custom:
            raise DamagedCheckpointError(f"{path} is damaged: it lacks its manifest")
        return None

    def _check_space(self, step: int, needed: int) -> None:
        free, needed = shutil.disk_usage(self._directory).free, needed + _SLACK_BYTES
        if free < needed:
            raise CheckpointError(
                f"step {step} cannot be saved to {self._directory}: it needs {needed / 2**20:,.1f} "
                f"MiB, and {free / 2**20:,.1f} MiB are free there; saved steps: "
                f"{self.steps() or 'none'}. Make room, then the same command continues"
            )

    def _give_name(self, partial: pathlib.Path, step: int) -> None:
        """The moment at which a step begins to exist."""
        path = self._directory / str(step)
        replaced = self._directory / f".{step}{_REPLACED}"
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync(self._directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _remove_old(self, saved: int) -> None:
        stay = {*self.steps()[-self._keep :], saved}
        stay |= {self.best_step()} if self._keep_best else set()
        for step in set(self.steps()) - stay:
            # Half of a directory that is being removed must not look like a damaged step.
            removed = self._directory / f".{step}.removed"
            os.rename(self._directory / str(step), removed)
            shutil.rmtree(removed, ignore_errors=True)


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata of a checkpoint must be JSON: {error}") from error
    return kept
