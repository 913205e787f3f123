"""GPUs to compile for, without having one: their descriptions, and the compiler at work on any CPU.

XLA compiles for a GPU from a text description of it (`gpu_targets/*.txtpb`). What comes out is the
machine code and the static memory plan of the program that would run there: the number of bytes it
needs is known before the card is rented.

    compiled = compile_for(jax.jit(step, donate_argnums=0), state, batch, target="rtx4090")
    compiled.peak_bytes, compiled.host_bytes

The way there has three steps.

1. *Trace* with the target as the current one (`pallas_kernels.devices.tracing_for`), because it
   decides what is traced: which implementation of an operation, and which instructions a Pallas
   kernel may use.
2. *Lower* for the platform `cuda`, but with every argument placed on this machine's CPU. Devices
   that only compile know no memories, so that a sharding over them loses its `memory_kind`; the
   CPU has `device` and `pinned_host`, and what is to lie in the host's memory stays marked so.
3. *Compile* that module with the compile-only client of the description (`compile_only.py`).

XLA chooses some kernels by timing them (autotuning), which cannot be done here: it takes its
defaults, so a matrix product may get another algorithm, and workspace, on the card itself. Nor can
it ask cuDNN what attention's backward pass needs beside its results; `attention_workspace` adds it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxlib.mlir import ir
from jaxtyping import PyTree

from pallas_kernels import devices
from qlora_jax import compile_only, errors

_FOLDER = importlib.resources.files("qlora_jax") / "gpu_targets"
TARGETS: tuple[str, ...] = tuple(
    sorted(path.name[: -len(".txtpb")] for path in _FOLDER.iterdir() if path.name.endswith("txtpb"))
)


NO_PLUGIN = (
    "compiling for a GPU takes JAX's CUDA plugin, which is not installed; it needs no GPU: "
    'pip install "qlora-jax[cuda]" (a few GB)'
)


class TargetError(errors.UserError):
    """There is no such GPU among the targets, or nothing here that compiles for GPUs."""


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU as the compiler sees it.

    Attributes:
        name: as in `TARGETS`.
        device_kind: the vendor's name, what `jax.Device.device_kind` is on that GPU.
        compute_capability: e.g. `"8.9"`.
        memory_bytes: total memory that CUDA reports.
        memory_bandwidth: bytes per second, of the data sheet.
        l2_bytes: second-level cache.
        core_count: streaming multiprocessors.
        clock_ghz: boost clock.
        threads_per_core: most threads resident on one multiprocessor.
        registers_per_core: 32-bit registers of one multiprocessor.
        shared_bytes_per_core: shared memory of one multiprocessor.
        shared_bytes_per_block: the most that one block may have.
        description: the text for XLA.
    """

    name: str
    device_kind: str
    compute_capability: str
    memory_bytes: int
    memory_bandwidth: int
    l2_bytes: int
    core_count: int
    clock_ghz: float
    threads_per_core: int
    registers_per_core: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    description: str = dataclasses.field(repr=False)

    @property
    def device(self) -> devices.Target:
        """What kernels are picked by."""
        return devices.Target(self.device_kind, self.core_count, "gpu", self.compute_capability)


