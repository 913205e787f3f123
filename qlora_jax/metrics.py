"""The numbers of a run: one line of JSON a step, the same for TensorBoard, and a picture.

The first line of `metrics.jsonl` names the schema and its version; files of before have none, and
are read as well. Then one object a row, with `step` (optimizer steps that are done) first. `FIELDS`
says what a run writes; the keys that `plot_loss` knows are `loss`, `heldout_loss` and
`learning_rate`, and any other key is welcome. Several rows may have the same step. A number that is
not finite is written as null, because JSON knows no NaN.

A run that resumes from step N takes the rows up to N as they are and cuts those after it: they
belong to steps whose result was lost and that now come again. So the file has no gap and no repeat,
provided that the rows of step N are written before the checkpoint of step N.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import psutil
import tensorboardX

from qlora_jax.errors import TrainingError

SCHEMA = "qlora_jax/metrics"
# Grows when a field changes its meaning or goes, not when one is added.
SCHEMA_VERSION = 1
FIELDS = {
    "step": "optimizer steps that are done",
    "loss": "of this step, mean nats per token that carries loss",
    "heldout_loss": "mean nats per token that carries loss, over all held-out records",
    "mmlu_accuracy": "share of right answers over all questions of eval.mmlu",
    "learning_rate": "of this step",
    "grad_norm": "global norm of the gradient, before clipping",
    "tokens": "in the batch, without padding",
    "loss_tokens": "of these, how many carry loss",
    "tokens_per_second": "tokens / seconds of this step",
    "memory_bytes": "of the device, or of this process where the device does not say",
    "skipped_steps": "left out up to here because loss or gradient was not a finite number",
    "step_device_bytes": "planned peak of the compiled step",
    "optimizer_device_bytes": "of the optimizer's state, on the device",
    "optimizer_host_bytes": "of the optimizer's state, in the host's memory",
}

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
PLOT_NAME = "loss.png"


class MetricsWriter:
    """Writes the rows of one run; each is on disk when `write` returns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as workdir:
        ...     with MetricsWriter(workdir) as writer:
        ...         writer.write(1, {"loss": 2.5})
        ...         writer.write(2, {"loss": 2.0})
        ...     with MetricsWriter(workdir, resume_step=1) as writer:
        ...         writer.write(2, {"loss": 1.9})
        ...     read_metrics(workdir)
        [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': 1.9}]
    """

    def __init__(self, workdir: str | pathlib.Path, resume_step: int = 0):
        """Opens the files, and cuts what does not belong to the run that goes on.

        Args:
            workdir: where the run is written; made if it does not exist.
            resume_step: the optimizer step the run goes on from. 0 begins a new run: all rows that
                an earlier one left are cut.

        Raises:
            OSError: the files cannot be written.
            TrainingError: what is there is of a newer version.
        """
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_NAME
        kept = [row for row in _read_rows(path) if 0 < resume_step >= row["step"]]
        self._written = {(row["step"], key) for row in kept for key in row}
        header = {"schema": SCHEMA, "version": SCHEMA_VERSION}
        _replace(path, "".join(map(_to_line, [header, *kept])).encode())
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard hides the events of the steps that come again. The suffix: within one second
        # two runs would write to one file.
        self._events = tensorboardX.SummaryWriter(
            str(workdir / TENSORBOARD_NAME),
            purge_step=resume_step + 1 if resume_step else 0,
            filename_suffix=f".from_{resume_step}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row.

        What the run wrote for this step before it was resumed is not written again.

        Args:
            step: optimizer steps that are done.
            values: numbers by name; `loss`, `heldout_loss` (nats per token) and `learning_rate`
                are what the picture shows.

        Raises:
            OSError: the disk is full or gone.
        """
        fresh = {key: values[key] for key in values if (step, key) not in self._written}
        if not fresh:
            return
        self._file.write(_to_line({"step": step, **fresh}))
        self._file.flush()
        for key, value in fresh.items():
            if _json_number(value) is not None:
                self._events.add_scalar(key, value, step)

    def close(self) -> None:
        """Closes the files; nothing can be written afterwards."""
        self._file.close()
        # It writes what it has held back. On a full disk that fails, and would hide the error that
        # ended the run; all of it is in metrics.jsonl.
        with contextlib.suppress(OSError):
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a run in the order of its steps; none if it has written none.

    Args:
        workdir: where the run is written.

    Example:
        >>> read_metrics("/nowhere")
        []
    """
    return _read_rows(pathlib.Path(workdir) / METRICS_NAME)


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The machine went down in the middle of this row: its step comes again.
            continue
        if isinstance(row, dict) and row.get("schema") == SCHEMA:
            _check_version(path, row.get("version"))
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _check_version(path: pathlib.Path, version: Any) -> None:
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise TrainingError(
            f"{path} has version {version} of its schema, and this qlora_jax knows "
            f"{SCHEMA_VERSION}; update qlora_jax"
        )


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _json_number(value) for key, value in row.items()}) + "\n"


def _json_number(value: Any) -> Any:
    """Returns a Python number for a number of any kind: an array's scalar, for example."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is either the old or the new one, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def plot_loss(workdir: str | pathlib.Path) -> pathlib.Path | None:
    """Draws training loss, held-out loss and learning rate over the steps into `loss.png`.

    Args:
        workdir: where the run is written.

    Returns:
        The picture's path, or None when there is no row to draw yet.

    Raises:
        OSError: the picture cannot be written.

    Example:
        >>> plot_loss("/nowhere") is None
        True
    """
    rows = read_metrics(workdir)
    if not rows:
        return None
    # Imported here: 30 MB that a process which draws nothing would hold beside a model's weights.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rates = axes.twinx()
    rates.plot(*_series(rows, "learning_rate"), color="0.75", linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    # The losses belong in front of the learning rate, whose axes were added later.
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(*_series(rows, "loss"), color="tab:blue", linewidth=1, label="training loss")
    axes.plot(*_series(rows, "heldout_loss"), "o-", color="tab:orange", label="held-out loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    handles = [*axes.get_lines(), *rates.get_lines()]
    axes.legend(handles=[line for line in handles if len(line.get_xdata())], loc="upper right")
    path = pathlib.Path(workdir) / PLOT_NAME
    partial = path.with_name("loss.partial.png")
    FigureCanvasAgg(figure).print_png(str(partial))
    os.replace(partial, path)
    return path


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def host_memory() -> tuple[int, int]:
    """Returns this process's resident memory: bytes now, and the most it ever was.

    Example:
        >>> now, peak = host_memory()
        >>> 0 < now <= peak
        True
    """
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        info = psutil.Process().memory_info()
        # macOS and Windows name their peaks otherwise, or have none.
        return info.rss, max(info.rss, getattr(info, "peak_wset", 0))
    # Not getrusage: its maximum is inherited from the process that started this one.
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, peak = (int(sizes[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, max(now, peak)


def device_memory(device: jax.Device | None = None) -> dict[str, int] | None:
    """Returns what a device says of its own memory, or None where it says nothing (a CPU).

    Args:
        device: the first one if not given.

    Returns:
        Bytes: `in_use`, `peak` and `limit`, as far as the device knows them.

    Example:
        >>> device_memory(jax.devices("cpu")[0]) is None
        True
    """
    stats = (device or jax.devices()[0]).memory_stats()
    if not stats:
        return None
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: stats[key] for name, key in names.items() if key in stats}
