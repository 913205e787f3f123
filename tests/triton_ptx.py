"""Runs the PTX that Triton makes of a kernel, in NumPy: all threads of a program in step.

Triton's interpreter executes a kernel's Python; between that and the GPU stand layouts, tensor-core
fragments, shared memory, and pipelined copies. They are all in the PTX. Here it is executed, an
array element a thread: barriers have nothing to wait for, a copy is complete when it is issued, and
a branch must be the same for all threads. So this finds wrong values, not races.

Registers hold bit patterns in uint64; every instruction looks at them as its type says.
"""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np

_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_FLOATS = {"f16": np.float16, "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.float32}
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_SHARED = 1 << 62  # Where shared memory starts, so that no global address is one of it.


def _dtype(name: str) -> np.dtype:
    if name == "pred":
        return np.dtype(np.uint8)
    if name in _FLOATS:
        return np.dtype(_FLOATS[name])
    return np.dtype((_SIGNED if name[0] == "s" else _UNSIGNED)[int(name[1:])])


def _parse(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """Instructions `(predicate, opcode, operands)` and where the labels stand."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("\n{") :])
    body = re.sub(r"(?<!\w)\.(reg|loc|pragma|file|section|shared|extern)[^;\n]*[;\n]", ";", body)
    program, labels = [], {}
    for piece in re.split(r"[;\n]", body):
        statement = piece.strip()
        if label := re.match(r"(\$\w+):", statement):
            labels[label[1]] = len(program)
            continue
        match = re.match(r"[{\s]*(@!?%?\w+)?\s*([a-z][\w.:]*)\s*(.*)", statement)
        if match:
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+", match[3])
            program.append((match[1], match[2].split("."), operands))
    return program, labels


class Program:
    """One program of the grid: registers of its threads, and shared memory."""

    def __init__(self, ptx: str, buffers: list[np.ndarray], threads: int) -> None:
        """`buffers` are the kernel's arguments; what they hold is read and written in place."""
        self.program, self.labels = _parse(ptx)
        self.threads = np.arange(threads, dtype=np.uint64)
        self.buffers = [b.reshape(-1).view(np.uint8) for b in buffers]
        self.starts = [(i + 1) << 40 for i in range(len(buffers))]
        self.shared = np.full(1 << 18, 0xA5, np.uint8)

    def run(self, program_id: tuple[int, int]) -> None:
        """Executes the kernel for one place in the grid."""
        self.registers = {
            "%tid.x": self.threads,
            "%ctaid.x": np.full_like(self.threads, program_id[0]),
            "%ctaid.y": np.full_like(self.threads, program_id[1]),
            "%lanemask_lt": (np.uint64(1) << self.threads % 32) - np.uint64(1),
        }
        counter = 0
        while counter < len(self.program):
            predicate, opcode, operands = self.program[counter]
            counter += 1
            active = np.ones(self.threads.size, bool)
            if predicate:
                active = self.registers[predicate.lstrip("@!")] != 0
                active = ~active if predicate[1] == "!" else active
            if opcode[0] in ("bra", "ret"):
                assert active.all() or not active.any(), "threads take different ways"
                if active.all():
                    counter = len(self.program) if opcode[0] == "ret" else self.labels[operands[0]]
            elif operands and (opcode[0] not in ("bar", "cp") or operands[0][0] == "["):
                getattr(self, "_" + opcode[0], self._arithmetic)(opcode, operands, active)

    # Operands.

    def get(self, operand: str, kind: str = "b64") -> np.ndarray:
        dtype = _dtype(kind)
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand.startswith("0f"):
            bits = np.full_like(self.threads, int(operand[2:], 16))
        elif operand.startswith("global_smem"):
            bits = np.full_like(self.threads, _SHARED)
        elif operand.startswith("0x") or re.fullmatch(r"-?\d+", operand):
            bits = np.full_like(self.threads, int(operand.rstrip("U"), 0) % 2**64)
        elif re.fullmatch(r"%[a-z]+\d+", operand):  # never written: its value must not matter
            bits = np.full_like(self.threads, 0xA5A5A5A5A5A5A5A5)
        else:
            raise KeyError(operand)
        return bits.astype(_UNSIGNED[8 * dtype.itemsize]).view(dtype)

    def put(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        value = np.ascontiguousarray(np.broadcast_to(value, self.threads.shape))
        value = value.astype(np.uint8) if value.dtype == bool else value
        bits = value.view(_UNSIGNED[8 * value.dtype.itemsize]).astype(np.uint64)
        old = self.registers.get(name, np.full_like(self.threads, 0xA5A5A5A5A5A5A5A5))
        self.registers[name] = np.where(active, bits, old)

    @staticmethod
    def names(operand: str) -> list[str]:
        return re.findall(r"[^{},\s]+", operand)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self.get(base) + np.uint64(int(offset or 0) % 2**64)

    def bytes_at(self, address: np.ndarray, active: np.ndarray):
        """Pairs of a buffer and, for the threads whose address lies in it, their index."""
        address = address & np.uint64(2**63 - 1)
        places = [(_SHARED, self.shared), *zip(self.starts, self.buffers, strict=True)]
        # Shared addresses are 32-bit numbers that start at zero.
        shared = address < 1 << 32
        for start, buffer in places:
            if buffer is self.shared:
                chosen, index = active & (shared | (address >= _SHARED)), address % (1 << 32)
            else:
                chosen, index = active & ~shared & (address >> 40 == start >> 40), address - start
            if chosen.any():
                yield buffer, chosen, index[chosen].astype(np.int64)

    def load(self, address: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        """uint8 [threads, size]; asserts that every byte lies inside its buffer."""
        out = np.full((self.threads.size, size), 0xA5, np.uint8)
        seen = np.zeros_like(active)
        for buffer, chosen, index in self.bytes_at(address, active):
            assert (index + size <= buffer.size).all() and (index % size == 0).all()
            out[chosen] = buffer[index[:, None] + np.arange(size)]
            seen |= chosen
        assert (seen == active).all(), "an address outside of every buffer"
        return out

    def store(self, address: np.ndarray, data: np.ndarray, active: np.ndarray) -> None:
        size = data.shape[1]
        for buffer, chosen, index in self.bytes_at(address, active):
            assert (index + size <= buffer.size).all() and (index % size == 0).all()
            buffer[index[:, None] + np.arange(size)] = data[chosen]

    # Instructions.

    def _ld(self, opcode, operands, active):
        if opcode[1] == "param":
            number = int(re.search(r"_param_(\d+)", operands[1])[1])
            start = self.starts[number] if number < len(self.starts) else 0
            return self.put(operands[0], np.full_like(self.threads, start), active)
        names, item = self.names(operands[0]), int(opcode[-1][1:]) // 8
        data = self.load(self.address(operands[1]), item * len(names), active)
        for i, name in enumerate(names):
            part = np.ascontiguousarray(data[:, i * item : (i + 1) * item])
            self.put(name, part.view(_UNSIGNED[8 * item])[:, 0], active)

    def _st(self, opcode, operands, active):
        parts = [self.get(n, opcode[-1]) for n in self.names(operands[1])]
        data = np.stack(parts, axis=1).view(np.uint8).reshape(self.threads.size, -1)
        self.store(self.address(operands[0]), data, active)

    def _cp(self, opcode, operands, active):
        size = int(operands[2], 0)
        kept = active
        if len(operands) > 3:  # how many bytes to read; the rest are zeros
            kept = active & (self.get(operands[3], "u32") > 0)
        data = np.zeros((self.threads.size, size), np.uint8)
        data[kept] = self.load(self.address(operands[1]), size, kept)[kept]
        self.store(self.address(operands[0]), data, active)

    def _ldmatrix(self, opcode, operands, active):
        assert active.all()
        names = self.names(operands[0])
        rows = self.load(self.address(operands[1]), 16, active).view(np.uint16)
        rows = rows.reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        for i, name in enumerate(names):
            matrix = rows[:, i].swapaxes(1, 2) if "trans" in opcode else rows[:, i]
            pairs = np.ascontiguousarray(matrix).view(np.uint32)  # warp, row, lane % 4
            self.put(name, pairs.reshape(-1), active)

    def _mma(self, opcode, operands, active):
        assert active.all() and opcode[3] == "m16n8k16"
        dtype = _FLOATS[opcode[7]]
        d, a, b, c = (self.names(o) for o in operands)

        def halves(names):
            words = np.stack([self.get(n, "b32") for n in names], axis=1)
            return words.view(dtype).astype(np.float32).reshape(-1, 8, 4, len(names), 2)

        # [warp, lane // 4, lane % 4, register, half] to [warp, row, k] and [warp, k, column].
        left = halves(a).reshape(-1, 8, 4, 2, 2, 2)  # the registers: k // 8, row // 8
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = halves(b).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        for i, name in enumerate(d):
            self.put(name, self.get(c[i], "f32") + np.ascontiguousarray(product[:, i]), active)

    def _stmatrix(self, opcode, operands, active):
        assert active.all()
        words = [self.get(n, "b32") for n in self.names(operands[1])]
        rows = np.zeros((self.threads.size // 32, 4, 8, 8), np.uint16)
        for i, word in enumerate(words):
            matrix = word.view(np.uint16).reshape(-1, 8, 8)  # warp, row, column
            rows[:, i] = matrix.swapaxes(1, 2) if "trans" in opcode else matrix
        # Lane 8 * i + j holds the address of row j of matrix i.
        used = self.threads % 32 < 8 * len(words)
        self.store(self.address(operands[0]), rows.view(np.uint8).reshape(-1, 16), used)

    def _shfl(self, opcode, operands, active):
        assert active.all() and opcode[2] in ("bfly", "idx") and operands[3] == "31"
        value, lane = self.get(operands[1], "b32"), self.get(operands[2], "b32") % 32
        lane = self.threads % 32 ^ lane if opcode[2] == "bfly" else lane
        self.put(operands[0], value[self.threads // 32 * 32 + lane], active)

    def _mov(self, opcode, operands, active):
        target, source = operands
        if target.startswith("{"):
            names = self.names(target)
            words = self.get(source, opcode[1])[:, None].view(_UNSIGNED[32 // len(names)])
            for i, name in enumerate(names):
                self.put(name, np.ascontiguousarray(words[:, i]), active)
        elif source.startswith("{"):
            names = self.names(source)
            parts = [self.get(n, f"b{32 // len(names)}") for n in names]
            self.put(target, np.stack(parts, axis=1).view(np.uint32)[:, 0], active)
        else:
            self.put(target, self.get(source, opcode[1]), active)

    def _cvt(self, opcode, operands, active):
        to, source = opcode[-2:]
        if to.endswith("x2"):  # the first source is the upper half
            dtype = _FLOATS[to[:-2]]
            high, low = (self.get(o, source).astype(dtype) for o in operands[1:])
            value = np.stack([low, high], axis=1).view(np.uint32)[:, 0]
        else:
            value = self.get(operands[1], source).astype(_dtype(to))
        self.put(operands[0], value, active)

    def _setp(self, opcode, operands, active):
        a, b = (self.get(o, opcode[-1]) for o in operands[1:])
        self.put(operands[0], _COMPARE[opcode[1]](a, b), active)

    def _selp(self, opcode, operands, active):
        a, b = (self.get(o, opcode[-1]) for o in operands[1:3])
        self.put(operands[0], np.where(self.get(operands[3], "pred") != 0, a, b), active)

    def _bfe(self, opcode, operands, active):
        value = self.get(operands[1], opcode[-1])
        place, length = (int(o, 0) for o in operands[2:])
        up = value.dtype.itemsize * 8 - place - length
        self.put(operands[0], value << up >> (up + place), active)

    def _prmt(self, opcode, operands, active):
        a, b, selector = (self.get(o, "b32") for o in operands[1:])
        data = np.stack([a, b], axis=1).view(np.uint8)
        nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        picked = np.take_along_axis(data, (nibbles & 7).astype(np.int64), axis=1)
        picked = np.where(nibbles & 8, np.where(picked & 128, 255, 0), picked).astype(np.uint8)
        self.put(operands[0], picked.view(np.uint32)[:, 0], active)

    def _lop3(self, opcode, operands, active):
        a, b, c = (self.get(o, "b32") for o in operands[1:4])
        result = np.zeros_like(a)
        for i in range(8):
            if int(operands[4], 0) >> i & 1:
                terms = (a if i & 4 else ~a, b if i & 2 else ~b, c if i & 1 else ~c)
                result |= terms[0] & terms[1] & terms[2]
        self.put(operands[0], result, active)

    def _arithmetic(self, opcode, operands, active):
        kind = opcode[-1]
        values = [self.get(o, kind) for o in operands[1:]]
        if "wide" in opcode:
            wide = {"s32": np.int64, "u32": np.uint64}[kind]
            values = [v.astype(wide) for v in values[:2]]
            if opcode[0] == "mad":
                values.append(self.get(operands[3]).view(wide))
        if opcode[0] in ("shl", "shr"):
            values[1] = self.get(operands[2], "u32").astype(values[0].dtype)
        if "ftz" in opcode:
            values = [_flush(v) for v in values]
        with np.errstate(all="ignore"):
            value = _OPERATIONS[opcode[0]](*values)
        value = _flush(value) if "ftz" in opcode else value
        self.put(operands[0], value, active)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(x * 0, x), x)


def _fma(a, b, c):
    # One rounding: the product of two float32 is exact in float64.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _logic(operation):
    return lambda *values: operation(*(v.view(f"u{v.dtype.itemsize}") for v in values))


_OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fma,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "min": np.minimum,
    "max": np.maximum,
    "and": _logic(lambda a, b: a & b),
    "or": _logic(lambda a, b: a | b),
    "xor": _logic(lambda a, b: a ^ b),
    "not": _logic(lambda a: ~a),
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}


def run(ptx: str, arrays: list[np.ndarray], *, grid: tuple[int, ...], num_warps: int) -> None:
    """Executes every program of `grid`; results are written into `arrays`.

    Args:
        ptx: of one kernel.
        arrays: inputs and then outputs, in the kernel's order; contiguous.
        grid: programs along each axis, the third one 1.
        num_warps: of a program.
    """
    assert math.prod(grid[2:]) == 1
    program = Program(ptx, arrays, 32 * num_warps)
    for y in range(grid[1]):
        for x in range(grid[0]):
            program.run((x, y))
