"""Times one case of the suite `gpu` with torch and bitsandbytes.

Run by scripts/bench_gpu.py with a Python that has those packages; it needs nothing of this project.
Questions and answers are those of scripts/bench_gpu_ours.py, and so is what is measured: the
durations of a call's kernels as CUPTI records them (through torch's profiler), over weights and
results that rotate through more memory than the cache holds. Each operation is called as
bitsandbytes does it best: without a gradient to record where none is asked for.

Where the profiler records nothing, times are those between two CUDA events, which count launches
too ("clock": "events"); on a CPU those of a whole call ("clock": "wall").
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import math
import statistics
import sys
import time
from typing import Any

import bench_gpu_cases as cases
import bitsandbytes as bnb
import torch

BLOCK_SIZE = 64
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Answers until standard input ends."""
    weights: dict[Any, list[Any]] = {}
    for line in sys.stdin:
        try:
            answer = answer_question(json.loads(line), weights)
        except Exception as error:  # a row, not the end
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


def answer_question(question: dict[str, Any], weights: dict[Any, list[Any]]) -> dict[str, Any]:
    """The answer to one question; `weights` keeps what was made for the others."""
    if question.get("facts"):
        return device_facts()
    if question.get("ceilings"):
        return measure_ceilings(question["calls"])
    case, name = question["case"], question["implementation"]
    rotate = question["rotate_bytes"]
    dense = name == cases.TORCH_DENSE or case["operation"] == "quantize"
    key = (*case["shape"], dense)
    if key not in weights:
        weights[key] = weight_copies(case["shape"], dense, rotate)
    call, written = make_call(case, name)
    kept = collections.deque(maxlen=max(1, math.ceil(rotate / written)))
    for index in range(question["warm_up"]):
        kept.append(call(weights[key][index % len(weights[key])]))
    return time_calls(call, weights[key], kept, question["calls"])


def weight_copies(shape: list[int], dense: bool, rotate: float) -> list[Any]:
    """So many random weights that they fill more than `rotate` bytes; at least two."""
    bytes_each = shape[0] * shape[1] * (2 if dense else 0.5)
    copies = max(2, math.ceil(rotate / bytes_each) + 1)
    return [random_weight(seed, shape, dense) for seed in range(copies)]


def random_weight(seed: int, shape: list[int], dense: bool) -> Any:
    """Normal numbers in bfloat16, or their NF4 codes and state."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.02
    return weight if dense else quantize(weight, double_quant=True)


def quantize(weight: torch.Tensor, *, double_quant: bool) -> Any:
    """NF4 codes and their state."""
    return bnb.functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type="nf4"
    )


def make_call(case: cases.Case, name: str) -> tuple[Any, int]:
    """The call for one copy of the weight, and how many bytes it writes."""
    operation, (n, k), rows = case["operation"], case["shape"], case["rows"]
    if operation == "dequantize":
        return lambda packed: bnb.functional.dequantize_4bit(*packed), 2 * n * k
    if operation == "quantize":
        # As ours: codes and float32 scales.
        return lambda weight: quantize(weight, double_quant=False), n * k // 2
    generator = torch.Generator(DEVICE).manual_seed(7)
    inner, outer = (k, n) if operation == "matmul" else (n, k)
    x = torch.randn((rows, inner), generator=generator, device=DEVICE, dtype=torch.bfloat16)
    written = 2 * rows * outer
    if name == cases.TORCH_DENSE:
        if operation == "matmul":
            return lambda w: torch.matmul(x, w.t()), written
        return lambda w: torch.matmul(x, w), written
    if operation == "matmul":
        return torch.no_grad()(lambda packed: _product(x, packed)), written
    return GradientCall(x, torch.zeros((rows, k), device=DEVICE, dtype=torch.bfloat16)), written


def _product(x: torch.Tensor, packed: Any) -> torch.Tensor:
    codes, state = packed
    return bnb.matmul_4bit(x, codes.t(), quant_state=state)


class GradientCall:
    """The gradient of the left factor; `prepare` does the forward pass, which is not timed."""

    def __init__(self, gradient: torch.Tensor, x: torch.Tensor):
        self._gradient, self._x, self._graphs = gradient, x.requires_grad_(), {}

    def prepare(self, packed: Any) -> None:
        """Does the forward pass with one copy of the weight, once."""
        if id(packed) not in self._graphs:
            self._graphs[id(packed)] = _product(self._x, packed)

    def __call__(self, packed: Any) -> torch.Tensor:
        self.prepare(packed)
        product = self._graphs[id(packed)]
        (result,) = torch.autograd.grad(product, self._x, self._gradient, retain_graph=True)
        return result


def time_calls(call: Any, weights: list[Any], kept: Any, calls: int) -> dict[str, Any]:
    """As `bench_gpu_ours.time_calls`."""
    if isinstance(call, GradientCall):
        for weight in weights:
            call.prepare(weight)

    def run() -> None:
        for index in range(calls):
            kept.append(call(weights[index % len(weights)]))
        synchronize()

    if DEVICE == "cpu":
        return {"seconds": _wall(call, weights, kept, calls), "clock": "wall", "kernels": []}
    synchronize()
    kernels = _cupti_kernels(run)
    if kernels:
        return cases.split_kernels(kernels, calls)
    return {"seconds": _events(call, weights, kept, calls), "clock": "events", "kernels": []}


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _wall(call: Any, weights: list[Any], kept: Any, calls: int) -> list[float]:
    seconds = []
    for index in range(calls):
        started = time.perf_counter()
        kept.append(call(weights[index % len(weights)]))
        seconds.append(time.perf_counter() - started)
    return seconds


def _events(call: Any, weights: list[Any], kept: Any, calls: int) -> list[float]:
    seconds = []
    for index in range(calls):
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        kept.append(call(weights[index % len(weights)]))
        second.record()
        second.synchronize()
        seconds.append(first.elapsed_time(second) / 1e3)
    return seconds


def _cupti_kernels(run: Any) -> list[tuple[str, float]]:
    """Name and seconds of every kernel that `run` launches, in their order on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))  # as in Pallas's profiler
    ]
    kernels.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in kernels]


def measure_ceilings(calls: int) -> dict[str, Any]:
    """What this device reaches: a large copy (bytes read and written), a large bfloat16 product."""
    length, size = (1 << 31, 8192) if DEVICE == "cuda" else (1 << 20, 256)
    source = torch.randint(0, 127, (length,), dtype=torch.uint8, device=DEVICE)
    left = torch.randn((size, size), device=DEVICE, dtype=torch.bfloat16)
    copies = _timed(lambda target: target.copy_(source), torch.empty_like(source), calls)
    products = _timed(lambda right: torch.matmul(left, right), torch.randn_like(left), calls)
    return {
        "bytes_per_s": 2 * length / statistics.median(copies),
        "flops_per_s": 2 * size**3 / statistics.median(products),
    }


def _timed(call: Any, argument: Any, calls: int) -> list[float]:
    kept = collections.deque(maxlen=1)
    for _ in range(3):
        kept.append(call(argument))
    timer = _wall if DEVICE == "cpu" else _events
    return timer(call, [argument], kept, calls)


def device_facts() -> dict[str, Any]:
    """What torch knows of the device, and versions."""
    found = {"versions": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = None
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found


if __name__ == "__main__":
    main()
