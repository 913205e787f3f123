"""QLoRA on somebody else's Flax NNX model: ours beside Qwix's, in one process and in turns.

    pip install --no-deps qwix
    python scripts/bench_qwix.py

A decoder of plain `nnx.Linear` layers that knows of neither library (SmolLM2-135M's widths, eight
layers) gets NF4 in blocks of 64 and adapters of rank 64 on every linear layer of its blocks, by
`ql.apply_qlora` and by `qwix.apply_lora_to_model` with a `LoraProvider`. Then each trains on the
same tokens with the same AdamW. Compared are bits of a frozen weight as they lie in memory here,
decoded weights that the forward pass keeps for the backward pass, temporaries of the compiled step,
and seconds a step. The adapters begin as each library likes, so the losses are not the same.
Samples go to benchmarks/results/.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx
from rich.console import Console
from rich.table import Table

import qlora_jax as ql
from qlora_jax import command_line
from qlora_jax.errors import UserError

WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 576, 1536, 9, 8, 8192
RANK, ALPHA, BLOCK = 64, 16.0, 64
_RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"


class Block(nnx.Module):
    """Attention and a gated MLP."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate, self.up = linear(WIDTH, INNER), linear(WIDTH, INNER)
        self.down = linear(INNER, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Embeddings, blocks, tied logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x).astype(jnp.bfloat16)).astype(jnp.float32)


def adapt_with_qwix(base: Decoder, tokens: jax.Array) -> Decoder:
    """The model as Qwix adapts it.

    Raises:
        UserError: Qwix is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise UserError("Qwix is not installed: pip install --no-deps qwix") from None
    provider = qwix.LoraProvider(
        module_path=".*blocks.*", rank=RANK, alpha=ALPHA, weight_qtype="nf4", tile_size=BLOCK
    )
    return qwix.apply_lora_to_model(base, provider, tokens, rngs=nnx.Rngs(1))


def adapt_with_ours(base: Decoder, double_quant: bool) -> Decoder:
    """The model as `ql.apply_qlora` adapts it."""
    return ql.apply_qlora(
        base,
        where="all-linear",
        rank=RANK,
        alpha=ALPHA,
        double_quant=double_quant,
        rngs=nnx.Rngs(1),
    )


def make_step(model: Decoder, tokens: jax.Array) -> tuple[Callable[[], float], dict[str, float]]:
    """A training step that keeps its own state, and facts about it.

    Args:
        model: adapted.
        tokens: int32 [rows, length].

    Returns:
        A function that takes a step and returns the loss; bits of a frozen weight of the blocks,
        bytes of 16-bit weights that the backward pass is given, and bytes of temporaries.
    """
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tx = optax.adamw(1e-3)

    def loss(lora, frozen):
        logits = nnx.merge(graphdef, lora, frozen)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora, state, frozen):
        value, gradients = jax.value_and_grad(loss)(lora, frozen)
        updates, state = tx.update(gradients, state, lora)
        return optax.apply_updates(lora, updates), state, value

    carry = [lora, tx.init(lora)]
    compiled = step.lower(*carry, frozen).compile()

    def call() -> float:
        *carry[:], value = compiled(*carry, frozen)
        return float(value)

    weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    # What an array takes, not what its dtype says: a uint4 may have a byte to itself.
    packed = nnx.state(model.blocks, lambda path, _: "kernel" in path)
    arrays = [shard.data for x in jax.tree.leaves(packed) for shard in x.addressable_shards]
    size = sum(array.on_device_size_in_bytes() for array in arrays)
    backward = jax.eval_shape(lambda *both: jax.vjp(loss, *both)[1], lora, frozen)
    kept = jax.tree.leaves(backward)
    shapes = {(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)}
    decoded = [x for x in kept if x.dtype == jnp.bfloat16 and x.shape in shapes]
    facts = {
        "bits": 8 * size / weights,
        "decoded_bytes": sum(2 * x.size for x in decoded),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    return call, facts


def main() -> None:
    """Compares, prints a table and writes the samples."""
    tokens = jax.random.randint(jax.random.key(0), (4, 257), 0, VOCABULARY)
    base = Decoder(nnx.Rngs(0))
    models = {
        "qlora_jax": adapt_with_ours(base, double_quant=True),
        "qlora_jax without double quantization": adapt_with_ours(base, double_quant=False),
        "Qwix": adapt_with_qwix(base, tokens),
    }
    steps = {name: make_step(model, tokens) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_STEPS.value + 1):
        for name, (call, _) in steps.items():
            started = time.perf_counter()
            losses[name].append(call())
            if turn:
                seconds[name].append(time.perf_counter() - started)
    table = Table(title=f"{LAYERS} layers of {WIDTH}, 4 x 256 tokens, rank {RANK}")
    columns = ("bits a frozen weight", "decoded weights kept, MB", "temporaries, MB", "s a step")
    table.add_column("")
    for column in (*columns, "first loss", "last loss"):
        table.add_column(column, justify="right")
    for name, (_, facts) in steps.items():
        table.add_row(
            name,
            f"{facts['bits']:.2f}",
            f"{facts['decoded_bytes'] / 1e6:.0f}",
            f"{facts['temporary_bytes'] / 1e6:.0f}",
            f"{statistics.median(seconds[name]):.2f}",
            f"{losses[name][0]:.4f}",
            f"{losses[name][-1]:.4f}",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "qwix")},
        "facts": {name: facts for name, (_, facts) in steps.items()},
        "seconds": seconds,
        "losses": losses,
    }
    _RESULTS.mkdir(parents=True, exist_ok=True)
    path = _RESULTS / f"qwix_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    path.write_text(json.dumps(result) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    _STEPS = flags.DEFINE_integer("steps", 10, "timed steps of each", 1)
    command_line.run(main)
