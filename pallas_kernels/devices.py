"""What a device can do: the facts that pick an implementation and its compiler options.

Every operation has up to three implementations with one signature: `xla` (everywhere), `mosaic_gpu`
(Pallas, GPUs from sm_80) and `triton` (through jax-triton, from sm_75); the product has one more,
`dequantize`, which is the kernel of that name and then the vendor's dense product. `run` tries
those that the *target* can run, the best first; one that does not serve an input raises
NotImplementedError, and the next one takes over.

The target is the device that a program is traced for: usually JAX's default device, but a program
can be compiled for a GPU that is not there. Then the abstract mesh says which:

    target = Target("NVIDIA H100 80GB HBM3", 132, "gpu", compute_capability="9.0")
    with tracing_for(target):
        jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_LOG = logging.getLogger(__name__)

# The least compute capability that each implementation for GPUs is written for.
_LEAST = {"mosaic_gpu": (8, 0), "triton": (7, 5), "dequantize": (7, 5)}
IMPLEMENTATIONS = (*_LEAST, "xla")


@dataclasses.dataclass(frozen=True)
class Target(jax.sharding.AbstractDevice):
    """A device to trace for.

    Attributes:
        device_kind: the vendor's name for it, e.g. `"NVIDIA H100 80GB HBM3"`.
        num_cores: streaming multiprocessors, or None.
        platform: `"cpu"`, `"gpu"` (NVIDIA's), `"rocm"`, `"tpu"`.
        compute_capability: of an NVIDIA GPU, e.g. `"9.0"`; else None.
    """

    compute_capability: str | None = None

    @property
    def architecture(self) -> tuple[int, int]:
        """The compute capability as numbers; (0, 0) where there is none.

        >>> Target("", None, "gpu", "8.6").architecture
        (8, 6)
        """
        if self.compute_capability is None:
            return 0, 0
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


def _target_of(device: Any) -> Target:
    platform, capability = device.platform, getattr(device, "compute_capability", None)
    if platform == "gpu" and str(capability).startswith("gfx"):
        platform, capability = "rocm", None
    return Target(device.device_kind, getattr(device, "core_count", None), platform, capability)


def current_target() -> Target:
    """The device that tracing is for now: of `tracing_for` or an abstract mesh, else the default.

    >>> current_target().platform
    'cpu'
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if isinstance(abstract, Target):
        return abstract
    default = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    if abstract is None or abstract.device_kind == default.device_kind:
        return _target_of(default)
    return _target_of(abstract)


@contextlib.contextmanager
def tracing_for(target: Target) -> Iterator[None]:
    """Makes `target` the current one for what is traced inside.

    >>> with tracing_for(Target("NVIDIA L4", 58, "gpu", "8.9")):
    ...     current_target().compute_capability
    '8.9'
    """
    # Without axes, so that arguments with shardings of their own, over other meshes, fit in.
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=target)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def supported(operation: str, implementation: str, target: Target, dtype: jnp.dtype) -> bool:
    """Whether an implementation is written for a target; each may still refuse single inputs.

    Args:
        operation: `"dequantize_4bit"`, `"matmul_4bit"`, `"quantize_4bit"`.
        implementation: one of `IMPLEMENTATIONS`.
        target: the device.
        dtype: of the dense array.

    >>> t4 = Target("Tesla T4", 40, "gpu", "7.5")
    >>> supported("matmul_4bit", "mosaic_gpu", t4, jnp.float16)
    False
    """
    # Cards before sm_80 have no bfloat16 arithmetic: Triton refuses, and products are not counted
    # as served by XLA either, though it emulates them where nothing else is left.
    no_bfloat16 = target.platform == "gpu" and target.architecture < (8, 0)
    if dtype == jnp.bfloat16 and no_bfloat16:
        return implementation == "xla" and operation != "matmul_4bit"
    if implementation == "xla":
        return True
    if (operation, implementation) == ("matmul_4bit", "mosaic_gpu"):
        return target.platform == "gpu" and target.architecture[0] == 9  # made of wgmma
    return target.platform == "gpu" and target.architecture >= _LEAST[implementation]


def run(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    arrays: Sequence[Any],
    *,
    dtype: jnp.dtype,
    implementation: str | None = None,
) -> Any:
    """Traces the first implementation that serves the current target and these arrays.

    Args:
        operation: as in `supported`.
        implementations: by name; each takes `*arrays`. The order says which is preferred.
        arrays: arguments, arrays or None.
        dtype: of the dense array.
        implementation: the one to use, instead of the first that can.

    Raises:
        ValueError: `implementation` is unknown or does not serve this.
    """
    target = current_target()
    if implementation is not None:
        if implementation not in implementations:
            names = tuple(implementations)
            raise ValueError(f"{implementation=} of {operation} is unknown: use one of {names}")
        try:
            return implementations[implementation](*arrays)
        except NotImplementedError as error:
            raise ValueError(
                f"{implementation=} of {operation} does not serve this: {error}"
            ) from error
    for name, function in implementations.items():
        if not supported(operation, name, target, dtype):
            continue
        try:
            if name == "xla":
                return function(*arrays)
            # A kernel is one tensor's: under vmap it is launched for one after the other. And a
            # program may still be lowered for another platform than the one it was traced for.
            return jax.lax.platform_dependent(
                *arrays,
                cuda=jax.custom_batching.sequential_vmap(function),
                default=implementations["xla"],
            )
        except NotImplementedError as error:
            _log_once(operation, name, target.device_kind, str(error))
    return implementations["xla"](*arrays)


@functools.cache
def _log_once(operation: str, name: str, device_kind: str, reason: str) -> None:
    _LOG.info("%s on %s: not %s (%s)", operation, device_kind, name, reason)


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
