"""The part `serve` of the suite `cpu`: many clients at once against one, and the memory meanwhile.

A server (scripts/serve.py) with a tiny random model, so that what is measured is the server and the
batching, not the multiplications; replies have 128 tokens. First one client asks again and again,
then 32 do, half of them with streams, each waiting for its reply before it asks again. Counted are
the tokens that replies say they have. The server's own memory is read twice a second.

    python scripts/bench.py --suite=cpu --part=serve
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
from bench_workers import ROOT
from rich.console import Console

from qlora_jax.errors import UserError

sys.path.append(str(ROOT / "tests"))
from tiny_run import write_model  # noqa: E402

CLIENTS = 32
SLOTS = 32
NEW_TOKENS = 128
# Of stories260K: the smallest Llama that was trained to write sentences.
SHAPE = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_QUESTION = "what is the sum of one and two"
_START_S = 300


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[tuple[psutil.Process, int]]:
    """A server with a tiny model; gives its process and its port."""
    model = write_model(folder / "model", **SHAPE)
    command = [sys.executable, ROOT / "scripts/serve.py", f"--model={model}", "--port=0"]
    command += [f"--slots={SLOTS}", "--waiting=64", f"--votes={folder}/votes.jsonl"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True
    )
    try:
        for line in process.stdout:
            if found := re.search(r"page +http://127\.0\.0\.1:(\d+)", line):
                yield psutil.Process(process.pid), int(found[1])
                break
        else:
            raise UserError(f"the server did not start: {(folder / 'log').read_text()}")
    finally:
        process.terminate()
        process.wait(_START_S)


async def ask(port: int, *, stream: bool) -> tuple[int, int]:
    """One request on a connection of its own.

    Returns:
        The status, and the tokens of the reply.
    """
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": _QUESTION}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    answer = (await reader.read()).decode()
    writer.close()
    tokens = re.search(r'"completion_tokens":(\d+)', answer)
    complete = not stream or "[DONE]" in answer
    status = int(answer.split(" ", 2)[1]) if answer else 0
    return status if complete and tokens else 0, int(tokens[1]) if tokens else 0


async def load(port: int, process: psutil.Process, *, clients: int, seconds: float) -> dict:
    """What so many clients got in so many seconds; requests under way at the end are awaited."""
    started = time.monotonic()
    replies: list[tuple[float, int, int]] = []
    memory: list[int] = []

    async def client(number: int) -> None:
        while time.monotonic() - started < seconds:
            begun = time.monotonic()
            status, tokens = await ask(port, stream=number % 2 == 0)
            replies.append((time.monotonic() - begun, status, tokens))

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(clients)))
    took_s = time.monotonic() - started
    watching.cancel()
    return {
        "clients": clients,
        "seconds": took_s,
        "requests": len(replies),
        "errors": sum(status != 200 for _, status, _ in replies),
        "tokens": sum(tokens for *_, tokens in replies),
        "reply_seconds": [took for took, *_ in replies],
        "rss": memory,
    }


def bench(*, seconds: float, console: Console) -> dict[str, dict[str, Any]]:
    """Samples of one client (for a third of the time) and of all of them."""
    with tempfile.TemporaryDirectory() as folder, serving(pathlib.Path(folder)) as (process, port):
        # The programs of every length are compiled before anything counts.
        asyncio.run(load(port, process, clients=CLIENTS, seconds=seconds / 6))
        samples = {}
        for clients, share in ((1, seconds / 3), (CLIENTS, seconds)):
            samples[str(clients)] = asyncio.run(load(port, process, clients=clients, seconds=share))
            console.print(f"{clients} clients: {samples[str(clients)]['requests']} replies")
    return samples


def summarize(samples: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of each load, the ratio, and how memory grew under the last one.

    Memory is compared between the second sixth of the time and the last: medians, so that one
    reply's buffers do not count.
    """
    rows = {
        name: {
            "tokens_per_second": sample["tokens"] / sample["seconds"],
            "median_reply_s": statistics.median(sample["reply_seconds"]),
            "requests": sample["requests"],
            "errors": sample["errors"],
        }
        for name, sample in samples.items()
    }
    one, many = rows.values()
    memory = list(samples.values())[-1]["rss"]
    sixth = max(1, len(memory) // 6)
    early, late = memory[sixth : 2 * sixth] or memory, memory[-sixth:]
    return {
        "loads": rows,
        "throughput_ratio": many["tokens_per_second"] / one["tokens_per_second"],
        "rss_early": statistics.median(early),
        "rss_late": statistics.median(late),
        "rss_growth": statistics.median(late) / statistics.median(early) - 1,
    }


def print_table(summary: dict[str, Any], console: Console) -> None:
    """A line for each load, then the ratio and the memory."""
    for name, row in summary["loads"].items():
        console.print(
            f"serve, clients: {name:>3}  {row['tokens_per_second']:8.0f} tokens/s  "
            f"{row['median_reply_s']:.3f} s a reply  {row['requests']} replies, "
            f"{row['errors']} errors"
        )
    console.print(
        f"  {summary['throughput_ratio']:.1f}x the tokens/s of one client; memory "
        f"{summary['rss_early'] / 1e6:.0f} MB early, {summary['rss_late'] / 1e6:.0f} MB late "
        f"({summary['rss_growth']:+.1%})"
    )
