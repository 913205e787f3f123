"""What `ql.paged` costs on this processor, for scripts/bench.py --suite=cpu --part=paging.

The optimizer's update of SmolLM2-135M's adapters (rank 64 on every linear layer) alone: AdamW as it
is, wrapped with all state on the device, and wrapped with all state in pinned memory, in turns. On
a CPU both memories are the same, so the last one shows what the copies of pages cost. Beside it a
whole training step, as the measure of what a user would notice.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import bench_ours
import jax
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from qlora_jax import config
from qlora_jax.optim import paged
from qlora_jax.training.fitting import abstract_run

WAYS = ("adamw", "paged, all on the device", "paged, all in pinned memory")
_TURNS, _CALLS = 8, 10


def _update(way: str, params: Any) -> Any:
    """A call of the update that keeps its own state."""
    inner = optax.adamw(1e-4)
    tx = {
        WAYS[0]: lambda: inner,
        WAYS[1]: lambda: paged(inner),
        WAYS[2]: lambda: paged(inner, device_budget_bytes=0),
    }[way]()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = [jax.tree.map(lambda x: x + 0, params), tx.init(params)]

    def call() -> None:
        carry[:] = step(*carry, params)
        jax.block_until_ready(carry)

    return call


def bench(console: Console) -> dict[str, Any]:
    """Seconds of every update by way, and of every whole step after the first."""
    settings = config.get_config()
    settings.model.path, settings.data.path = bench_ours.MODEL, bench_ours.DATA
    shapes = abstract_run(settings, jax.devices()[0]).state.lora
    keys = nnx.Rngs(0).params
    params = jax.tree.map(lambda x: 0.01 * jax.random.normal(keys(), x.shape, x.dtype), shapes)
    calls = {way: _update(way, params) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with console.status("timing updates"):
        for turn in range(_TURNS + 1):
            for way, call in calls.items():
                for _ in range(_CALLS):
                    started = time.perf_counter()
                    call()
                    if turn:  # the first one compiles and warms up
                        seconds[way].append(time.perf_counter() - started)
    calls.clear()
    with console.status("timing whole steps"):
        steps = [row["seconds"] for row in bench_ours.train_steps(bench_ours.real_tokens(5))]
    return {"update": seconds, "step": steps[1:]}


def summarize(samples: dict[str, Any]) -> dict[str, Any]:
    """Medians in seconds, and what paging adds as a share of a whole step."""
    update = {way: statistics.median(found) for way, found in samples["update"].items()}
    step = statistics.median(samples["step"])
    added = {way: (update[way] - update[WAYS[0]]) / step for way in WAYS[1:]}
    return {"update": update, "step": step, "added_share_of_step": added}


def print_table(summary: dict[str, Any], console: Console) -> None:
    """One row a way."""
    table = Table(title=f"optimizer update, ms; a whole step takes {summary['step']:.2f} s")
    for column in ("way", "median", "added, of a step"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, seconds in summary["update"].items():
        added = summary["added_share_of_step"].get(way)
        share = "" if added is None else f"{100 * added:+.2f} %"
        table.add_row(way, f"{1e3 * seconds:.1f}", share)
    console.print(table)
