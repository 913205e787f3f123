"""Times one case of the suite `gpu` with JAX: our operations, and dense bfloat16 products.

A line of JSON for each question, an answer for each:

    {"compile": [[case, implementation], ...]}     all at once, in threads
    {"case": ..., "implementation": "default", "calls": 20, "warm_up": 3, "rotate_bytes": 1e8}
    {"check": ...}                                 as scripts/bench_gpu_check.py

What is reported is *device time*: the durations of a call's kernels as CUPTI records them, summed
over the kernels of the call. Launching from Python does not count, nor do gaps between a call's
kernels. bench_gpu_rival.py reports the same of torch. Where CUPTI is not to be had, as on a CPU,
the time is that of a whole call from the host, and the answer says so ("clock": "wall").

Weights, and what the calls write, rotate through more than `rotate_bytes` of memory (twice the L2
cache), so that no call finds its data in the cache. The weights are random codes and scales.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import json
import math
import sys
import threading
import time
from typing import Any

import bench_gpu_cases as cases
import jax
import jax.numpy as jnp
from bench_gpu_check import bind, check, tiles_type
from jax.experimental.mosaic.gpu import profiler as mosaic_profiler

from pallas_kernels.formats import NESTED_BLOCK_SIZE

BLOCK_SIZE = 64
_COMPILE_THREADS = 8


def main() -> None:
    """Answers until standard input ends."""
    bench = KernelBench(interpret="--interpret" in sys.argv[1:])
    for line in sys.stdin:
        try:
            answer = bench.answer(json.loads(line))
        except Exception as error:  # a row, not the end
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


class KernelBench:
    """Compiled calls and their inputs, kept from question to question."""

    def __init__(self, *, interpret: bool):
        """Args: interpret: run GPU kernels on the CPU."""
        self._interpret = interpret
        self._compiled: dict[tuple[str, str], Any] = {}
        self._weights: dict[tuple[Any, ...], list[Any]] = {}
        self._lowering = threading.Lock()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question of the module's text."""
        if "compile" in question:
            return self._compile_all(question["compile"])
        if question.get("facts"):
            return device_facts()
        if "default_tiles" in question:
            made = tiles_type(*question["default_tiles"])
            return {"tiles": None if made is None else dataclasses.asdict(made())}
        if "check" in question:
            return check(question["check"], interpret=self._interpret)
        case, name = question["case"], question["implementation"]
        compiled = self._compile(case, name)
        if isinstance(compiled, str):
            return {"unsupported": compiled}
        shape, rotate = tuple(case["shape"]), question["rotate_bytes"]
        weights = self._weight_copies(shape, _stored(case, name), rotate)
        left = left_factor(case)
        arguments = [(*left, *weight) for weight in weights]
        written = sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled.out_info)
        )
        kept = collections.deque(maxlen=max(1, math.ceil(rotate / written)))
        for index in range(question["warm_up"]):
            # Waits for each: two interpreted kernels at once would share their memory.
            kept.append(jax.block_until_ready(compiled(*arguments[index % len(arguments)])))
        return time_calls(compiled, arguments, kept, question["calls"])

    def _compile_all(self, wanted: list[Any]) -> dict[str, Any]:
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(_COMPILE_THREADS) as pool:
            list(pool.map(lambda pair: self._compile(*pair), wanted))
        return {"seconds": time.perf_counter() - started}

    def _compile(self, case: cases.Case, name: str) -> Any:
        """The compiled call, or why there is none: refused input or tiles, or a mistake."""
        key = (json.dumps(case), name)
        if key not in self._compiled:
            try:
                abstract = jax.eval_shape(lambda: (*left_factor(case), *one_weight(0, case, name)))
                # One at a time: what kernels are written with keeps global state. The compiler
                # behind it is C++ and takes most of the time.
                with self._lowering:
                    lowered = jax.jit(self._function(case, name)).lower(*abstract)
                self._compiled[key] = lowered.compile()
            except Exception as error:
                self._compiled[key] = f"{type(error).__name__}: {error}"[:500]
        return self._compiled[key]

    def _function(self, case: cases.Case, name: str) -> Any:
        operation = case["operation"]
        if name == cases.JAX_DENSE:
            return _dense_forward if operation == "matmul" else _dense_backward
        static: dict[str, Any] = {"quant_type": "nf4", "block_size": BLOCK_SIZE}
        if operation != "quantize":
            static["shape"] = tuple(case["shape"])
        if operation == "dequantize":
            static["dtype"] = jnp.dtype(jnp.bfloat16)
        implementation = None if name == cases.DEFAULT else name
        tiles = case.get("tiles")
        if tiles is not None:
            tiles = tiles_type(operation, name)(**tiles)
        return bind(operation, implementation, self._interpret, tiles, **static)

    def _weight_copies(self, shape: tuple[int, int], stored: str, rotate: float) -> list[Any]:
        """So many random weights that they fill more than `rotate` bytes; at least two."""
        if (shape, stored) not in self._weights:
            bytes_each = shape[0] * shape[1] * (0.5 if stored == "packed" else 2)
            copies = max(2, math.ceil(rotate / bytes_each) + 1)
            make = packed_weight if stored == "packed" else dense_weight
            self._weights[shape, stored] = [make(seed, shape) for seed in range(copies)]
            jax.block_until_ready(self._weights[shape, stored])
        return self._weights[shape, stored]


