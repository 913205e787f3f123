"""Our side of the suite `gpu`'s whole steps: QLoRA training and decoding with random weights.

    python scripts/bench_gpu_steps.py [--dry-run]

Questions, a line of JSON each, in the order of the memory they need (the device's high-water mark
is never reset):

    {"run": "decode"}                         or "setting": "large": the large model, alone
    {"run": "paged", "setting": "100"}        training with so many % of the moments on the host
    {"run": "train", "setting": "full"}       what `config.model.remat` may be
    {"run": "short", "setting": "0"}          as `paged`, in memory that is too short for 0 %

The answers to `paged`, `short` and `train full` have a digest of the adapters after the same steps
on the same batch: paging changes no bit of them. For `short`, which comes after `train full` and
`paged 100`, an array fills the device but for the mean of what the plans of these two need.

What is timed is what users run: `qlora_jax.training.step` on a configuration's optimizer and
adapters, and `qlora_jax.generation.generate_ids`. Only the weights are not read from a file: the
model is built without values, made 4-bit in that state, and filled with random codes and scales on
the device. No dense copy of it exists at any time.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from typing import Any

import bench_gpu_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx

from qlora_jax import config
from qlora_jax.flax_nnx import apply_qlora, quantize_model
from qlora_jax.generation import generate_ids
from qlora_jax.lora import is_quantized
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.placement import bytes_by_memory
from qlora_jax.targets import peak_bytes
from qlora_jax.training.building import build_optimizer, choose_compute_dtype, split_model
from qlora_jax.training.step import compile_step, init_state, make_train_step, next_token_loss

_GENERATIONS = 3


def main() -> None:
    """Answers until standard input ends."""
    bench = StepBench(cases.DRY_RUN if "--dry-run" in sys.argv[1:] else cases.FULL)
    for line in sys.stdin:
        try:
            answer = bench.answer(json.loads(line))
        except Exception as error:  # a row, not the end: above all, too little memory
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


def abstract_model(model: dict[str, int], dtype: np.dtype) -> Llama:
    """A 4-bit Llama (NF4, double quantization) without values."""
    shape = dict(model)
    shape["head_dim"] = shape["hidden_size"] // shape["num_attention_heads"]
    model = nnx.eval_shape(
        lambda: Llama(LlamaConfig(**shape), rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )
    return quantize_model(model, quant_type="nf4", block_size=64, double_quant=True)


def random_model(model: dict[str, int], dtype: np.dtype) -> Llama:
    """`abstract_model` with random codes, scales and embeddings."""
    model = abstract_model(model, dtype)
    for index, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
        key = jax.random.fold_in(jax.random.key(0), index)
        value = variable.get_value()
        if is_quantized(value):
            variable.set_value(_random_packed(key, value))
        else:
            center = 1.0 if path[-1] == "scale" else 0.0
            variable.set_value(_normal(key, center, value.shape, value.dtype))
    return model


def adapted_model(base: Llama, settings: Any, remat: str) -> Llama:
    """The base, whose arrays are shared, with new adapters, in training mode.

    Args:
        base: from `abstract_model` or `random_model`.
        settings: a whole configuration.
        remat: what `config.model.remat` may be.
    """
    model = apply_qlora(
        base,
        where=settings.lora.where,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        lora_dtype=jnp.dtype(settings.lora.dtype),
        rngs=nnx.Rngs(settings.seed),
    )
    model.remat = remat
    model.train()
    return model


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, center: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (center + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


def _random_packed(key: jax.Array, abstract: Any) -> Any:
    """Random values of an abstract `QuantizedTensor`; its scales lie between 0.01 and 0.03."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract)

    @jax.jit
    def make(key):
        one, two, three = jax.random.split(key, 3)
        return jax.tree.unflatten(
            jax.tree.structure(abstract),
            [
                # A layer at a time: the generator's own numbers take four times the memory.
                jax.lax.map(
                    lambda key: jax.random.bits(key, shapes.codes[1:], jnp.uint8),
                    jax.random.split(one, shapes.codes[0]),
                ),
                jax.random.bits(two, shapes.absmax, jnp.uint8),
                jax.random.uniform(three, shapes.nested_absmax, minval=0.005, maxval=0.01),
                jnp.full(shapes.offset, 0.02),
            ],
        )

    return make(key)


