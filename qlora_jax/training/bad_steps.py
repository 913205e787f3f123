"""Steps that went wrong: what is done about them, and what is written down.

Two things happen to long runs. A loss or gradient that is *not a finite number* (an overflow in
float16, a damaged record): the compiled step leaves such a step out by itself (`step.py`), so one
of them costs nothing but its batch. Many in a row mean that no step will ever be finite again, and
the run is ended.

A *spike*: a loss far above those before it. It is a number, and so the step is taken; leaving out
what looks odd would change what is trained on behind the user's back. It is said and written down.
Far is more than both a quarter of the median loss and eight standard deviations above the median of
the last 50 steps, with the deviation estimated from the median distance to the median, which
earlier spikes cannot widen:

    sigma = 1.4826 median |loss_i - median(loss)|

Either way the records of the batch are in `bad_steps.jsonl` in the work directory, one object a
step:

    {"step": 7, "what": "gradient is not finite", "skipped": true, "loss": 2.25, "grad_norm": null,
     "records": ["sums.jsonl:4", …]}

All that is known of earlier steps comes from `metrics.jsonl`, so a run that is continued counts on,
and warns of what it would have warned of.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qlora_jax.data.batches import Batch
from qlora_jax.errors import TrainingError
from qlora_jax.report import Report

BAD_STEPS_NAME = "bad_steps.jsonl"
_NAMED_RECORDS = 40
_WINDOW, _LEAST_STEPS = 50, 20
_SIGMAS, _SHARE = 8.0, 0.25


class BadSteps:
    """Looks at the numbers of each step.

    Attributes:
        skipped: steps left out since the run began.
        in_a_row: of these, how many there are after the last good step.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        most_skipped: int,
        report: Report,
        resume_step: int = 0,
        rows: Iterable[Mapping[str, Any]] = (),
    ):
        """Takes up the count of the steps before, and cuts records of steps that come again.

        Args:
            workdir: where `bad_steps.jsonl` is, or will be with the first bad step.
            most_skipped: steps in a row that are left out before the run is ended.
            report: where it is said.
            resume_step: the step after which the run goes on.
            rows: of `metrics.jsonl`.
        """
        self._path = workdir / BAD_STEPS_NAME
        self._most, self._report = most_skipped, report
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._high = False  # whether the step before was a spike
        for row in rows:
            if 0 < row["step"] <= resume_step and "loss" in row:
                self._count(row.get("skipped_steps", 0) > self.skipped, row["loss"])
        self._cut(resume_step)

    def look(self, step: int, metrics: Mapping[str, Any], batch: Batch) -> None:
        """Says and writes down what is wrong with a step, if anything is.

        Args:
            step: its number.
            metrics: of `make_train_step`, on the host.
            batch: what the step was taken on.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        loss, skipped = float(metrics["loss"]), bool(metrics["skipped"])
        threshold = math.inf if skipped else self._threshold()
        if skipped:
            self._not_finite(step, metrics, batch)
        elif loss > threshold:
            self._spike(step, metrics, batch)
        self._high = loss > threshold
        self._count(skipped, loss)

    def _count(self, skipped: bool, loss: float | None) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if not skipped and loss is not None:
            self._losses.append(loss)

    def _threshold(self) -> float:
        """The loss above which a step is a spike."""
        if len(self._losses) < _LEAST_STEPS:
            return math.inf
        median = float(np.median(self._losses))
        sigma = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
        return median + max(_SIGMAS * sigma, _SHARE * median)

    def _not_finite(self, step: int, metrics: Mapping[str, Any], batch: Batch) -> None:
        bad = ~np.isfinite(metrics["microbatch_nats"])
        # Of a loss, the microbatches that made it so; a gradient is that of all.
        chosen = bad if bad.any() else np.ones_like(bad)
        names = [
            name for ids, take in zip(batch.record_ids, chosen, strict=True) if take for name in ids
        ]
        what = "loss" if bad.any() else "gradient"
        self._write(step, f"{what} is not finite", metrics, names)
        told = (
            f"step {step}: the {what} is not a finite number (loss {metrics['loss']}, gradient "
            f"norm {metrics['grad_norm']}), with these records: {_named(names)}. "
        )
        if self.in_a_row < self._most:
            told += "The step is skipped: adapter and optimizer stay as they were"
            self._report.line(told, style="yellow")
            return
        before = f"; so it was in the {self.in_a_row} steps before" if self.in_a_row else ""
        raise TrainingError(
            f"{told}Nothing of this step is kept{before}. {self._path} has the records of all. "
            "Look at them (scripts/inspect_data.py); in a new --workdir, try a lower "
            "optimizer.learning_rate, or model.compute_dtype=float32. To go on past such steps "
            f"here: --config.train.max_skipped_steps={max(10, 2 * self._most)}"
        )

    def _spike(self, step: int, metrics: Mapping[str, Any], batch: Batch) -> None:
        names = [name for ids in batch.record_ids for name in ids]
        median = float(np.median(self._losses))
        self._write(step, "loss spike", metrics, names, median_loss=median)
        if not self._high:  # a run that has diverged is told once
            self._report.line(
                f"step {step}: the loss is {metrics['loss']:.4f}, where the last "
                f"{len(self._losses)} steps had a median of {median:.4f}: a spike. The step is "
                f"taken. Its records: {_named(names, 10)} (all in {BAD_STEPS_NAME})",
                style="yellow",
            )

    def _write(
        self, step: int, what: str, metrics: Mapping[str, Any], names: list[str], **more: float
    ) -> None:
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm")} | more
        row = {"step": step, "what": what, "skipped": bool(metrics["skipped"])}
        # JSON knows no NaN.
        row |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"records": names}, ensure_ascii=False) + "\n")

    def _cut(self, resume_step: int) -> None:
        """Leaves the rows of steps that are behind; also one that a kill tore goes."""
        rows = read_bad_steps(self._path.parent)
        if not self._path.exists():
            return
        kept = [row for row in rows if row["step"] <= resume_step]
        partial = self._path.with_name(BAD_STEPS_NAME + ".partial")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, self._path)


def read_bad_steps(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The bad steps of a run; none if there was none.

    >>> read_bad_steps("/nowhere")
    []
    """
    path, rows = pathlib.Path(workdir) / BAD_STEPS_NAME, []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the machine went down in the middle of it
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _named(names: list[str], most: int = _NAMED_RECORDS) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
