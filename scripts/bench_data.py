"""How fast data reach the training step, for scripts/bench.py --suite=cpu --part=data.

Synthetic questions and answers in JSON Lines, written in SmolLM2's chat template and tokenized with
its tokenizer, from text to batches (rows of 512 tokens, packed, 16 a step). `first` and `second`
are two starts, each a process of its own: all that happens from the file to the first batch,
without and with a cache of tokens. `feed` takes batches from the cache for some seconds, with no
worker process, one and two. What a training step consumes is read from the newest committed results
of --part=train on the same kind of processor.

    python scripts/bench.py --suite=cpu --part=data
    python scripts/bench.py --suite=cpu --part=data --records=1000000 --scratch=/somewhere/large
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

import bench_ours
from bench_loading import private_peak
from bench_workers import ROOT, run_lines
from rich.console import Console
from rich.table import Table

from qlora_jax import config
from qlora_jax.data.batches import BatchIterator
from qlora_jax.data.records import load_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.files import resolve_path
from qlora_jax.metrics import host_memory
from qlora_jax.training.data import TrainingData, load_training_data
from qlora_jax.weights import open_checkpoint

WORKERS = (0, 1, 2)
NEEDED_RATIO, NEEDED_SPEED = 20, 200_000
_SEQ_LEN, _BATCH_SIZE, _GRAD_ACCUM = 512, 4, 4
_WARM_UP = 20


def write_records(path: pathlib.Path, count: int) -> None:
    """Questions and answers of 5 to 20 and 5 to 40 words of the packaged exam questions."""
    records = load_records(bench_ours.DATA, "mmlu_cot")
    words = [word for r in records for m in r.messages for word in m["content"].split()]
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (
                " ".join(rng.choices(words, k=rng.randint(5, most))) for most in (20, 40)
            )
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")


def bench(*, records: int, seconds: float, scratch: pathlib.Path) -> dict[str, Any]:
    """The reports of two starts and of feeding.

    Args:
        records: how many.
        seconds: how long to feed with each number of workers.
        scratch: a folder on a disk with 1 kB a record.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        data, cache = pathlib.Path(folder) / "data.jsonl", pathlib.Path(folder) / "tokens"
        write_records(data, records)
        job = [sys.executable, __file__]

        def ask(*arguments: Any) -> dict[str, Any]:
            (report,) = run_lines([*job, *arguments])
            return report

        samples: dict[str, Any] = {"bytes": data.stat().st_size}
        samples |= {name: ask("start", data, cache) for name in ("first", "second")}
        samples["cache_bytes"] = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
        samples["feed"] = [ask("feed", data, cache, workers, seconds) for workers in WORKERS]
        samples["consumed"] = consumed_speed()
        return samples


def consumed_speed() -> dict[str, Any] | None:
    """Tokens/s of the training step in the newest committed results on this kind of processor."""
    cpu = next(
        (line for line in pathlib.Path("/proc/cpuinfo").open() if "model name" in line), ""
    ).partition(":")[2]
    for path in sorted((ROOT / "benchmarks" / "results").glob("cpu_*.json"), reverse=True):
        result = json.loads(path.read_text())
        if "train" in result and result["machine"]["cpu"] == cpu.strip():
            ours = result["train"]["summary"]["settings"]["qlora_jax"]
            return {"file": path.name, "tokens_per_second": ours["tokens_per_second"]}
    return None


def summarize(samples: dict[str, Any]) -> dict[str, Any]:
    """What the starts took, what is fed in tokens/s, and how that compares with what is needed."""
    fed = {row["workers"]: row["tokens"] / row["seconds"] for row in samples["feed"]}
    used = samples["consumed"]
    first, second = (samples[name]["seconds"] for name in ("first", "second"))
    return {
        "tokenized_per_second": samples["first"]["tokens"] / samples["first"]["tokenize"],
        "first_over_second": first / second,
        "fed_per_second": fed,
        "fed_over_consumed": fed[0] / used["tokens_per_second"] if used else None,
        "peak_rss": max(samples[name]["peak_rss"] for name in ("first", "second")),
        "private": max(samples[name]["private"] for name in ("first", "second")),
    }


