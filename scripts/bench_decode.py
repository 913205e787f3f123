"""The part `decode` of scripts/bench.py: tokens a second of SmolLM2-135M, at batch 1 and 8.

A prompt is 32 tokens of real text and a reply 32 more, chosen greedily; a second of `tokens/s` has
everything in it, from the request to the last token. Ours are NF4 weights; on a CPU with memory for
it the engine keeps a dense copy of them, and the table says so. The rival is measured with NF4
weights (bitsandbytes' kernels) and with plain bfloat16 ones. Every run is a process of its own, in
turns, on the same cores and with the same tokens; the first repeats of a process do not count.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
from typing import Any

import bench_ours
import numpy as np
from bench_workers import ROOT, run_lines
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

BATCHES = (1, 8)
PROMPT, NEW = 32, 32
REPEATS = 8
# The first compiles; the second, a program for prompts that begin in an emptied cache.
WARM_UP = 2
OURS = "qlora_jax NF4"
RIVAL_SETTINGS = {
    "transformers + bitsandbytes NF4": ["--dtype=bfloat16", "--nf4"],
    "transformers bfloat16": ["--dtype=bfloat16"],
}

Samples = dict[str, list[dict[str, Any]]]


def prompts(batch: int) -> Int[np.ndarray, "R B T"]:
    """Token ids of real text; no two prompts begin alike."""
    rows = bench_ours.real_tokens(8).reshape(-1)
    starts, seen = [], set()
    for start in range(0, len(rows) - PROMPT, PROMPT):
        if rows[start] not in seen:
            seen.add(rows[start])
            starts.append(start)
    picked = np.resize(np.array(starts), (REPEATS + WARM_UP) * batch)
    if len(starts) < len(picked):
        raise RuntimeError(f"only {len(starts)} prompts begin differently")
    return np.stack([rows[s : s + PROMPT] for s in picked]).reshape(-1, batch, PROMPT)


def bench(python: pathlib.Path, *, model: pathlib.Path, rounds: int, console: Console) -> Samples:
    """What the workers reported of every repeat, by setting."""
    samples: Samples = {name: [] for name in (OURS, *RIVAL_SETTINGS)}
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / f"prompts_{batch}.npy" for batch in BATCHES]
        for file, batch in zip(files, BATCHES, strict=True):
            np.save(file, prompts(batch))
        work = [*(f"--prompts={file}" for file in files), f"--new_tokens={NEW}"]
        commands = {OURS: [sys.executable, ROOT / "scripts/bench_decode_ours.py", *work]}
        for name, setting in RIVAL_SETTINGS.items():
            rival = [python, ROOT / "scripts/bench_rival.py", "decode", f"--model={model}"]
            commands[name] = [*rival, *work, *setting]
        for run in range(rounds):
            for name, command in commands.items():
                lines = [{"round": run, **line} for line in run_lines(command)]
                samples[name] += lines
                speeds = [f"batch {b}: {speed(lines, b)['tokens_per_second']:.1f}" for b in BATCHES]
                console.print(f"round {run + 1}/{rounds}  {name}: {', '.join(speeds)} tokens/s")
    return samples


def speed(lines: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """Medians of the repeats of a batch size that count."""
    timed = [line for line in lines if line["batch"] == batch and line["repeat"] >= WARM_UP]
    seconds = statistics.median(line["seconds"] for line in timed)
    return {
        "tokens_per_second": batch * NEW / seconds,
        "best_tokens_per_second": batch * NEW / min(line["seconds"] for line in timed),
        "first_token_seconds": statistics.median(line["first"] for line in timed),
        "cpu_seconds": statistics.median(line["cpu_seconds"] for line in timed),
        "repeats": len(timed),
    }


def summarize(samples: Samples) -> dict[str, Any]:
    """Of every setting and batch size the speed; and ours over each of the rival's."""
    rows = {
        name: {
            "setting": lines[0].get("setting", ""),
            "peak_rss": max(line["peak_rss"] for line in lines),
            "batches": {str(batch): speed(lines, batch) for batch in BATCHES},
        }
        for name, lines in samples.items()
    }

    def ratio(name: str, batch: str) -> float:
        ours, theirs = rows[OURS]["batches"][batch], rows[name]["batches"][batch]
        return ours["tokens_per_second"] / theirs["tokens_per_second"]

    ratios = {
        name: {str(batch): ratio(name, str(batch)) for batch in BATCHES} for name in RIVAL_SETTINGS
    }
    return {"settings": rows, "ratios": ratios}


def print_table(summary: dict[str, Any], console: Console) -> None:
    """The table of the part `decode`, and the ratios."""
    title = f"decode SmolLM2-135M: {PROMPT} + {NEW} tokens, median tokens/s (best)"
    table = Table(title=title)
    table.add_column("setting")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
        table.add_column("first token, ms", justify="right")
        table.add_column("CPU s", justify="right")
    table.add_column("peak memory, GB", justify="right")
    for name, row in summary["settings"].items():
        cells = []
        for found in row["batches"].values():
            best = found["best_tokens_per_second"]
            cells.append(f"{found['tokens_per_second']:.1f} ({best:.1f})")
            cells.append(f"{found['first_token_seconds'] * 1e3:.0f}")
            cells.append(f"{found['cpu_seconds']:.2f}")
        label = f"{name} ({row['setting']})" if row["setting"] else name
        table.add_row(label, *cells, f"{row['peak_rss'] / 1e9:.2f}")
    console.print(table)
    for name, found in summary["ratios"].items():
        ratios = [f"{ratio:.2f}x at batch {batch}" for batch, ratio in found.items()]
        console.print(f"ours over {name}: {', '.join(ratios)}")