@functools.cache
def find_target(name: str) -> GpuTarget:
    """The GPU of that name.

    Raises:
        TargetError: it is none of `TARGETS`; the message names the nearest.

    >>> find_target("h100").compute_capability
    '9.0'
    >>> find_target("rtx-4090")
    Traceback (most recent call last):
    qlora_jax.targets.TargetError: there is no GPU target 'rtx-4090'; did you mean 'rtx4090'? ...
    """
    if name not in TARGETS:
        match = errors.nearest(name, TARGETS)
        hint = f"did you mean {match!r}? " if match else ""
        raise TargetError(
            f"there is no GPU target {name!r}; {hint}The targets are {', '.join(TARGETS)}"
        )
    text = (_FOLDER / f"{name}.txtpb").read_text(encoding="utf-8")
    fields = _parse(text)
    gpu = fields["gpu_device_info"]
    capability = gpu["cuda_compute_capability"]
    return GpuTarget(
        name=name,
        device_kind=fields["device_description_str"],
        compute_capability=f"{capability['major']}.{capability['minor']}",
        memory_bytes=gpu["device_memory_size"],
        memory_bandwidth=gpu["memory_bandwidth"],
        l2_bytes=gpu["l2_cache_size"],
        core_count=gpu["core_count"],
        clock_ghz=gpu["clock_rate_ghz"],
        threads_per_core=gpu["threads_per_core_limit"],
        registers_per_core=gpu["registers_per_core_limit"],
        shared_bytes_per_core=gpu["shared_memory_per_core"],
        shared_bytes_per_block=gpu["shared_memory_per_block_optin"],
        description=text,
    )


def _parse(text: str) -> dict[str, Any]:
    """A text-format protocol buffer as nested dicts; no field of ours is repeated."""
    text = re.sub(r"#.*", "", text)
    root: dict[str, Any] = {}
    stack = [root]
    for key, opens, string, word, closes in re.findall(
        r'(\w+)\s*(?::?\s*(\{)|:\s*(?:"([^"]*)"|([\w.+-]+)))|(\})', text
    ):
        if closes:
            stack.pop()
        elif opens:
            stack[-1][key] = {}
            stack.append(stack[-1][key])
        elif re.fullmatch(r"-?\d+", word):
            stack[-1][key] = int(word)
        else:
            stack[-1][key] = float(word) if re.match(r"-?[\d.]", word) else word or string
    return root


@dataclasses.dataclass(frozen=True)
class CompiledFor:
    """A program compiled for a GPU that need not exist; it can be looked at, not run.

    Attributes:
        target: the GPU.
        memory: bytes by name, as in `jax.stages.Compiled.memory_analysis`; the temporaries include
            `attention_workspace`.
        text: the optimized and scheduled program (HLO).
    """

    target: GpuTarget
    memory: Mapping[str, int]
    text: str = dataclasses.field(repr=False)

    def memory_analysis(self) -> types.SimpleNamespace:
        """The static memory plan: `.argument_size_in_bytes`, `.host_temp_size_in_bytes`, ..."""
        return types.SimpleNamespace(**self.memory)

    @property
    def peak_bytes(self) -> int:
        """Device memory: arguments + temporaries + outputs - what outputs share with arguments."""
        return peak_bytes(self.memory_analysis())

    @property
    def host_bytes(self) -> int:
        """Pinned memory of the host, counted alike."""
        return peak_bytes(self.memory_analysis(), "host_")

    def as_text(self) -> str:
        """The program, as of `jax.stages.Compiled.as_text`."""
        return self.text


def peak_bytes(memory: Any, where: str = "") -> int:
    """Arguments + temporaries + outputs - what outputs share with arguments, in bytes.

    Args:
        memory: what `memory_analysis()` of a compiled program gives, for whatever device.
        where: `""` for the device's memory, `"host_"` for the host's.
    """

    def size(part: str) -> int:
        return getattr(memory, f"{where}{part}_size_in_bytes")

    return size("argument") + size("temp") + size("output") - size("alias")


def can_compile() -> bool:
    """Whether JAX's CUDA plugin is installed, which programs are compiled for GPUs with."""
    return compile_only.has_plugin()