def print_table(samples: dict[str, Any], summary: dict[str, Any], console: Console) -> None:
    """The tables of the part `data`."""
    first = samples["first"]
    title = f"{first['examples']:,} examples, {first['tokens']:,} tokens, from file to first batch"
    table = Table(title=title)
    columns = ("tokenize", "pack", "batch", "checksum", "seconds", "cpu_seconds")
    titles = (*(f"{name}, s" for name in columns[:4]), "all, s", "CPU s")
    for column in ("start", *titles, "private GB", "peak RSS GB"):
        table.add_column(column, justify="left" if column == "start" else "right")
    for name in ("first", "second"):
        row = samples[name]
        memory = [f"{row[key] / 1e9:.2f}" for key in ("private", "peak_rss")]
        table.add_row(name, *(f"{row[column]:.2f}" for column in columns), *memory)
    console.print(table)
    table = Table(title=f"batches of {_GRAD_ACCUM} x {_BATCH_SIZE} x {_SEQ_LEN} from the cache")
    for column in ("worker processes", "tokens/s", f"of the needed {NEEDED_SPEED:,}"):
        table.add_column(column, justify="right")
    for workers, speed in summary["fed_per_second"].items():
        table.add_row(str(workers), f"{speed:,.0f}", f"{speed / NEEDED_SPEED:.1f}x")
    console.print(table)
    if samples["consumed"]:
        consumed = samples["consumed"]["tokens_per_second"]
        console.print(
            f"a training step on this processor consumes {consumed:.0f} tokens/s "
            f"({samples['consumed']['file']}): fed {summary['fed_over_consumed']:,.0f} times as "
            f"fast, {NEEDED_RATIO} times is needed"
        )


def load_tokenizer() -> Tokenizer:
    """SmolLM2's."""
    return Tokenizer.from_gguf(open_checkpoint(resolve_path(bench_ours.MODEL)).config)


def load(data: str, cache: str, tokenizer: Tokenizer) -> TrainingData:
    """The data of a run."""
    settings = config.get_config()
    settings.data.update({"path": data, "cache_dir": cache, "max_len": _SEQ_LEN})
    settings.data.eval_fraction = 0.01
    return load_training_data(settings, tokenizer, tokenizer.vocab_size)


def start(data: str, cache: str) -> dict[str, Any]:
    """What a run does with its data before the first step, and the seconds of each part."""
    tokenizer = load_tokenizer()
    times, cpu_started = [time.perf_counter()], time.process_time()
    found = load(data, cache, tokenizer)
    times.append(time.perf_counter())
    batches = BatchIterator(
        found.train, batch_size=_BATCH_SIZE, seq_len=_SEQ_LEN, grad_accum=_GRAD_ACCUM
    )
    times.append(time.perf_counter())
    next(batches)
    times.append(time.perf_counter())
    batches.state()
    times.append(time.perf_counter())
    names = ("tokenize", "pack", "batch", "checksum")
    parts = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
    parts |= {"seconds": times[-1] - times[0], "cpu_seconds": time.process_time() - cpu_started}
    facts = {"examples": len(found.train), "tokens": int(found.train.lengths.sum())}
    return {**facts, "cached": found.cached, **parts}


def feed(data: str, cache: str, workers: str, seconds: str) -> dict[str, Any]:
    """Tokens (without padding) of the batches that come in some seconds."""
    batches = BatchIterator(
        load(data, cache, load_tokenizer()).train,
        batch_size=_BATCH_SIZE,
        seq_len=_SEQ_LEN,
        grad_accum=_GRAD_ACCUM,
        workers=int(workers),
    )
    for _ in range(_WARM_UP):  # processes start, pages are read
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < float(seconds):
        count += int((next(batches).arrays["segment_ids"] > 0).sum())
    took = time.perf_counter() - began
    batches.close()
    return {"workers": int(workers), "tokens": count, "seconds": took}


def main(job: str, *arguments: str) -> None:
    """Does one job and prints its report."""
    with private_peak() as private:
        report = feed(*arguments) if job == "feed" else start(*arguments)
    memory = {"private": private[0], "peak_rss": host_memory()[1]}
    print(json.dumps(report | memory), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
