"""What is in a work directory: which steps are good, what is damaged, and how to go on.

Everything is read, nothing is changed: neither is a damaged step set aside, nor what a killed
process left removed. That is what the next run does.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from typing import Any

from qlora_jax.checkpoint import HELDOUT_LOSS, Checkpointer
from qlora_jax.errors import CheckpointError, DamagedCheckpointError, UserError
from qlora_jax.metrics import METRICS_NAME, read_metrics
from qlora_jax.report import format_bytes
from qlora_jax.training.card import generate_command, this_python
from qlora_jax.training.crash import CRASH_NAME
from qlora_jax.training.locking import holder, is_locked
from qlora_jax.training.saving import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        text: for a person, as Markdown.
        healthy: whether nothing is damaged.
    """

    text: str
    healthy: bool


def diagnose(workdir: str | pathlib.Path) -> Diagnosis:
    """Looks at all that a run has left.

    Args:
        workdir: of a run.

    Raises:
        CheckpointError: there is no such directory, or it is none of a run.
    """
    path = pathlib.Path(workdir).expanduser()
    checkpointer = Checkpointer(path / CHECKPOINTS)
    steps = checkpointer.numbers()
    if not steps and not (path / "config.json").exists():
        raise CheckpointError(f"{path} holds no run; give the --workdir of one")
    lines, good, healthy = [], [], True
    best = checkpointer.best_step()
    for step in steps:
        try:
            manifest = checkpointer.verify(step)
        except DamagedCheckpointError as error:
            lines.append(f"step {step}: DAMAGED. {error}")
            healthy = False
            continue
        good.append(step)
        note = "good" if manifest else "readable; an older version wrote it without hashes"
        if manifest:
            size = sum(size for size, _ in manifest.files.values())
            note += f", {len(manifest.leaves)} arrays in {format_bytes(size)}"
            loss = manifest.metadata.get(HELDOUT_LOSS)
            note += f", held-out loss {loss:.4f}" if isinstance(loss, float) else ""
        lines.append(f"step {step}: {note}{' (the best)' if step == best else ''}")
    files = [_json(path / "config.json"), _metrics(path), _json(path / "result.json")]
    healthy &= not any(line and "DAMAGED" in line for line in files)
    sections = {
        "Checkpoints": lines or ["none yet"],
        "Files": [line for line in [*files, *_left_over(path), *_crash(path)] if line],
        "How to go on": _advice(path, steps, good, path / "config.json"),
    }
    text = f"## {path}\n\n" + "\n".join(
        f"### {title}\n\n" + "".join(f"- {line}\n" for line in found)
        for title, found in sections.items()
    )
    return Diagnosis(text, healthy)


def _json(path: pathlib.Path) -> str | None:
    if not path.exists():
        return None
    return f"{path.name}: {'good' if _read(path) is not None else 'DAMAGED, it is no JSON'}"


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _metrics(path: pathlib.Path) -> str | None:
    if not (path / METRICS_NAME).exists():
        return None
    try:
        steps = {row["step"] for row in read_metrics(path) if "loss" in row}
    except UserError as error:
        return f"{METRICS_NAME}: {error}"
    gaps = sorted(set(range(1, max(steps, default=0) + 1)) - steps)
    if gaps:
        return f"{METRICS_NAME}: DAMAGED, {len(gaps)} steps are missing, the first is {gaps[0]}"
    return f"{METRICS_NAME}: good, {len(steps)} steps"


def _left_over(path: pathlib.Path) -> list[str]:
    folder = path / CHECKPOINTS
    aside = sorted(found.name for found in folder.glob("*.damaged*"))
    killed = sorted(found.name for found in [*path.glob(".*.partial-*"), *folder.glob(".*.*")])
    lines = [
        f"{CHECKPOINTS}/{name}: set aside; remove it when you have no use for it" for name in aside
    ]
    if killed:
        lines.append(f"left by a process that was killed, removed by the next: {', '.join(killed)}")
    return lines


def _crash(path: pathlib.Path) -> list[str]:
    found = _read(path / CRASH_NAME)
    if not isinstance(found, dict):
        return []
    exception = found.get("exception", {})
    message = str(exception.get("message", "")).partition("\n")[0]
    return [
        f"{CRASH_NAME}: {found.get('time')}, {found.get('phase')} after step {found.get('step')}: "
        f"{exception.get('type')}: {message}"
    ]


def _advice(
    path: pathlib.Path, steps: list[int], good: list[int], config: pathlib.Path
) -> list[str]:
    if is_locked(path):
        return [f"a run is going on here{holder(path)}: leave it alone, or stop it with Ctrl-C"]
    train = f"{this_python()} scripts/train.py --config={shlex.quote(str(config))}"
    go_on = f"{train} --workdir={shlex.quote(str(path))}"
    if steps and not good:
        return [
            f"no step can be used: put a copy of one back into {path / CHECKPOINTS}, or begin "
            f"again: {train} --workdir=<a new directory>"
        ]
    if _read(config) is None:
        where = f"{path / CHECKPOINTS / str(good[-1])}/manifest.json" if good else "your recipe"
        return [
            f"config.json cannot be used: write it again from `config` in {where}, or give the "
            "same --config and flags as at the beginning"
        ]
    if not good:
        return [f"nothing was saved yet; the same command begins again: {go_on}"]
    total = _read(config).get("train", {}).get("steps") or "the last"
    talk = f"talk to step {good[-1]}: {generate_command(path, this_python())}"
    if _read(path / "result.json") is not None:
        return [f"the run is finished; to train longer, raise --config.train.steps: {go_on}", talk]
    lost = [step for step in steps if step > good[-1]]
    note = f" (what came after it, up to step {lost[-1]}, is computed again)" if lost else ""
    return [f"continue after step {good[-1]} of {total}{note}: {go_on}", talk]
