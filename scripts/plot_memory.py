"""Draws the memory of a run: what its steps took of the device, and what lay in the host's memory.

    python scripts/plot_memory.py --workdir=runs/spike --out=docs/paging.png

It reads the run's metrics.jsonl. A run with rows of several lengths (data.group_by_length) and a
budget that the longest exceed shows the optimizer's state making room for them and coming back.
"""

import pathlib

import matplotlib
from absl import flags
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from qlora_jax import command_line
from qlora_jax.config import load_config
from qlora_jax.errors import UserError
from qlora_jax.metrics import read_metrics

_WORKDIR = flags.DEFINE_string("workdir", None, "of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "the picture (.png, .svg, .pdf)", required=True)
_MB = 1e6


def main() -> None:
    """Draws one picture."""
    workdir = pathlib.Path(_WORKDIR.value)
    steps = [row for row in read_metrics(workdir) if "step_device_bytes" in row]
    if not steps:
        raise UserError(f"{workdir} holds no steps with their memory; give the --workdir of a run")
    matplotlib.use("agg")
    numbers = [row["step"] for row in steps]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    lines = {
        "device memory of the step": "step_device_bytes",
        "optimizer state on the device": "optimizer_device_bytes",
        "optimizer state in the host's memory": "optimizer_host_bytes",
    }
    for label, key in lines.items():
        axes.step(numbers, [row[key] / _MB for row in steps], where="mid", label=label)
    budget = load_config(workdir / "config.json").optimizer.device_budget_gb
    if budget:
        axes.axhline(budget * 1e3, color="grey", linestyle="--", label="budget")
    axes.set(xlabel="optimizer step", ylabel="MB", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(_OUT.value, dpi=110)
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main)
