"""The suite `cpu` of scripts/bench.py: decoding, training and loading on this processor.

`dequantize`: 4-bit weights to dense ones, against bitsandbytes, in turns. `train`: SmolLM2-135M,
batch 4 x 256 tokens of real text, rank 64 on every linear layer, full optimizer steps; each run is
a process of its own, ours and the rival's in turns, all on the same cores. The rival is measured in
three settings and compared in its fastest. `decode`, `loading`, `paging`, `data`, `serve` and
`mmlu`: see scripts/bench_decode.py, scripts/bench_loading.py, scripts/bench_paging.py,
scripts/bench_data.py, scripts/bench_serve.py and scripts/bench_mmlu.py.
"""

from __future__ import annotations

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
from collections.abc import Callable
from typing import Any

import bench_data
import bench_decode
import bench_loading
import bench_mmlu
import bench_ours
import bench_paging
import bench_serve
import jax
import jax.numpy as jnp
import numpy as np
from bench_workers import ROOT, find_rival, run_lines
from rich.console import Console
from rich.table import Table

from pallas_kernels.dequantize_4bit import bench as dequantize_bench
from qlora_jax.errors import UserError
from qlora_jax.files import resolve_path
from qlora_jax.quantized import dequantize, quantize
from qlora_jax.training.card import versions

CACHE = ROOT / "benchmarks" / ".cache"
PARTS = ("dequantize", "train", "decode", "loading", "paging", "data", "serve", "mmlu")
_WITH_RIVAL = {"dequantize", "train", "decode", "loading"}
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


def machine(python: pathlib.Path | None, cores: list[int]) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, load and versions."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    command = [python, ROOT / "scripts/bench_rival.py", "versions"]
    (rival,) = run_lines(command) if python else (None,)
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": cores,
        "load_before": os.getloadavg(),
        "versions": versions(),
        "rival_versions": rival,
    }


def run(
    *,
    parts: list[str],
    cores: int,
    rounds: int,
    steps: int,
    rival_python: str | None,
    our_flags: list[str],
    gigabytes: float,
    scratch: pathlib.Path,
    records: int,
    console: Console,
) -> dict[str, Any]:
    """The samples of the suite and their summary.

    Args:
        parts: of `PARTS`.
        cores: processor cores to use; every process that is started inherits them.
        rounds: runs of every setting of the rival.
        steps: optimizer steps a run.
        rival_python: see `find_rival`.
        our_flags: for scripts/bench_ours.py.
        gigabytes: of the checkpoint that is loaded.
        scratch: where it is made, and the data.
        records: of the data.
        console: for progress and tables.

    Raises:
        UserError: there are not so many cores, or see `find_rival`.
    """
    available = sorted(os.sched_getaffinity(0))
    if cores > len(available):
        raise UserError(f"--cores={cores}: this process may use only {len(available)}")
    os.sched_setaffinity(0, available[:cores])
    python = find_rival(rival_python) if _WITH_RIVAL & set(parts) else None
    result: dict[str, Any] = {"machine": machine(python, available[:cores])}
    if "dequantize" in parts:
        samples = bench_dequantize(python)
        rows = summarize_dequantize(samples)
        print_dequantize(rows, console)
        result["dequantize"] = {"summary": rows, "samples": samples}
    if "train" in parts:
        samples = bench_train(
            python, rounds=rounds, steps=steps, our_flags=our_flags, console=console
        )
        summary = summarize_train(samples)
        print_train(summary, console)
        result["train"] = {"our_flags": our_flags, "summary": summary, "samples": samples}
    if "decode" in parts:
        model = rival_model(python)
        samples = bench_decode.bench(python, model=model, rounds=rounds, console=console)
        summary = bench_decode.summarize(samples)
        bench_decode.print_table(summary, console)
        result["decode"] = {"summary": summary, "samples": samples}
    if "loading" in parts:
        samples = bench_loading.bench(
            python, gigabytes=gigabytes, scratch=scratch, core=available[0], console=console
        )
        summary = bench_loading.summarize(samples)
        bench_loading.print_table(samples, summary, console)
        result["loading"] = {"summary": summary, "samples": samples}
    if "paging" in parts:
        samples = bench_paging.bench(console)
        summary = bench_paging.summarize(samples)
        bench_paging.print_table(summary, console)
        result["paging"] = {"summary": summary, "samples": samples}
    if "data" in parts:
        samples = bench_data.bench(records=records, seconds=10, scratch=scratch)
        summary = bench_data.summarize(samples)
        bench_data.print_table(samples, summary, console)
        result["data"] = {"summary": summary, "samples": samples}
    if "serve" in parts:
        samples = bench_serve.bench(seconds=60, console=console)
        summary = bench_serve.summarize(samples)
        bench_serve.print_table(summary, console)
        result["serve"] = {"summary": summary, "samples": samples}
    if "mmlu" in parts:
        samples = bench_mmlu.bench(console)
        summary = bench_mmlu.summarize(samples)
        bench_mmlu.print_table(summary, console)
        result["mmlu"] = {"summary": summary, "samples": samples}
    return result
