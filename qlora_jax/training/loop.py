"""The loop over steps: what happens on the host between two of them.

While the device computes a step, the host prepares the next batch. The loop then waits for the loss
of every step: one that is not a number is reported with its records, and too many of them end the
run (`bad_steps.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from qlora_jax import phases
from qlora_jax.checkpoint import HELDOUT_LOSS
from qlora_jax.data.batches import BatchIterator
from qlora_jax.errors import Interrupted
from qlora_jax.report import Report, memory_in_use
from qlora_jax.training.bad_steps import BAD_STEPS_NAME, BadSteps
from qlora_jax.training.interrupts import InterruptWatch
from qlora_jax.training.mmlu import MMLU_ACCURACY
from qlora_jax.training.step import TrainState

# Of a step whose memory is planned: the device's, and where the optimizer's state lies.
_PLACES = ("step_device_bytes", "optimizer_device_bytes", "optimizer_host_bytes")


@dataclasses.dataclass
class Window:
    """Sums over the steps since the last printed line.

    >>> window = Window()
    >>> window.add({"loss": 2.0, "loss_tokens": 30, "tokens": 90}, seconds=0.5)
    >>> window.add({"loss": 1.0, "loss_tokens": 10, "tokens": 10}, seconds=0.5)
    >>> window.loss, window.tokens_per_second
    (1.75, 100.0)
    """

    nats: float = 0.0
    loss_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Adds a step; one that was skipped has no loss."""
        if not metrics.get("skipped"):
            self.nats += float(metrics["loss"]) * int(metrics["loss_tokens"])
            self.loss_tokens += int(metrics["loss_tokens"])
        self.tokens += int(metrics["tokens"])
        self.seconds += seconds

    @property
    def loss(self) -> float:
        """Mean nats per token that carries loss."""
        return self.nats / max(self.loss_tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding, per second of training."""
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps from one to the next of the things that do not happen in each; 0 is never."""

    log: int
    save: int
    evaluate: int


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Attributes:
        save: (step, state, position in the data, loss since the last line).
        evaluate: what is measured of a state, by its name in the metrics; nothing when a signal
            came before it was known.
        record: (step, row), each step's metrics.
    """

    save: Callable[[int, TrainState, dict[str, int], float | None], None]
    evaluate: Callable[[TrainState], dict[str, float]]
    record: Callable[[int, dict[str, float]], None]


def run_steps(
    step_fn: Callable[[TrainState, nnx.State, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    frozen: nnx.State,
    batches: BatchIterator,
    *,
    total: int,
    schedule: optax.Schedule,
    intervals: Intervals,
    hooks: Hooks,
    report: Report,
    bad_steps: BadSteps,
) -> tuple[TrainState, float | None]:
    """Takes steps until `total` are done, counting those that `state` already has behind it.

    Args:
        step_fn: from `make_train_step`, compiled or not.
        state: is donated to the first step.
        frozen: the frozen part of the model.
        batches: stands where the state left off.
        total: the last step's number.
        schedule: the learning rate by step, for the log only.
        intervals: when to log, save and evaluate.
        hooks: how to save, evaluate and record.
        report: prints the log lines.
        bad_steps: looks at each step; has seen those that `state` has behind it.

    Returns:
        The last state, and the loss of the last line; None if no step had one.

    Raises:
        TrainingError: too many steps in a row had a loss or gradient that is not finite.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    start, window = int(state.step), Window()
    batch, spent, loss = next(batches), 0.0, None
    with InterruptWatch() as watch:
        for step in range(start + 1, total + 1):
            position = batches.state()
            began = time.perf_counter()
            state, metrics = step_fn(state, frozen, batch.arrays)
            following = next(batches)  # while the device works
            metrics = jax.device_get(metrics)
            seconds = time.perf_counter() - began
            # The schedule counts the updates that were made.
            last, rate = step == total, float(schedule(step - 1 - bad_steps.skipped))
            bad_steps.look(step, metrics, batch)
            window.add(metrics, seconds)
            spent += seconds
            row = {
                "loss": float(metrics["loss"]),
                "learning_rate": rate,
                "grad_norm": float(metrics["grad_norm"]),
                "tokens": int(metrics["tokens"]),
                "loss_tokens": int(metrics["loss_tokens"]),
                "tokens_per_second": int(metrics["tokens"]) / seconds,
                "memory_bytes": memory_in_use()[0],
                "skipped_steps": bad_steps.skipped,
            }
            row |= {name: int(metrics[name]) for name in _PLACES if name in metrics}
            if intervals.evaluate and step % intervals.evaluate == 0 and not last:
                row |= hooks.evaluate(state)
            hooks.record(step, row)
            if step == start + 1 or step % intervals.log == 0 or last:
                loss = window.loss if window.loss_tokens else loss
                report.step(
                    step=step,
                    steps=total,
                    loss=math.nan if loss is None else loss,
                    learning_rate=rate,
                    grad_norm=row["grad_norm"],
                    tokens_per_second=window.tokens_per_second,
                    memory=row["memory_bytes"],
                    seconds_left=(total - step) * spent / (step - start),
                    heldout=row.get(HELDOUT_LOSS),
                    mmlu=row.get(MMLU_ACCURACY),
                )
                window = Window()
            # Not among bad steps: where these are for good, older checkpoints must not make room.
            due = step % intervals.save == 0 and not bad_steps.in_a_row
            if last or watch.requested or due:
                hooks.save(step, state, position, loss)
            if watch.requested:
                report.interrupted(step, total)
                phases.enter("stopped")
                raise Interrupted(watch.number)
            batch = following
    if bad_steps.skipped:
        report.line(
            f"{bad_steps.skipped} of {total} steps were skipped (see {BAD_STEPS_NAME})",
            style="yellow",
        )
    return state, loss
