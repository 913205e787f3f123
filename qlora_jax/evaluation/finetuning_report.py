"""Loss curves of fine-tuning methods with several seeds each: a table, a plot, all figures.

Methods with the same seed saw the same batches in the same order, so they are compared seed by
seed: the difference of two methods is told for every seed, and whether it is more than what seeds
differ by is for the reader to see. Few seeds do not bear a test of significance.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from qlora_jax.errors import EvaluationError
from qlora_jax.report import format_bytes, format_count
from qlora_jax.training.card import versions

TITLES = {"qlora": "QLoRA", "lora": "LoRA, 16 bit", "full": "full"}
_BASELINE = "lora"
_HEADS = [
    "method",
    "rate",
    "trained",
    "a step needs",
    "before",
    "after: mean ± sd",
    "against LoRA, by seed",
]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run measured.

    Attributes:
        method: a key of `TITLES`.
        seed: of the data's order and of the adapters.
        learning_rate: the largest.
        trainable: numbers that were trained.
        step_bytes: memory of a step, as it was compiled.
        loss: nats per token of the batch of each step.
        heldout: nats per token of what was held out, by step.
        seconds: loading and measuring included.
    """

    method: str
    seed: int
    learning_rate: float
    trainable: int
    step_bytes: int
    loss: tuple[float, ...]
    heldout: Mapping[int, float]
    seconds: float = 0.0

    @classmethod
    def of(cls, key: str, record: Mapping[str, Any]) -> Run:
        """Reads a line of the journal.

        >>> record = {"learning_rate": 1e-3, "trainable": 4, "step_bytes": 8, "loss": [2.0]}
        >>> run = Run.of("qlora, 7", record | {"heldout": {"0": 2.5, "1": 2.0}})
        >>> run.method, run.seed, run.after
        ('qlora', 7, 2.0)
        """
        method, seed = key.split(", ")
        heldout = {int(step): loss for step, loss in record["heldout"].items()}
        fields = dict(record) | {"loss": tuple(record["loss"]), "heldout": heldout}
        return cls(method, int(seed), **fields)

    @property
    def after(self) -> float:
        """The held-out loss at the end."""
        return self.heldout[max(self.heldout)]


def write(runs: Sequence[Run], out: pathlib.Path, *, settings: Mapping[str, Any]) -> Table:
    """Writes `finetuning.md`, `finetuning.png` and `finetuning.json`.

    Args:
        runs: at least one.
        out: a folder, which exists.
        settings: what is needed to repeat them.

    Returns:
        The table, to be printed.

    Raises:
        EvaluationError: the folder cannot be written to.
    """
    rows = compare(runs)
    content = {
        "settings": dict(settings),
        "runs": [dataclasses.asdict(run) for run in runs],
        "versions": versions(),
    }
    seeds = len({run.seed for run in runs})
    text = (
        f"Held-out loss in nats per token before and after, of {seeds} seeds. Runs of one seed saw "
        "the same batches; against LoRA: the difference of each seed, negative is better."
    )
    lines = [_HEADS, ["---"] * len(_HEADS), *rows]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    page = f"# Fine-tuning\n\n{text}\n\n{table}\n![loss curves](finetuning.png)\n"
    try:
        _draw(out / "finetuning.png", runs)
        (out / "finetuning.md").write_text(page)
        (out / "finetuning.json").write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise EvaluationError(f"{out} cannot be written: {error.strerror or error}") from error
    shown = Table(title="Fine-tuning", caption=text, caption_justify="left")
    for i, head in enumerate(_HEADS):
        shown.add_column(head, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def compare(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each method.

    >>> make = lambda method, seed, after: Run(method, seed, 1e-3, 5, 9, (), {0: 3.0, 4: after})
    >>> rows = compare([make("lora", 0, 2.0), make("lora", 1, 2.2), make("qlora", 1, 2.3)])
    >>> rows[0][0], rows[0][5:], rows[1][5:]
    ('QLoRA', ['2.3000', '+0.1000'], ['2.1000 ± 0.1414', '–'])
    """
    baseline = {run.seed: run.after for run in runs if run.method == _BASELINE}
    rows = []
    for method, title in TITLES.items():
        mine = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        if not mine:
            continue
        after = [run.after for run in mine]
        spread = f" ± {statistics.stdev(after):.4f}" if len(after) > 1 else ""
        against = [f"{r.after - baseline[r.seed]:+.4f}" for r in mine if r.seed in baseline]
        rows.append(
            [
                title,
                f"{mine[0].learning_rate:g}",
                format_count(mine[0].trainable),
                format_bytes(mine[0].step_bytes),
                f"{mine[0].heldout[0]:.4f}",
                f"{statistics.mean(after):.4f}{spread}",
                ", ".join(against) if against and method != _BASELINE else "–",
            ]
        )
    return rows


def _draw(path: pathlib.Path, runs: Sequence[Run]) -> None:
    # A Figure of its own, not pyplot's: no window system is asked for, and nothing is kept.
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (method, title) in enumerate(TITLES.items()):
        mine = [run for run in runs if run.method == method]
        if mine:
            _draw_method(left, right, mine, title, f"C{i}")
    left.set(title="training: mean and range of the seeds", ylabel="nats per token of the batch")
    right.set(title="held out: a line for each seed", ylabel="nats per token")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)


def _draw_method(left: Axes, right: Axes, runs: Sequence[Run], title: str, color: str) -> None:
    steps = min(len(run.loss) for run in runs)
    losses = np.array([run.loss[:steps] for run in runs])
    numbers = np.arange(1, steps + 1)
    left.plot(numbers, losses.mean(axis=0), color=color, label=title)
    left.fill_between(numbers, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.15)
    for i, run in enumerate(runs):
        label = title if i == 0 else None
        right.plot(*zip(*sorted(run.heldout.items()), strict=True), "o-", color=color, label=label)
