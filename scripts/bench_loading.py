"""The part `loading` of the suite `cpu`: a checkpoint in 16 bits, quantized on one core.

A synthetic LLaMA-13B (layers of 5120 and 13824; as many as make the size that was asked for, 40 at
26 GB) in sharded bfloat16 safetensors. Each in a process of its own on the same single core:

    load       `load_model`: read, check for NaN, quantize, put into the stacked arrays
    write      `quantize_checkpoint`: the same, written to a folder
    map        `load_model` of that folder
    rival      safetensors and bitsandbytes' quantize_4bit on the linear layers of the first layers

A process's own memory (`private`) is RssAnon, sampled every 5 ms; pages of mapped files, which the
kernel can drop, are not in it. `peak_rss` is the high-water mark of both together. MB/s are bytes
of the 16-bit tensors; per CPU second they hold on a busy machine, too.

    python scripts/bench_loading.py load FOLDER        what a worker runs; a line of JSON
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from bench_workers import ROOT, run_lines
from rich.console import Console
from rich.table import Table

from qlora_jax.loading import load_model
from qlora_jax.metrics import host_memory
from qlora_jax.packed_checkpoint import quantize_checkpoint

sys.path.append(str(ROOT / "tests"))
from synthetic_checkpoint import hf_shapes, write_checkpoint  # noqa: E402

RIVAL_LAYERS = 2
_SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SHARD_BYTES = 5_000_000_000


def config_of_size(gigabytes: float) -> dict[str, Any]:
    """LLaMA-13B with the number of layers that comes nearest to a size in bfloat16, at least one.

    >>> config_of_size(26)["num_hidden_layers"]
    40
    """

    def nbytes(layers: int) -> int:
        shapes = hf_shapes(_SHAPE | {"num_hidden_layers": layers})
        return 2 * sum(rows * (columns or [1])[0] for rows, *columns in shapes.values())

    layer = nbytes(1) - nbytes(0)
    return _SHAPE | {"num_hidden_layers": max(1, round((gigabytes * 1e9 - nbytes(0)) / layer))}


def bench(
    python: pathlib.Path, *, gigabytes: float, scratch: pathlib.Path, core: int, console: Console
) -> dict[str, Any]:
    """What each process reported; the checkpoints are made in `scratch` and removed.

    Args:
        python: the rival's.
        gigabytes: size of the checkpoint; a third more is needed on the disk.
        scratch: a folder, made if it is not there.
        core: which all run on.
        console: for progress.
    """
    config = config_of_size(gigabytes)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model, packed = pathlib.Path(folder) / "model", pathlib.Path(folder) / "packed"
        model.mkdir()
        console.print(f"making {config['num_hidden_layers']} layers in {model} …")
        total = write_checkpoint(model, config, _SHARD_BYTES)
        ours = [sys.executable, pathlib.Path(__file__).resolve()]
        rival = [python, ROOT / "scripts/bench_rival.py", "quantize", f"--model={model}"]
        commands = {
            "rival": [*rival, f"--layers={RIVAL_LAYERS}"],
            "load": [*ours, "load", model],
            "write": [*ours, "write", model, packed],
            "map": [*ours, "load", packed],
        }
        samples = {"bytes": total, "layers": config["num_hidden_layers"]}
        for name, command in commands.items():
            (samples[name],) = run_lines(["taskset", "-c", str(core), *command])
            console.print(f"{name}: {samples[name]['seconds']:.1f} s")
    return samples


def summarize(samples: dict[str, Any]) -> dict[str, Any]:
    """MB/s by the clock and by CPU seconds, and ours over bitsandbytes'."""
    rows: dict[str, Any] = {}
    for name in ("load", "write", "rival"):
        report = samples[name]
        megabytes = report.get("bytes", samples["bytes"]) / 1e6
        rows[name] = {
            "mb_per_second": megabytes / report["seconds"],
            "mb_per_cpu_second": megabytes / report["cpu_seconds"],
        }
    ratio = rows["load"]["mb_per_cpu_second"] / rows["rival"]["mb_per_cpu_second"]
    return {**rows, "load_over_rival_per_cpu_second": ratio}


def print_table(samples: dict[str, Any], summary: dict[str, Any], console: Console) -> None:
    """The table of the part `loading`."""
    size = f"{samples['bytes'] / 1e9:.1f} GB of bfloat16, {samples['layers']} layers, one core"
    table = Table(title=f"quantizing {size}")
    for column in ("", "s", "CPU s", "MB/s", "MB per CPU s", "private GB", "peak RSS GB"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("load", "write", "map", "rival"):
        report, row = samples[name], summary.get(name)
        speeds = [f"{value:.0f}" for value in row.values()] if row else ["", ""]
        memory = [report.get("private"), report["peak_rss"]]
        table.add_row(
            name,
            f"{report['seconds']:.1f}",
            f"{report['cpu_seconds']:.1f}",
            *speeds,
            *("" if one is None else f"{one / 1e9:.2f}" for one in memory),
        )
    console.print(table)
    ratio = summary["load_over_rival_per_cpu_second"]
    console.print(f"load against bitsandbytes, per CPU second: {ratio:.1f}x")


@contextlib.contextmanager
def private_peak() -> Iterator[list[int]]:
    """The largest RssAnon while it runs, in bytes, as the only element."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            status = pathlib.Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def main(job: str, *folders: str) -> None:
    """Does one job and prints what it took."""
    started, cpu_started = time.perf_counter(), time.process_time()
    with private_peak() as private:
        if job == "load":
            result = load_model(folders[0], dtype=jnp.bfloat16)
        else:
            result = quantize_checkpoint(*folders)
    report = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "private": private[0],
        "peak_rss": host_memory()[1],
    }
    del result  # alive until here
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
