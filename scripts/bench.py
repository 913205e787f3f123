"""Measures this project against transformers + peft + bitsandbytes, on this machine, in one run.

    python scripts/bench.py --suite=cpu
    python scripts/bench.py --suite=cpu --part=dequantize --rival_python=/path/to/python

The suite `cpu` has two parts. `dequantize`: 4-bit weights to dense ones, against bitsandbytes, in
turns. `train`: SmolLM2-135M, batch 4 x 256 tokens of real text, rank 64 on every linear layer, full
optimizer steps; each run is a process of its own, ours and the rival's in turns, all on the same
cores. The rival is measured in three settings and compared in its fastest.

The rival's environment is made once in benchmarks/.venv-rival (it needs python3.11; with a GPU
build of torch it takes gigabytes). Every sample goes to benchmarks/results/, a file for each run.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import bench_ours
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from pallas_kernels.dequantize_4bit import bench as dequantize_bench
from qlora_jax import command_line
from qlora_jax.errors import UserError
from qlora_jax.files import resolve_path
from qlora_jax.quantized import dequantize, quantize
from qlora_jax.training.card import versions

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / "benchmarks" / ".cache"
RIVAL_VENV = ROOT / "benchmarks" / ".venv-rival"
RIVAL_PACKAGES = (
    "torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 "
    "gguf==0.19.0"
).split()
RIVAL_SETTINGS = {
    "bfloat16": ["--dtype=bfloat16"],
    "float32": ["--dtype=float32"],
    "bfloat16, checkpointing": ["--dtype=bfloat16", "--checkpointing"],
}
OURS = "qlora_jax"
TOKENS_A_STEP = bench_ours.BATCH_SIZE * bench_ours.SEQ_LEN

Samples = dict[str, list[dict[str, Any]]]
Calls = dict[str, dict[str, list[float]]]
# Of every turn: the pause before it, the calls that only wake the worker threads, those that count.
_PAUSE_S = 0.3
_WARM_UP = 100
_CALLS = 100


def find_rival(python: str | None) -> pathlib.Path:
    """The rival's Python; without one given, of an environment that is made here once.

    Raises:
        UserError: the Python does not exist or lacks a package, or the environment cannot be made.
    """
    if python is None:
        return _rival_venv()
    path = resolve_path(python)
    check = subprocess.run(
        [path, "-c", "import torch, transformers, peft, bitsandbytes, accelerate, gguf"],
        capture_output=True,
        text=True,
    )
    if check.returncode:
        raise UserError(
            f"--rival_python={python} cannot run the rival: {_last_line(check.stderr)}; "
            f"install there: {' '.join(RIVAL_PACKAGES)}"
        )
    return path


def _rival_venv() -> pathlib.Path:
    python, stamp = RIVAL_VENV / "bin" / "python", RIVAL_VENV / "installed"
    wanted = "\n".join(RIVAL_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the rival's environment in {RIVAL_VENV} (once) …", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", *RIVAL_PACKAGES]
    for command in (["python3.11", "-m", "venv", "--clear", RIVAL_VENV], pip):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"the rival's environment cannot be made: {error}; it needs python3.11 and "
                "packages from PyPI, or --rival_python=PATH with them installed"
            ) from None
    stamp.write_text(wanted)
    return python


def rival_model(python: pathlib.Path) -> pathlib.Path:
    """The benchmark's model as a Hugging Face folder, made once from the GGUF file."""
    folder = CACHE / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        gguf = resolve_path(bench_ours.MODEL)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in run_lines(
            [python, ROOT / "scripts/bench_rival.py", "prepare", f"--gguf={gguf}"]
            + [f"--model={folder}"]
        ):
            pass
    return folder


