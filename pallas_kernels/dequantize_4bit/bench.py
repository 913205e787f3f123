"""Times `dequantize_4bit` on this device.

python -m pallas_kernels.dequantize_4bit.bench
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequantize_4bit.api import dequantize_4bit
from pallas_kernels.quantize_4bit.api import quantize_4bit, quantize_absmax

SHAPES = ((1536, 576), (2048, 2048))
DTYPES = ("float32", "bfloat16")


def make_case(
    shape: tuple[int, ...], dtype: str, *, quant_type: str = "nf4", block_size: int = 64
) -> Callable[[], Array]:
    """A compiled call that dequantizes a normal random tensor, with double quantization.

    Args:
        shape: of the dense array.
        dtype: of the result.
        quant_type: see `quantize_4bit`.
        block_size: see `quantize_4bit`.

    >>> make_case((4, 64), "bfloat16")().dtype
    dtype(bfloat16)
    """
    weight = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
    codes, absmax = quantize_4bit(weight, quant_type=quant_type, block_size=block_size)
    static = dict(shape=shape, quant_type=quant_type, block_size=block_size, dtype=dtype)
    dequantize = jax.jit(functools.partial(dequantize_4bit, **static))
    call = functools.partial(dequantize, codes, *quantize_absmax(absmax))
    call().block_until_ready()
    return call


def time_calls(call: Callable[[], Array], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, from the call until its result is there.

    >>> len(time_calls(make_case((4, 64), "float32"), repeats=3))
    3
    """
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        call().block_until_ready()
        samples.append(time.perf_counter() - started)
    return samples


def main() -> None:
    """Prints a line for each shape and dtype."""
    for shape in SHAPES:
        for dtype in DTYPES:
            samples = time_calls(make_case(shape, dtype), repeats=100)
            median, least = statistics.median(samples) * 1e3, min(samples) * 1e3
            print(f"{shape} {dtype}: median {median:.3f} ms, minimum {least:.3f} ms")


if __name__ == "__main__":
    main()