def _stored(case: cases.Case, name: str) -> str:
    dense = name == cases.JAX_DENSE or case["operation"] == "quantize"
    return "dense" if dense else "packed"


def one_weight(seed: int, case: cases.Case, name: str) -> tuple[jax.Array, ...]:
    """The weight arguments of a call."""
    make = packed_weight if _stored(case, name) == "packed" else dense_weight
    return make(seed, tuple(case["shape"]))


@functools.partial(jax.jit, static_argnums=1)
def packed_weight(seed: int, shape: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Random codes and scales with double quantization, as `quantize_4bit` lays them out."""
    keys = jax.random.split(jax.random.key(seed), 3)
    size = shape[0] * shape[1]
    blocks = size // BLOCK_SIZE
    nested = -(-blocks // NESTED_BLOCK_SIZE)
    return (
        jax.random.bits(keys[0], (size // 2,), jnp.uint8),
        jax.random.bits(keys[1], (blocks,), jnp.uint8),
        jax.random.uniform(keys[2], (nested,), minval=0.005, maxval=0.01),
        jnp.float32(0.02),
    )


@functools.partial(jax.jit, static_argnums=1)
def dense_weight(seed: int, shape: tuple[int, int]) -> tuple[jax.Array]:
    """Normal random numbers in bfloat16."""
    return (0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16),)


def left_factor(case: cases.Case) -> tuple[jax.Array, ...]:
    """The rows that a product multiplies, in bfloat16; nothing for the other operations."""
    if not case["rows"]:
        return ()
    width = case["shape"][1 if case["operation"] == "matmul" else 0]
    return (jax.random.normal(jax.random.key(7), (case["rows"], width), jnp.bfloat16),)


def _dense_forward(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w.T)


def _dense_backward(g: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(g, w)


def time_calls(compiled: Any, arguments: list[Any], kept: Any, calls: int) -> dict[str, Any]:
    """Seconds of each call, through the arguments in turn.

    Args:
        compiled: the call.
        arguments: one tuple a copy of the weight.
        kept: a deque that keeps the newest results alive, so that their memory is not written
            again at once.
        calls: how many.

    Returns:
        `seconds`, one a call; `clock`; and of CUPTI `kernels`, the names of a call's kernels.
    """

    def run() -> None:
        for index in range(calls):
            kept.append(compiled(*arguments[index % len(arguments)]))
        jax.block_until_ready(list(kept))

    kernels = _cupti_kernels(run) if jax.default_backend() == "gpu" else []
    if kernels:
        return cases.split_kernels(kernels, calls)
    seconds = []
    for index in range(calls):
        started = time.perf_counter()
        kept.append(jax.block_until_ready(compiled(*arguments[index % len(arguments)])))
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "clock": "wall", "kernels": []}


def _cupti_kernels(run: Any) -> list[tuple[str, float]]:
    """Name and seconds of every kernel that `run` launches; empty where CUPTI refuses.

    Pallas's own profiler measures one call on one set of arguments, after a call on the same set to
    warm up, which leaves them in the cache; so its two functions are called here.
    """
    cupti = mosaic_profiler.mosaic_gpu_lib._mosaic_gpu_ext
    try:
        cupti._cupti_init()
    except RuntimeError as error:
        print(f"CUPTI: {error}", file=sys.stderr)
        run()
        return []
    try:
        run()
    finally:
        # True: detach. What is launched until the next time would else be in its list.
        kernels = cupti._cupti_get_timings(True)
    return [(name, milliseconds / 1e3) for name, milliseconds in kernels or ()]


def device_facts() -> dict[str, Any]:
    """What JAX calls the device."""
    device = jax.devices()[0]
    return {
        "device_kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "platform": device.platform,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