def run_lines(command: list[Any]) -> Iterator[dict[str, Any]]:
    """Runs a worker and yields its lines of JSON as they come.

    Raises:
        UserError: it ended with an error; the message holds the last line of what it said.
    """
    with tempfile.TemporaryFile("w+") as log:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | quiet,
        )
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        except BaseException:  # also Ctrl-C, and a reader that stops early
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            log.seek(0)
            name = pathlib.Path(command[1]).name
            raise UserError(f"{name} ended with code {code}: {_last_line(log.read())}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def dequantize_call(shape: tuple[int, int], dtype: str) -> Callable[[], jax.Array]:
    """What a user writes to get a dense array, for a normal random NF4 weight."""
    weight = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
    return functools.partial(dequantize, quantize(weight), jnp.dtype(dtype))


def bench_dequantize(python: pathlib.Path, *, turns: int = 5) -> Calls:
    """Seconds of every call by "shape dtype", ours and bitsandbytes' in turns of a few calls."""
    rival = subprocess.Popen(
        [python, ROOT / "scripts/bench_rival.py", "dequantize"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def ask(shape: tuple[int, int], dtype: str, *, repeats: int) -> list[float]:
        request = {"shape": shape, "dtype": dtype, "repeats": repeats}
        print(json.dumps(request), file=rival.stdin, flush=True)
        answer = rival.stdout.readline()
        if not answer:
            raise UserError("bench_rival.py dequantize ended early; run it by hand to see why")
        return json.loads(answer)["seconds"]

    results: Calls = {}
    with rival:
        for shape in dequantize_bench.SHAPES:
            for dtype in dequantize_bench.DTYPES:
                call = dequantize_call(shape, dtype)
                sides = {
                    "ours": functools.partial(dequantize_bench.time_calls, call),
                    "bitsandbytes": functools.partial(ask, shape, dtype),
                }
                seconds = {who: [] for who in sides}
                for _ in range(turns):
                    for who, measure in sides.items():
                        # Worker threads spin for a while after a call; the other's must not take
                        # a core from this one's.
                        time.sleep(_PAUSE_S)
                        seconds[who] += measure(repeats=_WARM_UP + _CALLS)[_WARM_UP:]
                results[f"{shape[0]}x{shape[1]} {dtype}"] = seconds
        rival.stdin.close()
    return results


def bench_train(
    python: pathlib.Path, *, rounds: int, steps: int, our_flags: list[str], console: Console
) -> Samples:
    """What the workers reported of every step, by setting; the first step of each run left out.

    Every run of the rival has a run of ours before it. The loss of the first step, before any
    update, is the same number for all, up to rounding: it shows that they do the same work.
    """
    model = rival_model(python)
    samples: Samples = {name: [] for name in (OURS, *RIVAL_SETTINGS)}
    with tempfile.TemporaryDirectory() as folder:
        tokens = pathlib.Path(folder) / "tokens.npy"
        np.save(tokens, bench_ours.real_tokens(steps))
        work = [f"--tokens={tokens}", f"--steps={steps}"]
        ours = [sys.executable, ROOT / "scripts/bench_ours.py", *work, *our_flags]
        theirs = [python, ROOT / "scripts/bench_rival.py", "train", f"--model={model}", *work]
        for run in range(rounds):
            for name, setting in RIVAL_SETTINGS.items():
                for who, command in ((OURS, ours), (name, theirs + setting)):
                    reports = [{"round": run, **line} for line in run_lines(command)]
                    samples[who] += reports
                    speed = TOKENS_A_STEP / statistics.median(r["seconds"] for r in reports[1:])
                    console.print(f"round {run + 1}/{rounds}  {who}: {speed:.0f} tokens/s")
    return samples


def summarize_dequantize(samples: Calls) -> list[dict[str, Any]]:
    """Median and minimum of each case in milliseconds, and ours over bitsandbytes'."""
    rows = []
    for case, seconds in samples.items():
        row: dict[str, Any] = {"case": case, "calls": len(seconds["ours"])}
        for who in ("ours", "bitsandbytes"):
            calls = [one * 1e3 for one in seconds[who]]
            row |= {f"{who}_median_ms": statistics.median(calls), f"{who}_min_ms": min(calls)}
        row["ratio_of_medians"] = row["ours_median_ms"] / row["bitsandbytes_median_ms"]
        row["ratio_of_minima"] = row["ours_min_ms"] / row["bitsandbytes_min_ms"]
        rows.append(row)
    return rows


def summarize_train(samples: Samples) -> dict[str, Any]:
    """Of each setting tokens/s (median step), peak bytes and first loss; ours against the fastest.

    The first step of a process, which compiles or warms up, does not count.
    """
    rows = {}
    for name, reports in samples.items():
        timed = [report for report in reports if report["step"] > 0]
        rows[name] = {
            "tokens_per_second": TOKENS_A_STEP / statistics.median(r["seconds"] for r in timed),
            "cpu_seconds_a_step": statistics.median(r["cpu_seconds"] for r in timed),
            "peak_rss": max(r["peak_rss"] for r in reports),
            "first_loss": reports[0]["loss"],
            "steps": len(timed),
        }
    fastest = max(RIVAL_SETTINGS, key=lambda name: rows[name]["tokens_per_second"])
    ours, rival = rows[OURS], rows[fastest]
    return {
        "settings": rows,
        "fastest_rival": fastest,
        "speed_ratio": ours["tokens_per_second"] / rival["tokens_per_second"],
        "memory_ratio": ours["peak_rss"] / rival["peak_rss"],
    }


def print_dequantize(rows: list[dict[str, Any]], console: Console) -> None:
    """The table of the part `dequantize`."""
    table = Table(title="dequantize NF4 with double quantization, ms: median (minimum)")
    for column in ("case", "ours", "bitsandbytes", "ratio of medians", "of minima"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        times = [
            f"{row[f'{who}_median_ms']:.3f} ({row[f'{who}_min_ms']:.3f})"
            for who in ("ours", "bitsandbytes")
        ]
        ratios = (f"{row['ratio_of_medians']:.2f}", f"{row['ratio_of_minima']:.2f}")
        table.add_row(row["case"], *times, *ratios)
    console.print(table)


def print_train(summary: dict[str, Any], console: Console) -> None:
    """The table of the part `train`, and the two ratios."""
    table = Table(title="train SmolLM2-135M, 4 x 256 tokens, rank 64 on all linears")
    for column in ("setting", "tokens/s", "CPU s/step", "peak memory, GB", "first loss", "steps"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, row in summary["settings"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{row['cpu_seconds_a_step']:.1f}",
            f"{row['peak_rss'] / 1e9:.2f}",
            f"{row['first_loss']:.4f}",
            str(row["steps"]),
        )
    console.print(table)
    console.print(
        f"against the rival's fastest setting ({summary['fastest_rival']}): "
        f"{summary['speed_ratio']:.2f}x its tokens/s with {summary['memory_ratio']:.2f}x its memory"
    )


def machine(python: pathlib.Path, cores: list[int]) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, load and versions."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    (rival,) = run_lines([python, ROOT / "scripts/bench_rival.py", "versions"])
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": cores,
        "load_before": os.getloadavg(),
        "versions": versions(),
        "rival_versions": rival,
    }


def run_cpu(console: Console) -> dict[str, Any]:
    """The suite `cpu`: its samples and their summary."""
    available = sorted(os.sched_getaffinity(0))
    if _CORES.value > len(available):
        raise UserError(f"--cores={_CORES.value}: this process may use only {len(available)}")
    # Every process that is started inherits this.
    os.sched_setaffinity(0, available[: _CORES.value])
    python = find_rival(_RIVAL_PYTHON.value)
    result: dict[str, Any] = {"machine": machine(python, available[: _CORES.value])}
    parts = _PART.value or ["dequantize", "train"]
    if "dequantize" in parts:
        samples = bench_dequantize(python)
        rows = summarize_dequantize(samples)
        print_dequantize(rows, console)
        result["dequantize"] = {"summary": rows, "samples": samples}
    if "train" in parts:
        our_flags = [
            f"--compute_dtype={_COMPUTE_DTYPE.value}",
            f"--remat={_REMAT.value}",
            f"--loss_chunk={_LOSS_CHUNK.value}",
        ]
        samples = bench_train(
            python, rounds=_ROUNDS.value, steps=_STEPS.value, our_flags=our_flags, console=console
        )
        summary = summarize_train(samples)
        print_train(summary, console)
        result["train"] = {"our_flags": our_flags, "summary": summary, "samples": samples}
    return result


SUITES = {"cpu": run_cpu}


def main() -> None:
    """Runs a suite and writes its samples."""
    result = SUITES[_SUITE.value](Console())
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_SUITE.value}_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    path.write_text(json.dumps(result) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    _SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "what to measure", required=True)
    _PART = flags.DEFINE_multi_enum("part", None, ["dequantize", "train"], "only this part")
    _ROUNDS = flags.DEFINE_integer("rounds", 2, "runs of every setting of the rival", 1)
    _STEPS = flags.DEFINE_integer("steps", 5, "optimizer steps a run; the first is not timed", 2)
    _CORES = flags.DEFINE_integer("cores", 2, "processor cores to use", 1)
    _COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", "auto", "ours: model.compute_dtype")
    _REMAT = flags.DEFINE_string("remat", "auto", "ours: config.model.remat")
    _LOSS_CHUNK = flags.DEFINE_integer("loss_chunk", 256, "ours: config.train.loss_chunk", 1)
    _RIVAL_PYTHON = flags.DEFINE_string("rival_python", None, "a Python with the rival's packages")
    flags.DEFINE_alias("rival-python", "rival_python")
    command_line.run(main)
