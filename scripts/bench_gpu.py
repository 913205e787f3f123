"""The suite `gpu` of scripts/bench.py: is every kernel right, how fast is it, and whole steps.

`check`: each operation by each implementation against NumPy, in processes of their own, so that a
kernel that crashes or hangs costs one row. `kernels`: device time of each operation against
bitsandbytes and dense bfloat16 products, in turns. `steps`: LLaMA-7B, a QLoRA training step of
4 x 2048 tokens and decoding, against transformers + peft + bitsandbytes. `tune` (only when asked
for): see scripts/bench_gpu_tune.py.

All fits into `--budget_s` seconds: each part gets its share of what is left, and what it did not
come to is named. With `--dry-run` the same code runs on the CPU with tiny shapes, Pallas's and
Triton's kernels in their interpreters; its times mean nothing.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_gpu_cases as cases
import bench_gpu_machine
import bench_gpu_report as report
from bench_gpu_suite import Suite
from bench_workers import find_python
from rich.console import Console

from qlora_jax.training.card import versions

DEFAULT_PARTS = ("check", "kernels", "steps")
PARTS = (*DEFAULT_PARTS, "tune")
BUDGET_S, DRY_RUN_S = 460.0, 170.0
# How a run's time is divided among its parts.
_WEIGHTS = {"check": 2.5, "kernels": 3.5, "steps": 5.0, "tune": 5.0}


def default_rival(python: str | None) -> pathlib.Path | None:
    """The rival's Python: as given, else this one if torch and bitsandbytes are in it.

    Raises:
        UserError: the given one cannot import the rival's packages.
    """
    if python is not None:
        return find_python(python, "torch, transformers, peft, bitsandbytes")
    here = all(importlib.util.find_spec(name) for name in ("torch", "bitsandbytes"))
    return pathlib.Path(sys.executable) if here else None


def run(
    *,
    parts: list[str],
    dry_run: bool,
    rival_python: str | None,
    budget_s: float | None,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    sizes: cases.Sizes | None = None,
) -> dict[str, Any]:
    """Runs the parts one after the other, and prints the goals beside what was measured.

    Args:
        parts: of `PARTS`.
        dry_run: on the CPU, with tiny shapes.
        rival_python: see `default_rival`.
        budget_s: seconds for everything; None for `BUDGET_S` or `DRY_RUN_S`.
        console: for progress and tables.
        save: called after each part with what there is so far.
        sizes: see `Suite`.

    Raises:
        UserError: there is no GPU, or JAX does not see it, or `rival_python` is no such Python.
    """
    end = time.monotonic() + (budget_s or (DRY_RUN_S if dry_run else BUDGET_S))
    gpu = None if dry_run else bench_gpu_machine.require_gpu()
    rival = default_rival(rival_python)
    if rival is None:
        console.print("no torch and bitsandbytes in this Python, and no --rival_python: ours alone")
    suite = Suite(dry_run=dry_run, rival_python=rival, console=console, sizes=sizes)
    suite.look()
    result: dict[str, Any] = {"dry_run": dry_run, "gpu": gpu, "facts": suite.facts}
    result["versions"] = versions()
    for index, part in enumerate(parts):
        now = time.monotonic()
        share = _WEIGHTS[part] / sum(_WEIGHTS[other] for other in parts[index:])
        console.print(f"[bold]{part}[/] (at most {(end - now) * share:.0f} s)")
        suite.deadline = now + (end - now) * share
        result[part] = getattr(suite, part)()
        save(result)
    result["goals"] = report.goals(result)
    report.print_goals(result["goals"], console, dry_run=dry_run)
    save(result)
    return result
