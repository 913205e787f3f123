"""What a kernel's machine code says about it, on a machine without a GPU.

`mosaic_kernels` and `triton_kernels` compile a call for a target and give, for each kernel that the
call launches, its registers, spills, shared memory and disassembly (SASS): the very code that would
run there. Mosaic GPU compiles inside XLA and writes what it makes to a folder when asked to by
environment variables; Triton's compiler is called by itself.

*Occupancy* is how many warps one multiprocessor can hold at once, of those it could: the least of
what its threads, blocks, registers and shared memory allow. Registers are given out in units of 256
a warp, shared memory in units of 128 bytes (256 on sm_75), and from sm_80 on every block costs
1 KiB more (CUDA Programming Guide, "Technical Specifications per Compute Capability").

The *main loop* of a kernel is the natural loop with the most instructions: an edge back to a block
of code that dominates where it comes from, and all that lies on paths between. What is reached only
where the threads of a warp have diverged (`BRA.DIV`), or by a call, is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core as mosaic
from jaxlib.mlir import ir

from pallas_kernels import triton_call, triton_report
from qlora_jax import sass
from qlora_jax.sass import Instruction
from qlora_jax.targets import GpuTarget, TargetError, compile_lowered, lower_for

try:
    import triton
except ImportError:  # it comes with the `cuda` extra
    triton = None

_BLOCKS_PER_CORE = {"7.5": 16, "8.0": 32, "8.6": 16, "8.9": 24, "9.0": 32}
_REGISTER_UNIT = 256
_WARP = 32
# Registers are spread over the four schedulers of a multiprocessor.
_WARP_UNIT = 4
_TENSOR_CORE = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA")


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """A kernel as compiled for one architecture.

    Attributes:
        kernel: its name.
        architecture: e.g. `"sm_90a"`.
        blocks: of the launch.
        threads: of a block.
        registers: of a thread.
        spill_bytes: what a thread keeps in local memory because registers ran out.
        shared_bytes: shared memory of a block, static and dynamic.
        disassembly: its code as nvdisasm prints it.
        passes: of its longest loop, where Mosaic's source has their number as a constant.
        constants: the parameters that Triton compiled it for.
    """

    kernel: str
    architecture: str
    blocks: int
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    disassembly: str = dataclasses.field(repr=False)
    passes: int | None = None
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def instructions(self) -> list[Instruction]:
        """What a warp can come through, in the order of addresses; no padding."""
        return sass.reachable(self.disassembly)

    def main_loop(self) -> list[Instruction]:
        """The instructions of the longest loop; none where there is no loop."""
        return sass.longest_loop(self.disassembly)

    def opcodes(self) -> collections.Counter[str]:
        """How often each opcode stands in the code."""
        return collections.Counter(one.opcode for one in self.instructions())

    def tensor_core(self) -> list[str]:
        """The tensor-core opcodes in it, e.g. `["HGMMA"]`."""
        return [name for name in _TENSOR_CORE if name in self.opcodes()]

    def occupancy(self, target: GpuTarget) -> float:
        """The share of a multiprocessor's warps that are resident when it is full of blocks."""
        warps = -(-self.threads // _WARP)
        registers = _round_up(self.registers * _WARP, _REGISTER_UNIT)
        warps_by_registers = target.registers_per_core // registers // _WARP_UNIT * _WARP_UNIT
        old = target.compute_capability == "7.5"
        shared = _round_up(self.shared_bytes + (0 if old else 1024), 256 if old else 128)
        blocks = min(
            _BLOCKS_PER_CORE[target.compute_capability],
            target.threads_per_core // (warps * _WARP),
            warps_by_registers // warps,
            target.shared_bytes_per_core // shared if shared else 1 << 30,
        )
        return blocks * warps * _WARP / target.threads_per_core


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def triton_kernels(
    function: Callable[..., Any], *args: Any, target: GpuTarget
) -> list[MachineCode]:
    """The kernels of a call of a `triton.py` implementation.

    Args:
        function: takes `*args` and `compute_capability`.
        *args: arrays, `jax.ShapeDtypeStruct`s or None.
        target: the GPU.

    Raises:
        NotImplementedError: it does not serve this.
    """
    major, minor = target.device.architecture
    function = functools.partial(function, compute_capability=10 * major + minor)
    with triton_call.recording() as records:
        jax.eval_shape(lambda args: function(*args), args)
    launches = triton_report.compile_launches(
        function, *args, compute_capability=10 * major + minor
    )
    return [
        MachineCode(
            kernel=one.kernel,
            architecture=re.search(r"\.target (\w+)", one.ptx)[1],
            blocks=one.grid[0] * one.grid[1] * one.grid[2],
            threads=one.num_warps * _WARP,
            registers=one.registers,
            spill_bytes=one.spill_bytes,
            shared_bytes=one.shared_bytes,
            disassembly=one.sass,
            constants=record.constants,
        )
        for one, record in zip(launches, records, strict=True)
    ]


def mosaic_kernels(
    function: Callable[..., Any], *args: Any, target: GpuTarget
) -> list[MachineCode]:
    """The Mosaic GPU kernels of any function of arrays.

    Args:
        function: what may be jitted.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
        target: the GPU.

    Raises:
        NotImplementedError: an implementation does not serve this.
        TargetError: the disassembler that comes with Triton is not installed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        module = lower_for(function, *args, target=target)
        _forget_compiled(module)
        compile_lowered(module, target, environment=_dumping_to(folder))
        stems = sorted(path.with_suffix("") for path in folder.glob("*.ptxas"))
        return [_read_dump(stem) for stem in stems]


def _dumping_to(folder: pathlib.Path) -> dict[str, str]:
    """Has Mosaic GPU write to `folder`, and find nvdisasm, which JAX's wheels do not bring."""
    if triton is None:
        raise TargetError('reading machine code takes nvdisasm: pip install "qlora-jax[cuda]"')
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    root = folder / "cuda"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "nvdisasm").symlink_to(tools / "nvdisasm")
    for entry in pathlib.Path(mosaic.cuda_root).glob("*"):
        if entry.name != "bin":
            (root / entry.name).symlink_to(entry)
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_CUDA_ROOT": str(root)}