class StepBench:
    """The model, and what is done with it."""

    def __init__(self, sizes: cases.Sizes):
        """Reads the settings; the first question has the model built on the device."""
        self._sizes = sizes
        self._settings = config.get_config()
        self._settings.lora.rank = sizes.rank
        self._dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
        self._base: Llama | None = None
        self._compiled: dict[tuple[str, float], Any] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question of the module's text."""
        large = question["run"] == "decode" and question["setting"] == "large"
        if large or self._base is None:
            self._base = None  # there is room for one
            model = self._sizes.large_model if large else self._sizes.model
            self._base = random_model(model, self._dtype)
        if question["run"] == "decode":
            return self._decode()
        if question["run"] == "paged":
            return self._train("full", paged=int(question["setting"]) / 100)
        if question["run"] == "short":
            return self._short(paged=int(question["setting"]) / 100)
        return self._train(question["setting"])

    def _decode(self) -> dict[str, Any]:
        sizes, rng = self._sizes, np.random.default_rng(0)
        prompt = rng.integers(1, sizes.model["vocab_size"], sizes.prompt).tolist()
        seconds: dict[int, list[float]] = {count: [] for count in sizes.new_tokens}
        for run in range(_GENERATIONS + 1):
            for count in sizes.new_tokens:
                started = time.perf_counter()
                (new,) = generate_ids(self._base, [prompt], max_new_tokens=count)
                if len(new) != count:
                    raise RuntimeError(f"{len(new)} new tokens instead of {count}")
                if run:  # the first one compiles
                    seconds[count].append(time.perf_counter() - started)
        peak = memory_stats().get("peak_bytes_in_use")
        return {"seconds": seconds, "peak_bytes": peak, "dtype": str(self._dtype)}

    def _train(self, setting: str, paged: float = 0.0, room: int | None = None) -> dict[str, Any]:
        sizes, settings = self._sizes, self._settings
        model = adapted_model(self._base, settings, setting)
        graphdef, lora, frozen = split_model(model)
        trainable = sum(leaf.size for leaf in jax.tree.leaves(lora))
        budget = int((1 - paged) * 8 * trainable) if paged else None
        tx, _ = build_optimizer(settings, total_steps=1000, state_budget=budget)
        state = init_state(lora, tx, settings.seed)
        where = bytes_by_memory(state.opt_state)
        del model, lora
        loss = functools.partial(next_token_loss, chunk_size=sizes.loss_chunk)
        batch = random_batch(sizes)
        started = time.perf_counter()
        if (setting, paged) not in self._compiled:
            step = make_train_step(graphdef, tx, loss_fn=loss)
            self._compiled[setting, paged] = compile_step(step, state, frozen, batch)
        step = self._compiled[setting, paged]
        predicted = peak_bytes(step.memory_analysis())
        report = {"compile_s": time.perf_counter() - started, "predicted_bytes": predicted}
        limit = memory_stats().get("bytes_limit")
        if limit is not None and predicted > limit:
            return report | {"skipped": f"does not fit: the device has {limit} bytes"}
        ballast = None if room is None else jnp.zeros(((limit - room) >> 20, 1 << 20), jnp.uint8)
        seconds, losses = [], []
        for _ in range(sizes.step_warm_up + sizes.steps):
            started = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - started)
            losses.append(float(metrics["loss"]))
        del ballast
        if not np.isfinite(losses).all():
            raise RuntimeError(f"{losses=}")
        seconds = seconds[sizes.step_warm_up :]
        peak = memory_stats().get("peak_bytes_in_use")
        report |= {"seconds": seconds, "losses": losses, "peak_bytes": peak}
        report |= {"trainable": trainable, "optimizer_bytes": where, "digest": digest(state.lora)}
        tokens = sizes.batch * sizes.length
        return report | {"tokens_per_second": tokens / statistics.median(seconds)}

    def _short(self, paged: float) -> dict[str, Any]:
        plans = [self._compiled.get(("full", share)) for share in (0.0, 1.0)]
        if None in plans or "bytes_limit" not in memory_stats():
            return {"skipped": "without both plans, or a device that counts its memory"}
        room = sum(peak_bytes(plan.memory_analysis()) for plan in plans) // 2
        try:
            return self._train("full", paged, room) | {"room_bytes": room}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"room_bytes": room, "ran_out": str(error)[:500]}


def digest(tree: Any) -> str:
    """A hash of all arrays of a tree."""
    hashed = xxhash.xxh3_128()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def random_batch(sizes: cases.Sizes) -> dict[str, np.ndarray]:
    """One microbatch of random tokens; every row is one document and every token carries loss."""
    shape = (1, sizes.batch, sizes.length)
    ones = np.ones(shape, np.int32)
    return {
        "tokens": np.random.default_rng(0).integers(
            1, sizes.model["vocab_size"], shape, dtype=np.int32
        ),
        "loss_mask": ones,
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(sizes.length, dtype=np.int32), shape),
    }


def memory_stats() -> dict[str, int]:
    """What the device says of its memory; empty where the backend does not count."""
    return jax.devices()[0].memory_stats() or {}


if __name__ == "__main__":
    main()
