"""The directory of a run: what lies in it, and whether it may be continued with a configuration.

    config.json     the configuration after all overrides
    checkpoints/    see `qlora_jax.checkpoint`
    subtracted.safetensors   only with PiSSA and the like, see `qlora_jax.subtraction`
    metrics.jsonl   see `qlora_jax.metrics` (also tensorboard/ and loss.png)
    bad_steps.jsonl only after a skipped step or a loss spike, see `bad_steps.py`
    result.json     written last: a run is finished when it is there
    README.md       the model card
    crash.json      what a run was doing when it crashed, see `crash.py`
    .lock           locked by the process that trains here, see `locking.py`

A run that is continued must be the same run. Every field that has a say in the adapter has to be
what it was; fields that only say how long to train, what to print, what to keep and what to compute
again (`model.remat`) may change; a decaying learning rate then aims at the new last step. The paths
of model and data may change too: these are recognised by their content.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from qlora_jax.config import get_config
from qlora_jax.errors import ConfigError, TrainingError
from qlora_jax.guarded_files import parse_json, read_limited
from qlora_jax.manifest import sync
from qlora_jax.training.locking import locked

# Sections and fields that do not make it another run: how long, what is printed and kept, in which
# memory, and what is computed again.
_MAY_CHANGE = (
    "model.remat",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.max_skipped_steps",
    "data.cache_dir",
    "optimizer.device_budget_gb",
    "eval",
    "sample",
    "checkpoint",
)
# `.NAME.partial-PID`, as all writers of this project call what is not finished.
_PARTIAL = re.compile(r"\.partial-(\d+)$")
_BY_CONTENT = ("model.path", "data.path", "data.eval_path")


class Workdir:
    """The files of one run.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     workdir = Workdir(pathlib.Path(folder) / "runs" / "first")
    ...     workdir.write_json("result.json", {"steps": 3})
    ...     workdir.read_json("result.json")
    {'steps': 3}
    """

    def __init__(self, path: str | os.PathLike):
        """Makes the directory, with its parents, and tries whether it can be written to.

        Args:
            path: of the directory.

        Raises:
            TrainingError: it cannot be made or written to.
        """
        self.path = pathlib.Path(path).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"can this be written?")
        except OSError as error:
            raise TrainingError(explain_os_error(error, self.path)) from error

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def lock(self) -> contextlib.AbstractContextManager[str | None]:
        """Keeps other processes from training here, see `locking.locked`."""
        return locked(self.path)

    def clean(self) -> None:
        """Removes files that processes which were killed have left half-written; with the lock."""
        for path in self.path.glob(".*.partial-*"):
            match = _PARTIAL.search(path.name)
            if match and not _is_alive(int(match[1])):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def check_space(self, needed: int) -> None:
        """Refuses to start what the disk has no room for.

        Args:
            needed: bytes that the run will write.

        Raises:
            TrainingError: fewer are free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise TrainingError(
                f"{self.path}: the checkpoints of this run need {needed / 2**20:,.0f} MiB, and "
                f"{free / 2**20:,.0f} MiB are free there; make room, choose another --workdir, or "
                "lower checkpoint.keep or lora.rank"
            )

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file so that it is there whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file so that it is there whole or not at all.

        Raises:
            TrainingError: the disk is full or does not allow it.
        """
        partial = self.path / f".{name}.partial-{os.getpid()}"
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, self.path / name)
            sync(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise TrainingError(explain_os_error(error, self.path / name)) from error

    def read_json(self, name: str) -> Any:
        """What a JSON file holds, or None where there is none.

        Raises:
            TrainingError: the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            return parse_json(read_limited(path))
        except ValueError as error:
            raise TrainingError(
                f"{path} is no JSON ({error}); restore it, or start in a new --workdir"
            ) from error

    def check_config(
        self, config: Mapping[str, Any], saved: Mapping[str, Any] | None = None
    ) -> None:
        """Refuses to continue with a configuration that would make it another run.

        Args:
            config: nested dicts, as in `config.json`.
            saved: that of the checkpoint to go on from; None: what `config.json` says.

        Raises:
            ConfigError: naming every field that differs, with both values.
        """
        saved = saved or self.read_json("config.json") or config
        before, now = _flatten(saved), _flatten(config)
        # A run of an older version lacks the fields that came later: it had what they are now.
        base = _flatten(get_config().to_dict())
        before = {name: base[name] for name in now if name in base} | before
        changed = [
            f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({**before, **now})
            if before.get(name) != now.get(name) and not may_change(name)
        ]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration, so it cannot be continued:"
                + "".join(f"\n  {line}" for line in changed)
                + "\nSet these back to continue that run (--config="
                + f"{self.path / 'config.json'} does), or choose a new --workdir."
            )

    def check_same(self, what: str, before: str, now: str) -> None:
        """Refuses to continue on other weights or data than the run began with.

        Args:
            what: "the base model" or "the data", with where it is now.
            before: fingerprint in the checkpoint.
            now: fingerprint of what the configuration names.

        Raises:
            TrainingError: they differ.
        """
        if before != now:
            raise TrainingError(
                f"{self.path} was trained with other content than {what} has now (fingerprint "
                f"{before}, here {now}); give the run what it began with, or choose a new --workdir"
            )


def _is_alive(pid: int) -> bool:
    """Whether a process that may be writing exists; this one is not, when it asks."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def explain_os_error(error: OSError, path: pathlib.Path) -> str:
    """A message for a person: what could not be written, why, and what to do.

    >>> explain_os_error(OSError(errno.ENOSPC, "No space left on device"), pathlib.Path("runs/a"))
    'runs/a cannot be written: the disk is full; make room or choose another --workdir'
    """
    reasons = {
        errno.ENOSPC: "the disk is full; make room or choose another --workdir",
        errno.EDQUOT: "your disk quota is used up; make room or choose another --workdir",
        errno.EACCES: "permission denied; choose a --workdir that you may write to",
        errno.EPERM: "permission denied; choose a --workdir that you may write to",
        errno.EROFS: "the file system is read-only; choose another --workdir",
        errno.EEXIST: "it is a file, not a directory; choose another --workdir",
        errno.ENOTDIR: "a part of it is a file, not a directory; choose another --workdir",
    }
    return f"{path} cannot be written: {reasons.get(error.errno, error.strerror or str(error))}"


def may_change(name: str) -> bool:
    """Whether a run can be continued with another value of a field.

    >>> may_change("model.remat"), may_change("eval.every"), may_change("lora.rank")
    (True, True, False)
    """
    allowed = _MAY_CHANGE + _BY_CONTENT
    return name in allowed or name.partition(".")[0] in allowed


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_items(config, prefix))


def _items(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
