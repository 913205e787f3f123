"""What a device can do: the facts that pick an implementation and its compiler options."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (AVX512-BF16 or AMX, on Linux).

    Elsewhere a product of bfloat16 matrices is computed in float32 after two conversions, and
    float32 throughout is faster.

    >>> isinstance(cpu_multiplies_bfloat16(), bool)
    True
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compiler_options(platform: str) -> dict[str, str]:
    """XLA options that suit the 4-bit operations; for `jax.jit` and `Lowered.compile`.

    Args:
        platform: `"cpu"`, `"gpu"`, `"tpu"`: of the device that runs the program.

    >>> compiler_options("gpu")
    {}
    """
    if platform != "cpu":
        return {}
    # XLA prefers 256-bit vectors even where 512 are there. Decoding 4-bit codes is nothing but
    # vector selects, and takes half as long with the wide ones.
    return {"xla_cpu_prefer_vector_width": "512"}


def release_unused_memory() -> None:
    """Gives memory that was freed back to the system, where the C library can do that (glibc).

    Compiling a training step leaves 100 to 200 MB of it in the allocator's arenas.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
