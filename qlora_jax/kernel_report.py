"""Every 4-bit kernel compiled for every target: what there is to compile, and what came out.

A *case* is one call of one operation: a format, a dtype, a shape. `compile_case` compiles it for a
target and answers with the machine code of its kernels, or with why there is none.

*Instructions a weight* is a static count, the price of decoding:

    instructions of the main loop * threads of a block / weights that a block decodes in one pass

in instructions of a lane, 32 of which are one of a warp. A kernel without a loop is counted as a
whole. Each instruction in the loop counts once, also what a branch skips in most passes (scales
that are decoded for several passes at a time) and the body of an inner loop: where there is the
former the figure is an upper bound, where there is the latter a lower one. `quantize` encodes, and
counts the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.dequantize_4bit.api import IMPLEMENTATIONS as DEQUANTIZE
from pallas_kernels.formats import NESTED_BLOCK_SIZE, num_blocks, plane_size
from pallas_kernels.matmul_4bit.api import IMPLEMENTATIONS as MATMUL
from pallas_kernels.quantize_4bit.api import IMPLEMENTATIONS as QUANTIZE
from qlora_jax.compile_only import CompilerError
from qlora_jax.machine_code import MachineCode, mosaic_kernels, triton_kernels
from qlora_jax.targets import GpuTarget, compile_for

OPERATIONS = ("quantize", "dequantize", "matmul", "matmul_transposed")
_FUNCTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "quantize": QUANTIZE,
    "dequantize": DEQUANTIZE,
    "matmul": {name: functions[0] for name, functions in MATMUL.items()},
    "matmul_transposed": {name: functions[1] for name, functions in MATMUL.items()},
}


def implementations(operation: str) -> tuple[str, ...]:
    """Those of an operation whose kernels are this project's.

    >>> "xla" in implementations("dequantize")
    False
    """
    return tuple(name for name in ("mosaic_gpu", "triton") if name in _FUNCTIONS[operation])


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: one of `OPERATIONS`.
        dtype: of the dense arrays.
        rows: of the left factor; 0 where there is none.
        shape: of the weight.
        quant_type: of the format.
        block_size: of the format.
        double_quant: whether absmax is in 8 bits.
        rank: of a low-rank update that is added to `matmul`, with a bias; 0 for neither.
    """

    operation: str
    dtype: str = "bfloat16"
    rows: int = 0
    shape: tuple[int, int] = (4096, 4096)
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    rank: int = 0

    def __str__(self) -> str:
        double = "double" if self.double_quant else ""
        rows = f"M={self.rows}" if self.rows else ""
        rank = f"rank={self.rank}" if self.rank else ""
        shape = "x".join(map(str, self.shape))
        parts = (shape, self.quant_type, str(self.block_size), double, self.dtype, rows, rank)
        return " ".join(part for part in (self.operation, *parts) if part)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    def arguments(self) -> tuple[Any, ...]:
        """Abstract arguments of every implementation."""
        array = jax.ShapeDtypeStruct
        dtype = jnp.dtype(self.dtype)
        if self.operation == "quantize":
            return (array(self.shape, dtype),)
        blocks = num_blocks(self.weights, self.block_size)
        codes = array((plane_size(self.weights, self.block_size),), jnp.uint8)
        packed = [codes, array((blocks,), jnp.float32), None, None]
        if self.double_quant:
            nested = -(-blocks // NESTED_BLOCK_SIZE)
            packed[1:] = array((blocks,), jnp.uint8), array((nested,), jnp.float32), array((), "f4")
        if not self.rows:
            return tuple(packed)
        out_features, in_features = self.shape
        columns = out_features if self.operation == "matmul_transposed" else in_features
        arrays = [array((self.rows, columns), dtype), *packed]
        if self.rank:
            sizes = (out_features,), (self.rows, self.rank), (self.rank, out_features)
            arrays += [array(size, dtype) for size in sizes]
        return tuple(arrays)

    def bind(self, implementation: str) -> Callable[..., Any]:
        """An implementation's function with this case's keywords."""
        static: dict[str, Any] = dict(quant_type=self.quant_type, block_size=self.block_size)
        if self.operation != "quantize":
            static["shape"] = self.shape
        if self.operation == "dequantize":
            static["dtype"] = jnp.dtype(self.dtype)
        function = functools.partial(_FUNCTIONS[self.operation][implementation], **static)
        return _with_epilogue(function) if self.rank else function

    def supported(self, implementation: str, target: GpuTarget) -> bool:
        """What `pallas_kernels.devices` declares."""
        operation = self.operation.removesuffix("_transposed") + "_4bit"
        return devices.supported(operation, implementation, target.device, jnp.dtype(self.dtype))


def _with_epilogue(matmul: Callable[..., Any]) -> Callable[..., Any]:
    def added(*arrays, **keywords):
        *packed, bias, xa, b = arrays
        return matmul(*packed, bias=bias, lora=(xa, b), **keywords)

    return added


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of a case.

    Attributes:
        kernels: that the call launches; none of `xla`, whose kernels are not this project's.
        declined: why the implementation does not serve the case, or None.
    """

    kernels: tuple[MachineCode, ...] = ()
    declined: str | None = None


def compile_case(case: Case, implementation: str, target: GpuTarget) -> Compiled:
    """Compiles one implementation of a case.

    Raises:
        CompilerError: it was lowered, and a compiler refused it.
        TargetError: nothing here compiles for GPUs.
    """
    function, arguments = case.bind(implementation), case.arguments()
    try:
        if implementation == "xla":
            compile_for(function, *arguments, target=target)
            return Compiled()
        read = {"mosaic_gpu": mosaic_kernels, "triton": triton_kernels}[implementation]
        return Compiled(tuple(read(function, *arguments, target=target)))
    except NotImplementedError as error:
        return Compiled(declined=str(error))


def weights_a_pass(case: Case, code: MachineCode) -> float | None:
    """Weights that a block decodes in one pass of its main loop, or at all if it has none.

    None where the kernel does not say.
    """
    if not code.main_loop():
        return case.weights / code.blocks
    if {"BN", "BK"} <= code.constants.keys():
        # Each of the warps, or groups of threads, that share the summed axis has a tile of bytes.
        parts = code.constants.get("WARPS") or code.constants.get("GROUPS", 1)
        return 2 * code.constants["BN"] * code.constants["BK"] * parts
    return case.weights / code.blocks / code.passes if code.passes else None


def instructions_a_weight(case: Case, code: MachineCode) -> float | None:
    """See the module's docstring."""
    weights = weights_a_pass(case, code)
    body = code.main_loop() or code.instructions()
    return None if weights is None else len(body) * code.threads / weights


def report_cases(target: GpuTarget, quant_type: str = "nf4") -> list[Case]:
    """The cases of the report: all operations, and the rows of decoding and of small batches."""
    # No implementation has bfloat16 products for sm_75.
    dtype = "float16" if target.device.architecture < (8, 0) else "bfloat16"
    case = functools.partial(Case, dtype=dtype, quant_type=quant_type)
    return [
        case("quantize"),
        case("dequantize"),
        *(case("matmul", rows=rows) for rows in (1, 4, 16, 64)),
        *(case("matmul_transposed", rows=rows) for rows in (1, 16, 64)),
    ]


def facts(case: Case, code: MachineCode, target: GpuTarget) -> dict[str, Any]:
    """What the report says about one kernel."""
    price = instructions_a_weight(case, code)
    return {
        "kernel": code.kernel,
        "architecture": code.architecture,
        "blocks": code.blocks,
        "threads": code.threads,
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "occupancy": code.occupancy(target),
        "instructions": len(code.instructions()),
        "loop_instructions": len(code.main_loop()),
        "instructions_a_weight": price and round(price, 2),
        "tensor_core": code.tensor_core(),
    }


def rows_for(
    case: Case, implementation: str, targets: Sequence[GpuTarget]
) -> Iterator[dict[str, Any]]:
    """One row for each kernel and target, or one that says why there is none.

    Args:
        case: what to compile.
        implementation: `"mosaic_gpu"` or `"triton"`.
        targets: of one compute capability: what is compiled for one is compiled for all.
    """
    try:
        compiled, failure = compile_case(case, implementation, targets[0]), None
    except CompilerError as error:
        compiled, failure = Compiled(), str(error)
    for target in targets:
        head = {
            "target": target.name,
            "compute_capability": target.compute_capability,
            "implementation": implementation,
            **dataclasses.asdict(case),
        }
        if failure is not None:
            yield {**head, "failed": failure}
        if compiled.declined is not None:
            yield {**head, "declined": compiled.declined}
        for code in compiled.kernels:
            yield {**head, **facts(case, code, target)}
