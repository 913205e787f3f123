"""Says what a run needs and which GPU has it, without that GPU and without the weights.

    python scripts/plan.py --config=configs/guanaco_33b.py --device=rtx4090
    python scripts/plan.py --config=configs/guanaco_7b.py --device=all --json

The training step of the configuration is compiled for each device, and the compiler's own memory
plan is printed. The time is a roofline, the least that arithmetic and memory traffic take: an
estimate. It needs pip install "qlora-jax[cuda]" and about half a minute a device, no GPU.

Exit code 0: the run fits on every device that was asked for. 3: on one of them it does not.
"""

import dataclasses
import json
import sys

import jax
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line, planning
from qlora_jax.errors import ConfigError
from qlora_jax.report import format_bytes
from qlora_jax.targets import TARGETS

_CONFIG = command_line.define_config()
_DEVICE = flags.DEFINE_list("device", ["h100"], f"all, or some of {', '.join(TARGETS)}")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object a device, and nothing else")

_DOES_NOT_FIT = 3


def main() -> None:
    """Plans for one device after the other."""
    names = list(TARGETS) if _DEVICE.value == ["all"] else _DEVICE.value
    if not names:
        raise ConfigError(f"--device is empty; give all, or some of {', '.join(TARGETS)}")
    jax.config.update("jax_platforms", "cpu")  # a GPU of this machine may be at work
    console = Console(stderr=_JSON.value)
    plans = []
    for name in names:
        with console.status(f"compiling the training step for {name} …"):
            plan = planning.plan(_CONFIG.value, name)
        plans.append(plan)
        if _JSON.value:
            print(json.dumps(dataclasses.asdict(plan)), flush=True)
        else:
            _print(console, plan)
    if not all(plan.fits for plan in plans):
        sys.exit(_DOES_NOT_FIT)


def _print(console: Console, plan: planning.Plan) -> None:
    table = Table(box=box.SIMPLE, title=f"{plan.device}: {plan.verdict}", title_justify="left")
    table.add_column("on the device")
    table.add_column("bytes", justify="right")
    for part, count in plan.parts.items():
        if count >= 2**16:  # else it would read as nothing
            table.add_row(part, format_bytes(count))
    table.add_section()
    table.add_row("peak", format_bytes(plan.peak_bytes))
    table.add_row(
        f"budget: memory less {format_bytes(planning.CONTEXT_BYTES)} for context and libraries",
        format_bytes(plan.budget_bytes),
    )
    if plan.host_bytes:
        table.add_row("pinned memory of the host, besides", format_bytes(plan.host_bytes))
    console.print(table)
    console.print(
        f"  a step: {plan.flops / 1e12:,.0f} TFLOP, {plan.traffic_bytes / 1e9:,.0f} GB through "
        f"memory; not under {plan.seconds:.2f} s (an estimate)"
    )
    if plan.changes:
        flags_ = " ".join(f"--config.{field}={value}" for field, value in plan.changes.items())
        console.print(f"  it would fit with {flags_}", soft_wrap=True)
    elif not plan.fits:
        console.print("  no smaller setting that was tried fits either: take a larger device")


if __name__ == "__main__":
    command_line.run(main)
