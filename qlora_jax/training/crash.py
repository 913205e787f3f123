"""What a run that crashed was doing: `crash.json`, to look at and to send with a report.

A crash is what ends a run that its command line does not explain: every defect, and from the first
step on also what is reported as an error in one sentence (a full disk, losses that are no numbers).
A mistake in the flags is none, nor is Ctrl-C. The file is written beside the metrics, replaces that
of an earlier crash, and holds no environment variables, and no text of the data but record names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlora_jax import phases
from qlora_jax.data.batches import Batch, BatchIterator
from qlora_jax.errors import UserError
from qlora_jax.metrics import device_memory, host_memory
from qlora_jax.training.card import versions
from qlora_jax.training.workdir import Workdir

CRASH_NAME = "crash.json"
VERSION = 1
_AFTER_THE_START = ("training", "saving", "evaluating", "finishing")


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: the last one that was done; None before the first.
        batch: that of the step which was begun last.
        position: where that batch stands in the data.
    """

    step: int | None = None
    batch: Batch | None = None
    position: dict[str, int] | None = None


class TrackedBatches:
    """The batches of a run; `tracked` sees which of them a step is taken on.

    The loop fetches a batch while the one before is computed, so the last is not always the one.
    """

    def __init__(self, batches: BatchIterator, progress: Progress):
        self._batches, self._progress = batches, progress
        self._fetched: list[tuple[Batch, dict[str, int]]] = []

    def __next__(self) -> Batch:
        position = self._batches.state()
        batch = next(self._batches)
        self._fetched = [*self._fetched[-1:], (batch, position)]
        return batch

    def state(self) -> dict[str, int]:
        """See `BatchIterator.state`."""
        return self._batches.state()

    def tracked(self, step_fn: Callable) -> Callable:
        """The same step; the batch that it is taken on is remembered."""

        def take(state: Any, frozen: Any, arrays: Mapping[str, Any]) -> Any:
            for batch, position in self._fetched:
                if batch.arrays is arrays:
                    self._progress.batch, self._progress.position = batch, position
            return step_fn(state, frozen, arrays)

        return take


@contextlib.contextmanager
def crash_reported(directory: Workdir, progress: Progress) -> Iterator[None]:
    """Writes `crash.json` when the block ends by a crash, and says so in the error's notes."""
    phases.enter("starting")
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) or phases.current().startswith(_AFTER_THE_START):
            with contextlib.suppress(OSError, UserError):  # the disk may be what the crash is about
                directory.write_json(CRASH_NAME, crash(error, progress))
                error.add_note(
                    f"What the run was doing is in {directory / CRASH_NAME}; what was saved before "
                    f"is as it was. To see what is good: python scripts/doctor.py "
                    f"--workdir={directory.path}"
                )
        raise


def crash(error: BaseException, progress: Progress) -> dict[str, Any]:
    """The content of `crash.json`.

    >>> found = crash(ValueError("too large"), Progress(step=3))
    >>> found["step"], found["exception"]["type"], found["exception"]["message"]
    (3, 'ValueError', 'too large')
    """
    resident, peak = host_memory()
    batch = progress.batch
    return {
        "schema": "qlora_jax/crash",
        "version": VERSION,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": progress.step,
        "phase": phases.current(),
        "batch": batch and {"position": progress.position, "record_ids": batch.record_ids},
        "exception": {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)).splitlines(),
        },
        "memory": {"host_bytes": resident, "host_peak_bytes": peak, "device": _device_memory()},
        "versions": versions(),
    }


def _device_memory() -> dict[str, int] | None:
    try:
        return device_memory()
    except Exception:  # a device that is lost must not hide what was lost with it
        return None
