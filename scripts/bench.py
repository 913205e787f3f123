"""Measures this project against transformers + peft + bitsandbytes, on this machine, in one run.

    python scripts/bench.py --suite=cpu
    python scripts/bench.py --suite=cpu --part=dequantize --rival_python=/path/to/python
    python scripts/bench.py --suite=cpu --part=loading --gigabytes=26 --scratch=/somewhere/large
    python scripts/bench.py --suite=cpu --part=data --records=1000000
    python scripts/bench.py --suite=gpu
    python scripts/bench.py --suite=gpu --part=check --part=kernels --budget_s=540
    python scripts/bench.py --suite=gpu --part=tune --write_tuning
    python scripts/bench.py --suite=gpu --dry-run

The suites are in files of their own, which say what they measure: scripts/bench_cpu.py and
scripts/bench_gpu.py.

The rival's environment is made once in benchmarks/.venv-rival (it needs python3.11; with a GPU
build of torch it takes gigabytes). The suite `gpu` makes none: it takes this Python if torch and
bitsandbytes are in it, or else --rival_python, and has no rival otherwise; it never uses the
network. Every sample goes to benchmarks/results/, a file for each run; those of a dry run, which
mean nothing, to benchmarks/.cache/.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys

import bench_cpu
import bench_gpu
import bench_gpu_tune
from absl import flags
from bench_workers import ROOT
from rich.console import Console

from qlora_jax import command_line
from qlora_jax.errors import UserError

PARTS = {"cpu": bench_cpu.PARTS, "gpu": bench_gpu.PARTS}
DEFAULT_PARTS = {"cpu": bench_cpu.PARTS, "gpu": bench_gpu.DEFAULT_PARTS}


def chosen_parts(suite: str, wanted: list[str] | None) -> list[str]:
    """The parts of a suite that are to run, in the suite's order.

    Raises:
        UserError: the suite has no such part.
    """
    unknown = sorted(set(wanted or ()) - set(PARTS[suite]))
    if unknown:
        raise UserError(
            f"--part={unknown[0]}: the suite {suite} has the parts {', '.join(PARTS[suite])}"
        )
    return [part for part in PARTS[suite] if part in (wanted or DEFAULT_PARTS[suite])]


def run_cpu(console: Console, parts: list[str]) -> None:
    """The suite `cpu` with this command line's flags."""
    if _DRY_RUN.value:
        raise UserError("--dry_run: the suite cpu has none")
    result = bench_cpu.run(
        parts=parts,
        cores=_CORES.value,
        rounds=_ROUNDS.value,
        steps=_STEPS.value,
        rival_python=_RIVAL_PYTHON.value,
        our_flags=[
            f"--compute_dtype={_COMPUTE_DTYPE.value}",
            f"--remat={_REMAT.value}",
            f"--loss_chunk={_LOSS_CHUNK.value}",
        ],
        gigabytes=_GIGABYTES.value,
        scratch=pathlib.Path(_SCRATCH.value),
        records=_RECORDS.value,
        console=console,
    )
    path = result_path("cpu", dry_run=False)
    path.write_text(json.dumps(result) + "\n")
    print(f"written: {path}")


def run_gpu(console: Console, parts: list[str]) -> None:
    """The suite `gpu` with this command line's flags; its file is complete after every part."""
    path = result_path("gpu", dry_run=_DRY_RUN.value)
    result = bench_gpu.run(
        parts=parts,
        dry_run=_DRY_RUN.value,
        rival_python=_RIVAL_PYTHON.value,
        budget_s=_BUDGET_S.value,
        console=console,
        save=lambda result: path.write_text(json.dumps(result) + "\n"),
    )
    print(f"written: {path}")
    if "tune" in result and _WRITE_TUNING.value and not _DRY_RUN.value:
        for written in bench_gpu_tune.write(result["tune"]):
            print(f"written: {written}")


SUITES = {"cpu": run_cpu, "gpu": run_gpu}


def result_path(suite: str, *, dry_run: bool) -> pathlib.Path:
    """Where a run that starts now puts its samples; the folder is made."""
    folder = ROOT / "benchmarks" / (".cache" if dry_run else "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{suite}_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"


def main() -> None:
    """Runs a suite and writes its samples."""
    # Where the output goes to a file, tables need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 200)
    SUITES[_SUITE.value](console, chosen_parts(_SUITE.value, _PART.value))


if __name__ == "__main__":
    every_part = sorted({part for parts in PARTS.values() for part in parts})
    _SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "what to measure", required=True)
    _PART = flags.DEFINE_multi_enum("part", None, every_part, "only this part")
    _ROUNDS = flags.DEFINE_integer("rounds", 2, "runs of every setting of the rival", 1)
    _STEPS = flags.DEFINE_integer("steps", 5, "optimizer steps a run; the first is not timed", 2)
    _CORES = flags.DEFINE_integer("cores", 2, "processor cores to use", 1)
    _COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", "auto", "ours: model.compute_dtype")
    _REMAT = flags.DEFINE_string("remat", "auto", "ours: config.model.remat")
    _LOSS_CHUNK = flags.DEFINE_integer("loss_chunk", 256, "ours: config.train.loss_chunk", 1)
    _GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "part loading: size of the checkpoint", 0.0)
    _SCRATCH = flags.DEFINE_string(
        "scratch", str(bench_cpu.CACHE), "parts loading and data: where to make their files"
    )
    _RECORDS = flags.DEFINE_integer("records", 20_000, "part data: how many", 1000)
    _RIVAL_PYTHON = flags.DEFINE_string("rival_python", None, "a Python with the rival's packages")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "suite gpu: tiny shapes, on the CPU")
    _BUDGET_S = flags.DEFINE_integer("budget_s", None, "suite gpu: seconds for all parts", 1)
    _WRITE_TUNING = flags.DEFINE_bool("write_tuning", False, "suite gpu: keep what tune found")
    for name in ("rival_python", "dry_run", "budget_s", "write_tuning"):
        flags.DEFINE_alias(name.replace("_", "-"), name)
    command_line.run(main)
