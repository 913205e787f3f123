"""What a run saves beside its arrays, and what it checks before it goes on from a checkpoint.

A step is of one run: this base, this tokenizer and template, this data, this configuration. The
manifest of each step says which; a run that is continued compares all of it, before anything is
used. What does not change the run but may change its last bits (another version of JAX, another
compute dtype because the machine is another) is said and not refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import xxhash
from jaxtyping import PyTree
from ml_collections import config_dict

from qlora_jax import config as config_lib
from qlora_jax import phases
from qlora_jax.checkpoint import Checkpointer, Restored
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import CheckpointError, ConfigError, TrainingError
from qlora_jax.report import Report
from qlora_jax.training.card import versions
from qlora_jax.training.data import data_path
from qlora_jax.training.step import TrainState
from qlora_jax.training.workdir import Workdir

Resume = Literal["auto", "must", "never"]
CHECKPOINTS = "checkpoints"


def check_resume(resume: str, path: pathlib.Path) -> None:
    """Refuses what `--resume` does not want, before anything is made or read.

    Args:
        resume: "auto", "must" or "never".
        path: of the work directory.

    Raises:
        ConfigError: there is no such choice.
        TrainingError: there is nothing to continue and there must be, or there is and must not.
    """
    if resume not in get_args(Resume):
        raise ConfigError(f"resume={resume!r}: needs one of {', '.join(get_args(Resume))}")
    numbers = Checkpointer(path / CHECKPOINTS).numbers()
    if resume == "must" and not numbers:
        raise TrainingError(
            f"{path} holds no checkpoint, and --resume=must asks for one; give the --workdir of a "
            "run that has saved, or --resume=auto to begin"
        )
    if resume == "never" and (numbers or (path / "result.json").exists()):
        raise TrainingError(
            f"{path} holds a run already (steps {numbers or 'none'}), and --resume=never "
            "asks for a new one; choose another --workdir (nothing here was touched)"
        )


class RunCheckpoints:
    """The checkpoints of one run that is being trained, in `checkpoints/` of its directory."""

    def __init__(self, config: config_dict.ConfigDict, directory: Workdir, report: Report):
        """Looks at what is there: removes what killed saves left, sets damaged steps aside.

        Args:
            config: a whole configuration.
            directory: locked by this process.
            report: where damage is told.

        Raises:
            CheckpointError: there are steps, and all are damaged.
            ConfigError: the steps are of a run with another configuration.
        """
        self._config, self._directory, self._report = config, directory, report
        self._checkpointer = Checkpointer(
            directory / CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
        )
        self._checkpointer.clean()
        self._set_aside(self._checkpointer.find_damaged())
        if self.exist:  # before the base is loaded
            newest = self._checkpointer.manifest(self._checkpointer.latest_step())
            directory.check_config(config.to_dict(), newest and newest.metadata.get("config"))
        self._identity: dict[str, Any] = {}

    @property
    def exist(self) -> bool:
        """Whether there is a step to go on from."""
        return self._checkpointer.latest_step() is not None

    def describe(self, *, base: str, data: str, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        """Takes what the steps of this run belong to.

        Args:
            base: fingerprint of the base model.
            data: fingerprint of the data.
            tokenizer: with the chat format of the run.
            dtype: that the run computes in.
        """
        template = (tokenizer.chat_template or "").encode()
        self._identity = {
            "base_fingerprint": base,
            "data_fingerprint": data,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "template_fingerprint": xxhash.xxh3_128_hexdigest(template),
            "compute_dtype": dtype.name,
            "config": json.loads(config_lib.to_json(self._config)),
            "versions": versions() | {"tokenizers": importlib.metadata.version("tokenizers")},
        }

    def save(self, step: int, state: TrainState, found: Mapping[str, Any]) -> None:
        """Saves a step.

        Args:
            step: optimizer steps that are done.
            state: after that step.
            found: what the run knows beside its state, JSON.

        Raises:
            CheckpointError: see `Checkpointer.save`.
            TrainingError: the work directory is gone.
        """
        if not (self._directory / "config.json").exists():
            raise TrainingError(
                f"{self._directory.path} has vanished while it was trained in, with what was saved "
                f"there; step {step} is not saved, because half a directory would not go on. Give "
                "the run a place that stays, and begin again, or put a copy back"
            )
        self._checkpointer.save(step, state, {**self._identity, **found})
        phases.enter("training")

    def restore(self, like: PyTree) -> Restored | None:
        """The newest good step, if it is one of this run.

        Args:
            like: a state without values, placed where the steps want it.

        Returns:
            The step, or None where there is none.

        Raises:
            CheckpointError: no step is good, or it does not fit.
            ConfigError: it has another configuration.
            TrainingError: it has another base, tokenizer, template or data.
        """
        if not self.exist:
            return None
        phases.enter("restoring")
        found = self._checkpointer.restore_newest(like)
        if found is None:
            raise CheckpointError(f"the checkpoints of {self._directory.path} have vanished")
        self._set_aside(found.damaged)
        self._check(found.metadata)
        if not found.verified:
            self._report.line(
                f"\nstep {found.step} was saved by an older version, without hashes: whether it is "
                "undamaged cannot be verified. The steps from here on can be.",
                style="yellow",
            )
        return found

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, reason in damaged.items():
            path = self._checkpointer.set_aside(step)
            newest = self._checkpointer.latest_step()
            self._report.line(
                f"{reason}.\n  Nothing of it is used: it was renamed to {path.name}, and the run "
                f"goes on from an older step, {newest}. Remove it when you have no use for it.",
                style="bold red",
            )

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Compares what a step belongs to with what this run has; older versions saved less."""
        now, path = self._identity, self._config.model.path
        before = {**now, **saved}
        library_is_same = before["versions"].get("tokenizers") == now["versions"]["tokenizers"]
        what = {
            "base_fingerprint": path,
            "data_fingerprint": data_path(self._config),
            "template_fingerprint": f"the chat template of {path}",
        }
        if library_is_same:  # else the same tokenizer may be written down in another way
            what["tokenizer_fingerprint"] = f"the tokenizer of {path}"
        for name, where in what.items():
            self._directory.check_same(where, before[name], now[name])
        changed = [
            f"{name} {before['versions'][name]} then, {version} now"
            for name, version in now["versions"].items()
            if before["versions"].get(name, version) != version
        ]
        if before["compute_dtype"] != now["compute_dtype"]:
            changed.append(f"computed in {before['compute_dtype']}, now {now['compute_dtype']}")
        if changed:
            self._report.line(
                f"\nSince that step there is a change: {'; '.join(changed)}. What follows may "
                "differ in its last bits from a run without it.",
                style="yellow",
            )
