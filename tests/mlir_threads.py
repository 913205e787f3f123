"""Runs inline Mosaic GPU code for the 128 threads of a warpgroup in NumPy.

A kernel's inline code builds MLIR operations for one thread. Here they are built into a function
of pointers and registers and then evaluated, each value an array with a row for every thread.
That checks which bytes each thread reads and where its results go, all but the machine itself.
"""

import re

import ml_dtypes
import numpy as np
from jax._src.interpreters import mlir
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

THREADS = 128
_DTYPES = {
    "i8": np.uint8,
    "i32": np.uint32,
    "index": np.int64,
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
}


def _dtype(ty):
    return np.dtype(_DTYPES[re.sub(r"vector<\d+x(\w+)>", r"\1", str(ty))])


def _columns(ty):
    match = re.match(r"vector<(\d+)x", str(ty))
    return int(match[1]) if match else 1


def _prmt(a, b, selector):
    source = np.concatenate([a.view(np.uint8), b.view(np.uint8)], axis=1)
    picks = [int(selector, 16) >> shift & 7 for shift in range(0, 16, 4)]
    return np.ascontiguousarray(source[:, picks]).view(np.uint32)


def _inline_asm(code, operands):
    if "%laneid" in code:
        return np.arange(THREADS, dtype=np.uint32)[:, None] % 32
    selector = re.fullmatch(r"prmt\.b32 \$0, \$1, \$2, (\w+);", code)[1]
    return _prmt(*operands, hex(int(selector, 0)))


_BINARY = {
    "arith.addi": np.add,
    "arith.muli": np.multiply,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.mulf": np.multiply,
}


def _evaluate(op, operands):
    name, attributes, result = op.name, op.attributes, op.results[0].type
    if name in _BINARY:
        return _BINARY[name](*operands).astype(_dtype(result))
    match name:
        case "arith.constant":
            value = ir.IntegerAttr(attributes["value"]).value
            dtype = _dtype(result)
            return np.full(
                (THREADS, 1), value % (1 << 8 * dtype.itemsize - (dtype.kind == "i")), dtype
            )
        case (
            "arith.index_cast" | "arith.index_castui" | "arith.truncf" | "llvm.trunc" | "llvm.zext"
        ):
            return operands[0].astype(_dtype(result))
        case "arith.bitcast" | "vector.bitcast" | "llvm.bitcast":
            return np.ascontiguousarray(operands[0]).view(_dtype(result))
        case "vector.extract":
            [i] = ir.DenseI64ArrayAttr(attributes["static_position"])
            return operands[0][:, i : i + 1]
        case "vector.insert":
            [i] = ir.DenseI64ArrayAttr(attributes["static_position"])
            vector = operands[1].copy()
            vector[:, i : i + 1] = operands[0]
            return vector
        case "vector.broadcast" | "vector.from_elements":
            assert len(operands) == _columns(result) or len(operands) == 1
            return np.concatenate(operands * (_columns(result) // len(operands)), axis=1)
        case "llvm.mlir.undef":
            return np.zeros((THREADS, _columns(result)), _dtype(result))
        case "llvm.getelementptr":
            (memory, start), index = operands
            size = _dtype(ir.TypeAttr(attributes["elem_type"]).value).itemsize
            return memory, start + size * index.astype(np.int64)
        case "llvm.load":
            memory, start = operands[0]
            dtype = _dtype(result)
            assert not (start % dtype.itemsize).any()
            return np.ascontiguousarray(memory[start + np.arange(dtype.itemsize)]).view(dtype)
        case "llvm.inline_asm":
            return _inline_asm(ir.StringAttr(attributes["asm_string"]).value, operands)
    raise NotImplementedError(op)


def _execute(types, arguments, build, monkeypatch):
    """The values that `build(*function_arguments)` returns, for arguments of these MLIR types."""
    with mlir.make_ir_context() as context, ir.Location.unknown():
        mgpu.dialect.register_dialect(context)
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            f = func.FuncOp("thread", ([ir.Type.parse(ty) for ty in ("i32", *types)], []))
        with ir.InsertionPoint(f.add_entry_block()):
            thread, *parameters = f.arguments
            monkeypatch.setattr(mgpu.utils, "thread_idx", lambda: thread)
            monkeypatch.setattr(mgpu.utils, "memref_ptr", lambda pointer: pointer)
            results = build(*parameters)
        values = dict(zip(parameters, arguments, strict=True))
        values[thread] = np.arange(THREADS, dtype=np.uint32)[:, None]
        for op in f.entry_block.operations:
            operands = [values[o] for o in op.operation.operands]
            values[op.operation.results[0]] = _evaluate(op.operation, operands)
        return [values[result] for result in results]


def _places(layout, shape, monkeypatch):
    """The rows and columns that each thread has of an array, register by register."""

    def build():
        return [i for index in layout.thread_idxs(shape) for i in index]

    indices = _execute((), (), build, monkeypatch)
    span = np.arange(layout.vector_length)
    return [(row, column + span) for row, column in zip(*[iter(indices)] * 2, strict=True)]


def _array(layout, shape, registers, monkeypatch):
    """The logical array of what all threads have."""
    result, owners = np.zeros(shape, registers[0].dtype), np.zeros(shape, int)
    for register, place in zip(registers, _places(layout, shape, monkeypatch), strict=True):
        result[place] = register
        np.add.at(owners, place, 1)
    assert (owners == 1).all(), "not every element is one thread's"
    return result


def run(emit, memories, registers=(), *, monkeypatch):
    """What `emit(*pointers, *registers)` returns, as logical arrays.

    Args:
        emit: builds operations for pointers and `FragmentedArray`s, returns `FragmentedArray`s.
        memories: arrays that the pointers point to.
        registers: pairs of a logical array and the layout that distributes it over the threads.
        monkeypatch: pytest's.
    """
    start, outputs = np.zeros((THREADS, 1), np.int64), []
    arguments = [(np.ascontiguousarray(m).reshape(-1).view(np.uint8), start) for m in memories]
    types, inputs = ["!llvm.ptr<3>"] * len(memories), []
    for array, layout in registers:
        layout, name = layout.to_mgpu(), {v: k for k, v in _DTYPES.items()}[array.dtype.type]
        pieces = [array[place] for place in _places(layout, array.shape, monkeypatch)]
        types += [f"vector<{layout.vector_length}x{name}>"] * len(pieces)
        arguments += pieces
        inputs.append((layout, layout.registers_shape(array.shape), len(pieces)))

    def build(*parameters):
        fragments, parameters = list(parameters[: len(memories)]), parameters[len(memories) :]
        for layout, shape, count in inputs:
            own, parameters = np.array(parameters[:count], object), parameters[count:]
            fragments.append(
                mgpu.FragmentedArray(
                    _registers=own.reshape(shape), _layout=layout, _is_signed=False
                )
            )
        outputs.extend(emit(*fragments))
        return [register for output in outputs for register in output.registers.flat]

    values = iter(_execute(types, arguments, build, monkeypatch))
    return [
        _array(o.layout, o.shape, [next(values) for _ in o.registers.flat], monkeypatch)
        for o in outputs
    ]
