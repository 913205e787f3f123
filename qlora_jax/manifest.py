"""The manifest of a checkpoint: what was saved, to the bit, and what it belongs to.

Orbax stores arrays and notices little: a flipped bit in an array restores as another number, and a
dtype that differs is cast. So every step has a `manifest.json` of our own beside Orbax's files:

    leaves     of each its path, shape, dtype, memory (`device` or `pinned_host`), and the hash of
               its bytes as they were in memory when they were saved
    files      of each file of the step its size and hash, as read back after writing
    metadata   what the caller knows: position in the data, fingerprints, configuration, versions
    xxh3_128   the hash of everything above it in the file

`files` finds damage on the disk before a byte is used, and without knowing what the arrays are for;
`leaves` proves that what was read is what was in memory. Both are needed: files that are whole may
be read wrongly. The hash is xxh3 with 128 bits: it finds accidents, not forgers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xxhash

from qlora_jax.errors import CheckpointError, DamagedCheckpointError
from qlora_jax.files import fingerprint

MANIFEST_NAME = "manifest.json"
VERSION = 1
_FORMAT = "qlora_jax checkpoint"
_HASH = b',\n "xxh3_128": "'
_END = b'"\n}\n'
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What is known of an array.

    Attributes:
        shape: its axes.
        dtype: name of its dtype.
        memory: where it was, `device` or `pinned_host`; of a NumPy array `host`. Where it goes is
            up to who restores it.
        hash: of its bytes, 32 hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    memory: str
    hash: str

    @classmethod
    def of(cls, array: Any) -> LeafRecord:
        """Hashes an array; one of a device is copied to the host for it.

        >>> LeafRecord.of(np.zeros(3, np.int8)).hash
        'f21da334f2869f1beb5d658bb22f286b'
        """
        kind = array.sharding.memory_kind if isinstance(array, jax.Array) else None
        value = np.asarray(array)
        content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        digest = xxhash.xxh3_128_hexdigest(content)
        return cls(value.shape, value.dtype.name, kind or "host", digest)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of one step.

    Attributes:
        step: its number.
        leaves: by path.
        files: size and hash by relative name.
        metadata: JSON.
    """

    step: int
    leaves: dict[str, LeafRecord]
    metadata: dict[str, Any]
    files: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def write(self, directory: pathlib.Path) -> None:
        """Lists the files that are in a step's directory, and writes the manifest beside them.

        When it returns, all of them are on the disk and not only in the system's memory.

        Raises:
            OSError: the disk is full or gone.
        """
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {}
        for path in paths:
            files[path.relative_to(directory).as_posix()] = path.stat().st_size, fingerprint(path)
            sync(path)
        content = {"format": _FORMAT, "version": VERSION, "step": self.step, "files": files}
        content["leaves"] = {name: dataclasses.asdict(leaf) for name, leaf in self.leaves.items()}
        content["metadata"] = self.metadata
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        head = ("{\n" + ",\n".join(lines)).encode()
        manifest = directory / MANIFEST_NAME
        manifest.write_bytes(head + _HASH + _hash(head) + _END)
        sync(manifest)
        for folder in {path.parent for path in paths} | {directory}:
            sync(folder)

    @classmethod
    def read(cls, directory: pathlib.Path) -> Manifest | None:
        """Reads the manifest of a step's directory.

        Returns:
            The manifest, or None where there is none: versions before it wrote none.

        Raises:
            DamagedCheckpointError: it is not what was written.
            CheckpointError: it is of a newer version of this project.
        """
        path = directory / MANIFEST_NAME
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedCheckpointError(
                f"{path} cannot be read: {error.strerror or error}"
            ) from error
        head, _, tail = text.rpartition(_HASH)
        if tail != _hash(head) + _END:
            raise DamagedCheckpointError(f"{path} is not what was written")
        content = json.loads(head + b"\n}")
        if content["version"] > VERSION:
            raise CheckpointError(
                f"{path} was written by a newer version of qlora_jax (its manifest has version "
                f"{content['version']}, this one knows {VERSION}); update qlora_jax"
            )
        leaves = {
            name: LeafRecord(**{**leaf, "shape": tuple(leaf["shape"])})
            for name, leaf in content["leaves"].items()
        }
        files = {name: tuple(record) for name, record in content["files"].items()}
        return cls(content["step"], leaves, content["metadata"], files)

    def check_files(self, directory: pathlib.Path) -> None:
        """Compares the files of a directory with those that were written.

        Raises:
            DamagedCheckpointError: naming the first few that are not what they were.
        """
        found = [_difference(directory, name, *record) for name, record in self.files.items()]
        _raise_if_any(directory, [problem for problem in found if problem])

    def check_leaves(self, directory: pathlib.Path, leaves: Mapping[str, Any]) -> None:
        """Compares arrays that were read with those that were saved.

        Args:
            directory: of the step, for the message.
            leaves: by path.

        Raises:
            DamagedCheckpointError: naming the first few that are not what they were.
        """
        problems = [f"{name} is missing" for name in self.leaves.keys() - leaves.keys()]
        for name, leaf in leaves.items():
            saved, read = self.leaves.get(name), LeafRecord.of(leaf)
            if saved is None:
                problems.append(f"{name} is not in its manifest")
            elif (saved.shape, saved.dtype, saved.hash) != (read.shape, read.dtype, read.hash):
                problems.append(f"{name} is read with other bits than were saved")
        _raise_if_any(directory, problems)


def _difference(directory: pathlib.Path, name: str, size: int, digest: str) -> str | None:
    """What a file has that it should not have, or None."""
    try:
        found = (directory / name).stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        same = fingerprint(directory / name) == digest
        return None if same else f"{name} has other bits than were written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _raise_if_any(directory: pathlib.Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DamagedCheckpointError(
            f"{directory} is damaged: {'; '.join(sorted(problems)[:_NAMED])}{more}"
        )


def _hash(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk.

    Raises:
        OSError: a file's content could not be written. Not every file system syncs directories.
    """
    suppressed = contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext()
    with suppressed:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