def _forget_compiled(module: ir.Module) -> None:
    """Gives each kernel a new hash: one that this process compiled before would not be written."""

    def visit(op: ir.Operation) -> ir.WalkResult:
        config = "mhlo.backend_config"
        if op.name == "stablehlo.custom_call" and config in op.attributes:
            entries = op.attributes[config]
            if isinstance(entries, ir.DictAttr) and "kernel_hash" in entries:
                new = {entry.name: entry.attr for entry in entries}
                new["kernel_hash"] = ir.StringAttr.get(os.urandom(32))
                op.attributes[config] = ir.DictAttr.get(new)
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(visit)


def _read_dump(stem: pathlib.Path) -> MachineCode:
    log = stem.with_suffix(".ptxas").read_text()
    blocks, threads, dynamic, passes = _read_source(stem.with_suffix(".mlir-passes.log"))

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return MachineCode(
        kernel=re.search(r"entry function '(\w+)'", log)[1].removesuffix("_mosaic_gpu_kernel"),
        architecture=re.search(r"for '(\w+)'", log)[1],
        blocks=blocks,
        threads=threads,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=max(number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes stack frame")),
        shared_bytes=dynamic + number(r"(\d+) bytes smem"),
        disassembly=stem.with_suffix(".sass_ctrl").read_text(),
        passes=passes,
    )


def _read_source(log: pathlib.Path) -> tuple[int, int, int, int | None]:
    """Blocks, threads a block, dynamic shared memory, passes of the longest loop.

    From the first module in the log: all sizes are constants there.
    """
    constants: dict[str, int] = {}
    sizes: list[int] = []
    shared, open_loops, loops = 0, [], []
    with log.open() as lines:
        for number, line in enumerate(lines):
            if line.startswith("// -----// IR Dump") and number:
                break
            indent = len(line) - len(line.lstrip())
            if constant := re.match(r"\s*(%\S+) = arith\.constant (-?\d+) :", line):
                constants[constant[1]] = int(constant[2])
            elif "gpu.launch " in line:
                names = re.findall(r"%\S+ = (%[\w-]+)", line.split(" blocks(")[1])
                sizes = [constants[name] for name in names]
                if size := re.search(r"dynamic_shared_memory_size (%[\w-]+)", line):
                    shared = constants[size[1]]
            elif loop := re.search(r"scf\.for \S+ = (\S+) to (\S+) step (\S+)", line):
                open_loops.append((indent, number, [constants.get(loop[i]) for i in (1, 2, 3)]))
            elif open_loops and line.strip().startswith("}") and indent == open_loops[-1][0]:
                _, start, bounds = open_loops.pop()
                loops.append((number - start, bounds))
    passes = None
    if loops:
        first, last, step = max(loops, key=lambda loop: loop[0])[1]
        passes = None if None in (first, last, step) else -(-(last - first) // step)
    return math.prod(sizes[:3]), math.prod(sizes[3:6]), shared, passes