def compile_for(
    function: Callable[..., Any],
    *args: PyTree,
    target: str | GpuTarget = "h100",
    options: Mapping[str, str] | None = None,
    **keywords: Any,
) -> CompiledFor:
    """Compiles a function for a GPU, on any machine.

    Args:
        function: anything; with `jax.jit` around it where something is donated or static.
        *args: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`. Of their shardings only
            the `memory_kind` counts: everything is on one device. Other leaves stay as they are.
        target: the GPU.
        options: more XLA options.
        **keywords: its keyword arguments.

    Returns:
        The program's memory plan and text.

    Raises:
        TargetError: unknown target, or JAX's CUDA plugin is not installed.
        qlora_jax.compile_only.CompilerError: XLA cannot compile this for that GPU.
    """
    if isinstance(target, str):
        target = find_target(target)
    _cpu()  # raises where it is left out
    if not can_compile():  # tracing alone may ask for cuDNN, which comes with it
        raise TargetError(NO_PLUGIN)
    return compile_lowered(lower_for(function, *args, target=target, **keywords), target, options)


def lower_for(
    function: Callable[..., Any], *args: PyTree, target: GpuTarget, **keywords: Any
) -> ir.Module:
    """The first two steps of `compile_for`: StableHLO, traced for the target."""
    function = function if hasattr(function, "trace") else jax.jit(function)
    place = functools.partial(jax.tree.map, _place)
    with devices.tracing_for(target.device):
        traced = function.trace(*place(args), **place(keywords))
        return traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")


def _place(leaf: Any) -> Any:
    """The leaf without its values, on this machine's CPU."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    memory_kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
    sharding = jax.sharding.SingleDeviceSharding(_cpu(), memory_kind=memory_kind)
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)


def _cpu() -> jax.Device:
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        raise TargetError(
            "compiling for a GPU that is not there goes over the CPU, which "
            f"JAX_PLATFORMS={platforms} leaves out; use JAX_PLATFORMS={platforms},cpu"
        )
    return jax.local_devices(backend="cpu")[0]


def compile_lowered(
    module: ir.Module,
    target: GpuTarget,
    options: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> CompiledFor:
    """The third step of `compile_for`.

    Args:
        module: from `lower_for`, for the same target.
        target: the GPU.
        options: more XLA options.
        environment: variables for the compiler, where the program has Mosaic GPU kernels.
    """
    file = io.BytesIO()
    module.operation.write_bytecode(file)
    request = file.getvalue(), target.description, options or {}
    try:
        if b"mosaic_gpu" in request[0]:
            answer = compile_only.compile_apart(
                *request, architecture=target.compute_capability, environment=environment
            )
        else:
            answer = compile_only.compile_here(*request)
    except compile_only.NoPluginError:
        raise TargetError(NO_PLUGIN) from None
    workspace = attention_workspace(answer.text)
    temporaries = answer.memory["temp_size_in_bytes"] + workspace
    return CompiledFor(target, {**answer.memory, "temp_size_in_bytes": temporaries}, answer.text)


def attention_workspace(text: str) -> int:
    """Bytes that the largest of a program's cuDNN attentions takes for its backward pass.

    XLA asks cuDNN when it compiles on the card; without one it plans with none. cuDNN sums dQ in
    float32 and, where query heads share key heads, writes dK and dV of every query head (source:
    cudnn-frontend's `scaled_dot_product_flash_attention.h`, `dQ_accum`, `dK_fullhead`,
    `dV_fullhead` and `softmax_sum`). An upper bound, because it need not be needed at the peak.

    Args:
        text: the optimized program (HLO).

    >>> attention_workspace(
    ...     "%x = (bf16[1,4,64,8]{3,1,2,0}, bf16[1,1,32,8]{3,1,2,0}, bf16[1,1,32,8]{3,1,2,0}, "
    ...     'u8[0]{0}) custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    ... )
    13312
    """
    found = 0
    for call in re.findall(r"= \((.*?)\) custom-call\(.*__cudnn\$fmha\w+Backward", text):
        shapes = re.findall(r"\[([\d,]+)\]", call)
        dq, dk = [[int(n) for n in dims.split(",")] for dims in shapes[:2]]
        batch, heads, length, head_dim = dq
        _, kv_heads, span, _ = dk
        size = batch * heads * length * (head_dim + 1) * 4
        if kv_heads < heads:
            size += 2 * batch * heads * span * head_dim * 2
        found = max(found, size)
    return found
