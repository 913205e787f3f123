"""Compiles the Triton kernels of a call for a GPU that is not there, and reads the machine code.

Triton brings its own `ptxas` and `nvdisasm`: registers, spills, shared memory and the instructions
of every kernel are facts that any machine can find.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import Record, recording

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    triton = None

_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "uint8": "*u8",
    "uint32": "*u32",
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[^;]*;")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One compiled kernel of a call.

    Attributes:
        kernel: name of the Triton function.
        grid: programs along each axis.
        num_warps: of a program.
        num_stages: depth of the software pipeline.
        registers: of a thread.
        spill_bytes: local memory of a thread; 0 where nothing is spilled.
        shared_bytes: shared memory of a program.
        ptx: as Triton gives it.
        sass: the machine code, one instruction a line.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    sass: str

    def instructions(self) -> collections.Counter[str]:
        """How often each opcode, without its modifiers, stands in the machine code."""
        found = collections.Counter(_INSTRUCTION.findall(self.sass))
        return collections.Counter({k: n for k, n in found.items() if k != "NOP"})


def compile_launches(function: Callable, *args: Any, compute_capability: int) -> list[Launch]:
    """The kernels that `function(*args, compute_capability=...)` launches, compiled.

    Args:
        function: an implementation in a `triton.py`, with its keywords bound by `partial`.
        args: arrays or `jax.ShapeDtypeStruct`s, or None.
        compute_capability: 75, 80, 86, 89 or 90.

    Raises:
        NotImplementedError: the implementation does not serve this input on this target.
    """
    with recording() as records:
        jax.eval_shape(lambda args: function(*args, compute_capability=compute_capability), args)
    return [compile_record(record) for record in records]


def compile_record(record: Record) -> Launch:
    """Compiles one launch that was recorded."""
    names = [p.name for p in record.kernel.params]
    types = [_TYPES[jnp.dtype(a.dtype).name] for a in record.arrays]
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(record.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    compiled = triton.compile(
        ASTSource(record.kernel, signature, dict(record.constants), aligned),
        target=GPUTarget("cuda", record.compute_capability, 32),
        options=dict(record.options),
    )
    sass, usage = _read(compiled.asm["cubin"])
    grid = (*record.grid, 1, 1)[:3]
    return Launch(
        kernel=record.kernel.__name__,
        grid=grid,
        num_warps=record.options["num_warps"],
        num_stages=record.options["num_stages"],
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        # What Triton asks for at launch is not in the file.
        shared_bytes=usage["SHARED"] + compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def _read(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Disassembly, and resources by the names that `cuobjdump` gives them."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(tool: str, option: str) -> str:
            command = [str(tools / tool), option, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        sass = output("nvdisasm", "-c")
        usage = output("cuobjdump", "-res-usage")
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return sass, found
