"""Measures this project against transformers + peft + bitsandbytes, on this machine, in one run.

    python scripts/bench.py --suite=cpu
    python scripts/bench.py --suite=cpu --part=dequantize --rival_python=/path/to/python

The suites are in files of their own, which say what they measure: scripts/bench_cpu.py.

The rival's environment is made once in benchmarks/.venv-rival (it needs python3.11; with a GPU
build of torch it takes gigabytes). Every sample goes to benchmarks/results/, a file for each run.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import bench_cpu
from absl import flags
from bench_workers import ROOT
from rich.console import Console

from qlora_jax import command_line
from qlora_jax.errors import UserError

PARTS = {"cpu": bench_cpu.PARTS}


def chosen_parts(suite: str, wanted: list[str] | None) -> list[str]:
    """The parts of a suite that are to run; all of them where none is named.

    Raises:
        UserError: the suite has no such part.
    """
    unknown = sorted(set(wanted or ()) - set(PARTS[suite]))
    if unknown:
        raise UserError(
            f"--part={unknown[0]}: the suite {suite} has the parts {', '.join(PARTS[suite])}"
        )
    return list(wanted or PARTS[suite])


def run_cpu(console: Console, parts: list[str]) -> dict[str, Any]:
    """The suite `cpu` with this command line's flags."""
    return bench_cpu.run(
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
        console=console,
    )


SUITES = {"cpu": run_cpu}


def main() -> None:
    """Runs a suite and writes its samples."""
    result = SUITES[_SUITE.value](Console(), chosen_parts(_SUITE.value, _PART.value))
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_SUITE.value}_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    path.write_text(json.dumps(result) + "\n")
    print(f"written: {path}")


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
    _RIVAL_PYTHON = flags.DEFINE_string("rival_python", None, "a Python with the rival's packages")
    flags.DEFINE_alias("rival-python", "rival_python")
    command_line.run(main)
