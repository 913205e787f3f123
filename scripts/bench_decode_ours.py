"""Our side of the decoding benchmark: SmolLM2-135M in NF4 through `qlora_jax.generation.Engine`.

    python scripts/bench_decode_ours.py --prompts=FILE.npy --new_tokens=32

The file holds token ids [repeats, batch, length]; the first repeat, which compiles, is reported
like the others and left out by who reads the report. A line of JSON a repeat:

    {"batch": 8, "repeat": 0, "seconds": 1.9, "cpu_seconds": 3.1, "first": 0.2, "peak_rss": 123,
     "setting": "bfloat16, dense copy beside the packed weights"}

`seconds` is from the first request to the last token, with reading the prompts; `first` until every
reply has its first token. No end token is known to the engine, so every reply has `new_tokens`.
"""

from __future__ import annotations

import json
import pathlib
import time

import bench_ours
import jax
import numpy as np
from absl import flags

from qlora_jax import command_line
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.files import resolve_path
from qlora_jax.generation import Engine, Request
from qlora_jax.loading import load_model
from qlora_jax.metrics import host_memory
from qlora_jax.training.building import choose_compute_dtype


def endless(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without end tokens."""
    tokenizer.eos_token_ids = ()
    return tokenizer


def main() -> None:
    """Prints one line of JSON a repeat."""
    dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
    model, tokenizer = load_model(resolve_path(bench_ours.MODEL), dtype=dtype)
    tokenizer = endless(tokenizer)
    for path in _PROMPTS.value:
        prompts, count = np.load(pathlib.Path(path)), _NEW_TOKENS.value
        _, batch, length = prompts.shape
        engine = Engine(model, tokenizer, slots=batch, max_len=length + count, chunk=count)
        packed = "packed weights" if not engine.dense else "dense copy beside the packed weights"
        for repeat, rows in enumerate(prompts.tolist()):
            started, cpu_started = time.perf_counter(), time.process_time()
            for row in rows:
                engine.submit(Request(row, max_new_tokens=count))
            last = {delta.request_id: delta for delta in engine.step()}
            first = time.perf_counter() - started
            while engine.busy:
                last |= {delta.request_id: delta for delta in engine.step()}
            seconds = time.perf_counter() - started
            if [delta.tokens for delta in last.values()] != [count] * batch:
                raise RuntimeError(f"not all of {batch} replies have {count} tokens")
            report = {
                "batch": batch,
                "repeat": repeat,
                "seconds": seconds,
                "cpu_seconds": time.process_time() - cpu_started,
                "first": first,
                "peak_rss": host_memory()[1],
                "setting": f"{dtype}, {packed}",
            }
            print(json.dumps(report), flush=True)
        if engine.cached_tokens:
            raise RuntimeError(f"{engine.cached_tokens} prompt tokens were not read")


if __name__ == "__main__":
    _PROMPTS = flags.DEFINE_multi_string("prompts", None, "token ids, .npy int32", required=True)
    _NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "tokens of each reply", 1)
    command_line.run(main)
