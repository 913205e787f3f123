"""The one door between JAX and the Triton kernels: launch, interpret or record.

jax-triton is optional (the `cuda` extra). Without it this module still imports, `jit` leaves the
kernels as plain Python functions, and the first call says what to install.

Every launch goes through `launch`, which does one of three things:

* on a GPU it calls jax-triton, for the compute capability of the target and not of the machine
  that compiles;
* with `interpret=True` it runs the kernel's Python in NumPy (`triton_interpret`);
* inside `recording()` it also writes down what was launched, which is how `triton_report` compiles
  a whole call for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import devices, triton_interpret

try:
    import jax_triton
    import triton
    import triton.language as tl
    from jax_triton import triton_lib
except ImportError:
    jax_triton = triton = tl = None
else:
    # The rule of jax-triton 0.4.1 for dead code has the signature of JAX before 0.12. JAX's default
    # rule, a call that nobody reads is dropped, serves every version.
    triton_lib.pe.dce_rules.pop(triton_lib.triton_kernel_call_p, None)

# T4, A100, RTX 30 and A6000, RTX 40 and L4, H100. Anything newer runs what sm_90 runs.
COMPUTE_CAPABILITIES = (75, 80, 86, 89, 90)
# PTX of the version that CUDA 12.4 reads: by default Triton writes the newest that its own ptxas
# knows (9.4 for sm_90), and XLA's assembler (9.0 in jaxlib 0.11.2 and 0.12.0) refuses it.
PTX_VERSION = 84


def jit(kernel: Callable) -> Any:
    """`triton.jit`, or the function itself where Triton is not installed."""
    return kernel if triton is None else triton.jit(kernel)


@dataclasses.dataclass(frozen=True)
class Record:
    """One launch: enough to compile it again.

    Attributes:
        kernel: the `triton.jit` function.
        arrays: shape and dtype of the arguments and then of the results, in the kernel's order.
        constants: the `constexpr` arguments.
        grid: programs along each axis.
        options: of Triton's compiler.
        compute_capability: 75, 80, 86, 89 or 90.
    """

    kernel: Any
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    constants: Mapping[str, Any]
    grid: tuple[int, ...]
    options: Mapping[str, Any]
    compute_capability: int


_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "triton_records", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Record]]:
    """Collects the launches that are traced inside."""
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def resolve_target(
    compute_capability: int | None, interpret: bool, dtypes: Sequence[jnp.dtype]
) -> int:
    """The compute capability to compile for, after checking that it serves `dtypes`.

    Args:
        compute_capability: 75 for 7.5 and so on; None asks `devices.current_target()`.
        interpret: whether the kernel runs in NumPy, where nothing is compiled.
        dtypes: floating dtypes that the kernel reads or writes.

    Raises:
        NotImplementedError: Triton is not installed, there is no NVIDIA GPU, it is older than
            sm_75, or it has no bfloat16 (sm_75).
    """
    if triton is None:
        raise NotImplementedError("Triton kernels need jax-triton: pip install qlora_jax[cuda]")
    if compute_capability is None and not interpret:
        text = devices.current_target().compute_capability
        compute_capability = None if text is None else int(text.replace(".", ""))
    if interpret:
        compute_capability = compute_capability or COMPUTE_CAPABILITIES[-1]
    if compute_capability is None or compute_capability < COMPUTE_CAPABILITIES[0]:
        raise NotImplementedError(f"Triton needs an NVIDIA GPU from sm_75, {compute_capability=}")
    if compute_capability < 80 and jnp.bfloat16 in dtypes:
        raise NotImplementedError(f"no bfloat16 with {compute_capability=}: use float16")
    return max(c for c in COMPUTE_CAPABILITIES if c <= compute_capability)


def launch(
    kernel: Any,
    arrays: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    compute_capability: int,
    interpret: bool,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = False,
    **constants: Any,
) -> tuple[Array, ...]:
    """Runs `kernel(*arrays, *out, **constants)` and returns what it wrote to `out`.

    Args:
        kernel: made by `jit`; parameters: inputs, outputs, then constexprs.
        arrays: inputs.
        out: shapes and dtypes of the outputs; the kernel writes every element.
        grid: programs along each axis.
        compute_capability: from `resolve_target`.
        interpret: run in NumPy on the host.
        num_warps: of a program.
        num_stages: depth of the software pipeline of its loops.
        enable_fp_fusion: let the compiler contract a product and a sum into one rounding.
        **constants: the constexpr parameters.
    """
    options = dict(
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=enable_fp_fusion,
        ptx_version=PTX_VERSION,
    )
    records = _records.get()
    if records is not None:
        avals = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*arrays, *out))
        records.append(Record(kernel, avals, constants, grid, options, compute_capability))
    if interpret:
        return triton_interpret.call(kernel, arrays, out, grid=grid, constants=constants)
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=tuple(out),
        grid=grid,
        name=kernel.__name__,
        compute_capability=compute_capability,
        backend_options=options,
        **constants,
    )
