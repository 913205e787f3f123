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


def run(emit, memories, registers=(), *, monkeypatch):
    """What `emit(*pointers, *registers)` returns, as logical arrays.

    Args:
        emit: builds operations for pointers and `FragmentedArray`s, returns `FragmentedArray`s.
        memories: arrays that the pointers point to.
        registers: pairs of a logical array and the layout that distributes it over the threads.
        monkeypatch: pytest's.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown():
        mgpu.dialect.register_dialect(context)
        module = ir.Module.create()
        pointer, i32 = ir.Type.parse("!llvm.ptr<3>"), ir.IntegerType.get_signless(32)
        arrays, layouts = [r[0] for r in registers], [r[1].to_mgpu() for r in registers]
        vectors, shapes = [], []
        for array, layout in zip(arrays, layouts, strict=True):
            shapes.append(layout.registers_shape(array.shape))
            element = mgpu.utils.dtype_to_ir_type(array.dtype)
            ty = ir.VectorType.get((layout.vector_length,), element)
            vectors += [ty] * int(np.prod(shapes[-1]))
        with ir.InsertionPoint(module.body):
            f = func.FuncOp("thread", ([i32] + [pointer] * len(memories) + vectors, []))
        values = {}
        with ir.InsertionPoint(f.add_entry_block()):
            thread, *arguments = f.arguments
            monkeypatch.setattr(mgpu.utils, "thread_idx", lambda: thread)
            monkeypatch.setattr(mgpu.utils, "memref_ptr", lambda pointer: pointer)
            places = [
                [list(i) for i in layout.thread_idxs(array.shape)]
                for array, layout in zip(arrays, layouts, strict=True)
            ]
            pointers, rest = arguments[: len(memories)], arguments[len(memories) :]
            inputs = []
            for shape, layout in zip(shapes, layouts, strict=True):
                count = int(np.prod(shape))
                regs, rest = np.array(rest[:count], object).reshape(shape), rest[count:]
                inputs.append(
                    mgpu.FragmentedArray(_registers=regs, _layout=layout, _is_signed=False)
                )
            outputs = emit(*pointers, *inputs)
            output_places = [[list(i) for i in o.layout.thread_idxs(o.shape)] for o in outputs]
            func.ReturnOp([])
        values[thread] = np.arange(THREADS, dtype=np.uint32)[:, None]
        for pointer, memory in zip(pointers, memories, strict=True):
            flat = np.ascontiguousarray(memory).reshape(-1).view(np.uint8)
            values[pointer] = flat, np.zeros((THREADS, 1), np.int64)
        pending = list(zip(inputs, arrays, places, strict=True))

        def feed():
            for fragments, array, indices in pending:
                for register, index in zip(fragments.registers.flat, indices, strict=True):
                    row, column = (values[i] for i in index)
                    span = np.arange(fragments.layout.vector_length)
                    values[register] = array[row, column + span]
            pending.clear()

        known = {i for _, _, indices in pending for index in indices for i in index}
        for op in f.entry_block.operations:
            if op.operation.name == "func.return":
                break
            if pending and all(i in values for i in known):
                feed()
            operands = [values[o] for o in op.operation.operands]
            values[op.operation.results[0]] = _evaluate(op.operation, operands)
        results = []
        for output, indices in zip(outputs, output_places, strict=True):
            first = values[output.registers.flat[0]]
            result, seen = np.zeros(output.shape, first.dtype), np.zeros(output.shape, int)
            for register, index in zip(output.registers.flat, indices, strict=True):
                row, column = (values[i] for i in index)
                span = column + np.arange(output.layout.vector_length)
                result[row, span] = values[register]
                np.add.at(seen, (np.broadcast_to(row, span.shape), span), 1)
            assert (seen == 1).all(), "not every element is one thread's"
            results.append(result)
        return results
