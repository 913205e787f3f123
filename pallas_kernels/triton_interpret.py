"""Runs Triton kernels in NumPy, in this process, without torch and without a GPU.

Triton ships an interpreter that executes a kernel's Python with NumPy arrays as blocks. Made for
`TRITON_INTERPRET=1` and CPU tensors of torch, it needs four things to serve here:

* arguments with `data_ptr()` and `dtype`: a NumPy array in a coat (`_Pointer`);
* `triton.jit` functions that were compiled lazily, not decorated under the variable, to be called
  by one another: for the time of a call `JITFunction.__call__` goes to the interpreter;
* bfloat16, which it stores as uint16: its conversion does not round ties to even and loses a
  carry into the exponent, and its dot multiplies the bit patterns. Both are done right here;
* inline PTX, which it refuses: the few instructions that our kernels use are executed here, so
  that the text itself is under test.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

try:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction
except ImportError:  # `triton_call` says what to install
    tl = interpreter = JITFunction = None
    GridExecutor = object

_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
    "uint8": "u8",
    "uint32": "u32",
}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The interpreter patches `triton.language` while it runs.
_LOCK = threading.Lock()


class _Pointer:
    """What the interpreter asks of a tensor, for a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = _DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class _Executor(GridExecutor):
    """Runs the grid on arrays that already lie on the host."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, *_):
        pass


def call(
    kernel: Any,
    arrays: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
) -> tuple[Array, ...]:
    """The outputs of `kernel`, executed by Triton's interpreter; works under `jax.jit`.

    What the kernel does not write is not zero: outputs start as NaN or 0xA5 bytes.
    """

    def run(*arrays):
        inputs = [np.ascontiguousarray(a) for a in arrays]
        outputs = [poisoned(o.shape, o.dtype) for o in out]
        pointers = [_Pointer(a) for a in (*inputs, *outputs)]
        with _LOCK, _patched():
            executor = _Executor(_rewritten(kernel), _names(kernel), grid)
            with np.errstate(all="ignore"):
                executor(*pointers, **constants)
        return tuple(outputs)

    return jax.pure_callback(run, tuple(out), *arrays)


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in which an element that nobody wrote shows up."""
    dtype = np.dtype(dtype)
    if dtype.kind == "u":
        return np.full(shape, 0xA5, dtype)
    return np.full(shape, np.nan, dtype)


def _rewritten(function: Any) -> Callable:
    return interpreter.InterpretedFunction(function.fn).rewrite()


def _names(function: Any) -> list[str]:
    return [p.name for p in function.params]


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    builder = interpreter.interpreter_builder
    methods = dict(
        cast_impl=_cast,
        create_fp_to_fp=lambda src, dst, rounding: _cast(src, dst),
        create_dot=_dot,
        create_inline_asm=_inline_asm,
    )
    original = JITFunction.__call__
    JITFunction.__call__ = lambda self, *args, **kwargs: _rewritten(self)(*args, **kwargs)
    vars(builder).update(methods)
    # Functions of Triton's own library reach the language by another module than kernels do.
    scope = interpreter._patch_lang(tl.standard.zeros.fn)
    try:
        yield
    finally:
        scope.restore()
        JITFunction.__call__ = original
        for name in methods:
            del vars(builder)[name]


def _numbers(handle: interpreter.TensorHandle) -> np.ndarray:
    """The values of a block; bfloat16 ones come as their bits."""
    if handle.dtype.scalar == tl.bfloat16:
        return np.ascontiguousarray(handle.data).view(_BFLOAT16)
    return handle.data


def _cast(src: interpreter.TensorHandle, dst_type: Any) -> interpreter.TensorHandle:
    scalar = dst_type.scalar
    if scalar == tl.bfloat16:
        data = _numbers(src).astype(np.float32).astype(_BFLOAT16).view(np.uint16)
    else:
        data = _numbers(src).astype(interpreter._get_np_dtype(scalar))
    return interpreter.TensorHandle(data, scalar)


def _dot(a, b, d, input_precision, max_num_imprecise_acc):
    left, right = (_numbers(h).astype(np.float32) for h in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


class _Results(list):
    """Several blocks that one statement gives."""

    get_result = list.__getitem__


def _inline_asm(asm, constraints, values, types, is_pure, pack):
    """Executes PTX for `pack` neighbouring elements at a time, all of them at once.

    Triton packs elements of less than 32 bits into registers and numbers the operands, results
    first, `$0`, `$1`, ...
    """
    shape = np.broadcast_shapes(*(v.data.shape for v in values))
    inputs = []
    for value in values:
        flat = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1, pack)
        inputs += list(flat.view(np.uint32).T)
    sizes = [pack * interpreter._get_np_dtype(t.scalar).itemsize // 4 for t in types]
    registers = {f"${sum(sizes) + i}": word for i, word in enumerate(inputs)}
    registers["%lanemask_lt"] = np.uint32(0x7FFFFFFF)
    _execute(asm, registers)
    results, first = [], 0
    for type_, size in zip(types, sizes, strict=True):
        groups = np.shape(inputs[0])
        words = [np.broadcast_to(registers[f"${first + i}"], groups) for i in range(size)]
        words = np.ascontiguousarray(np.stack(words, axis=1))
        data = words.view(interpreter._get_np_dtype(type_.scalar)).reshape(shape)
        results.append(interpreter.TensorHandle(data, type_.scalar))
        first += size
    return _Results(results)


def _execute(asm: str, registers: dict[str, np.ndarray]) -> None:
    asm = re.sub(r"\.reg [^;]*;|[{}]", "", asm)
    for statement in filter(None, map(str.strip, asm.split(";"))):
        predicate, opcode, operands = re.match(r"(?:@(\w+) )?(\S+) (.*)", statement).groups()
        target, *sources = map(str.strip, operands.split(","))
        words = [registers[s] if s in registers else _constant(s) for s in sources]
        result = np.asarray(_PTX[opcode](*words), np.uint32)
        if predicate is not None:
            result = np.where(registers[predicate], result, registers[target])
        registers[target] = result


def _constant(text: str) -> np.uint32:
    return np.uint32(int(text[2:], 16) if text.startswith("0f") else int(text, 0))


def _prmt(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _lop3(a, b, c, table):
    result = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            terms = [x if i >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
            result = result | terms[0] & terms[1] & terms[2]
    return result


def _multiply_flushing(a, b):
    a, b = (_flush(np.asarray(x, np.uint32).view(np.float32)) for x in (a, b))
    return _flush(a * b).view(np.uint32)


def _flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign, as `.ftz` asks."""
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(0, x), x).astype(
        np.float32
    )


_PTX: dict[str, Callable] = {
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "selp.f32": lambda a, b, p: np.where(p, a, b),
    "setp.gt.f32": lambda a, b: a.view(np.float32) > b.view(np.float32),
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.ftz.f32": _multiply_flushing,
}
