"""Runs the PTX of a kernel in NumPy: what the compiler made of inline code, without a GPU.

Pallas's interpreter runs no inline code and knows no warps. PTX does, and that of a kernel without
branches is a list of some forty kinds of instructions. All threads of all programs go through it
together, an array element each, so that a barrier has nothing to wait for.

Words are kept as unsigned integers, as in a register; an operation looks at them as its type says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

WARPGROUP, WARP = 128, 32
_PARAMETERS = 1 << 20  # No argument starts at address 0.
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Machine:
    """Registers of all threads, global memory, and shared memory of each program."""

    def __init__(self, programs: int, arguments: Sequence[np.ndarray]) -> None:
        """Copies `arguments` into global memory, 256 bytes apart at least."""
        self.thread = np.arange(programs * WARPGROUP, dtype=np.uint32)
        self.registers: dict[str, np.ndarray] = {}
        self.places, end = [], _PARAMETERS
        for argument in arguments:
            self.places.append((end, argument))
            end += (argument.nbytes // 256 + 2) * 256
        self.memory = np.full(end, 0xA5, np.uint8)
        for start, argument in self.places:
            self.memory[start : start + argument.nbytes] = argument.reshape(-1).view(np.uint8)
        self.shared = np.full((programs, 1 << 16), 0xA5, np.uint8)

    def result(self, i: int) -> np.ndarray:
        """Argument `i` as it is now."""
        start, argument = self.places[i]
        flat = self.memory[start : start + argument.nbytes]
        return flat.view(argument.dtype).reshape(argument.shape)

    def read(self, operand: str, bits: int = 32) -> np.ndarray:
        """A register, a special register or a constant."""
        if operand == "%tid.x":
            return self.thread % WARPGROUP
        if operand == "%ctaid.x":
            return self.thread // WARPGROUP
        if operand.startswith("%"):
            return self.registers[operand]
        if operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand.startswith("__dynamic_shmem__"):
            value = 0
        else:
            value = int(operand, 0) % 2**bits
        return np.full(self.thread.size, value, _UNSIGNED[bits])

    def access(self, space: str, operand: str, size: int) -> tuple[np.ndarray, tuple]:
        """The memory and the index of `size` bytes a thread at `[register + offset]`."""
        base, _, offset = operand.strip("[]").partition("+")
        address = self.read(base, 64).astype(np.int64) + int(offset or 0)
        address = address[:, None] + np.arange(size)
        if space == "shared":
            return self.shared, (self.thread[:, None] // WARPGROUP, address)
        return self.memory, (address,)


def run(ptx: str, programs: int, arguments: Sequence[np.ndarray]) -> Machine:
    """Executes the one kernel in `ptx`.

    Args:
        ptx: text of a module.
        programs: of 128 threads each.
        arguments: the kernel's, in its order; outputs among them, to be read by `result`.

    Raises:
        NotImplementedError: an instruction that is not known here.
    """
    machine = Machine(programs, arguments)
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    body = re.sub(r"//[^\n]*|\$\w+:|\.loc[^\n]*|\.pragma[^\n]*", "", body)
    for statement in re.split(r";", body[1:]):
        statement = " ".join(statement.split())
        if statement == "ret":
            break
        if statement and not statement.startswith((".reg", ".shared", ".")):
            _execute(machine, statement)
    return machine


def _execute(machine: Machine, statement: str) -> None:
    name, _, rest = statement.partition(" ")
    operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\[\]{}]+", rest)]
    operands = [o for o in operands if o]
    parts = name.split(".")
    if parts[0] in ("bar", "elect", "fence"):
        for predicate in re.findall(r"%p\d+", rest):
            machine.registers[predicate] = machine.thread % WARP == 0
    elif parts[0] in ("ld", "st"):
        _move(machine, parts, operands)
    elif parts[0] == "mov" and "{" in rest:
        _split(machine, operands)
    else:
        bits = int(re.search(r"\d+$", parts[-1]).group()) if parts[-1][-1].isdigit() else 32
        inputs = [machine.read(o, 32 if "wide" in parts else bits) for o in operands[1:]]
        with np.errstate(all="ignore"):
            machine.registers[operands[0].split("|")[0]] = _compute(machine, parts, inputs)


def _move(machine: Machine, parts: list[str], operands: list[str]) -> None:
    if "param" in parts[1]:
        index = int(re.search(r"_param_(\d+)", operands[1]).group(1))
        start = machine.places[index][0]
        machine.registers[operands[0]] = np.full(machine.thread.size, start, np.uint64)
        return
    space = "shared" if "shared" in parts else "global"
    bits = int(re.search(r"\d+$", parts[-1]).group())
    address, value = operands[::-1] if parts[0] == "ld" else operands
    names = [n.strip() for n in value.strip("{}").split(",")]
    memory, index = machine.access(space, address, bits // 8 * len(names))
    if parts[0] == "ld":
        loaded = np.ascontiguousarray(memory[index]).view(_UNSIGNED[bits])
        for i, name in enumerate(names):
            # A narrow load goes to a wider register.
            wide = np.uint16 if name.startswith("%rs") else loaded.dtype
            machine.registers[name] = loaded[:, i].astype(wide)
    else:
        stored = np.stack([machine.read(n, bits).astype(_UNSIGNED[bits]) for n in names], axis=1)
        memory[index] = np.ascontiguousarray(stored).view(np.uint8)


def _split(machine: Machine, operands: list[str]) -> None:
    target, source = operands
    if target.startswith("{"):
        names = [n.strip() for n in target.strip("{}").split(",")]
        whole = machine.read(source)
        halves = whole.reshape(-1, 1).view(_UNSIGNED[whole.itemsize * 8 // len(names)])
        for i, name in enumerate(names):
            machine.registers[name] = halves[:, i].copy()
    else:
        names = [n.strip() for n in source.strip("{}").split(",")]
        parts = np.stack([machine.read(n) for n in names], axis=1)
        whole = _UNSIGNED[parts.itemsize * 8 * len(names)]
        machine.registers[target] = np.ascontiguousarray(parts).view(whole)[:, 0]


def _floats(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.float32)


def _words(floats: np.ndarray) -> np.ndarray:
    # A GPU knows one NaN, which is positive; x86 makes negative ones.
    return np.where(np.isnan(floats), np.uint32(0x7FFFFFFF), floats.view(np.uint32))


def _halves(values: list[np.ndarray], dtype) -> np.ndarray:
    high, low = (np.asarray(_floats(v).astype(dtype)).view(np.uint16) for v in values)
    return high.astype(np.uint32) << 16 | low


def _lanes(machine: Machine, index: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x[machine.thread // WARP * WARP + index]


def _compute(machine: Machine, parts: list[str], inputs: list[np.ndarray]) -> np.ndarray:
    x, *others = inputs
    lane = machine.thread % WARP
    match parts:
        case ["mov" | "cvta", *_]:
            return x
        case ["add", "f32"] | ["add", "rn", "f32"]:
            return _words(_floats(x) + _floats(others[0]))
        case ["sub", "rn", "f32"]:
            return _words(_floats(x) - _floats(others[0]))
        case ["mul", *_, "f32"]:
            return _words(_floats(x) * _floats(others[0]))
        case ["rcp", "rn", "f32"]:
            return _words(np.float32(1) / _floats(x))
        case ["setp", "ge", "f32"]:
            return _floats(x) >= _floats(others[0])
        case ["setp", "eq", _]:
            return x == others[0]
        case ["setp", "ne", _]:
            return x != others[0]
        case ["selp", _]:
            return np.where(others[1], x, others[0])
        case ["add", _]:
            return x + others[0]
        case ["sub", _]:
            return x - others[0]
        case ["mul", "wide", "u32"]:
            return x.astype(np.uint64) * others[0].astype(np.uint64)
        case ["mad", "lo", _]:
            return x * others[0] + others[1]
        case ["mul", "lo", _]:
            return x * others[0]
        case ["and", _]:
            return x & others[0]
        case ["or", _]:
            return x | others[0]
        case ["xor", _]:
            return x ^ others[0]
        case ["shl", _]:
            return x << others[0].astype(x.dtype)
        case ["shr", "u32" | "b32" | "u64"]:
            return x >> others[0].astype(x.dtype)
        case ["bfe", "u32"]:
            return x >> others[0] & (np.uint32(1) << others[1]) - np.uint32(1)
        case ["shf", "l", "wrap", "b32"]:
            n = others[1] & 31
            wide = others[0].astype(np.uint64) << 32 | x
            return (wide << n.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        case ["prmt", "b32"]:
            return _permuted(x, *others)
        case ["min", "u32"]:
            return np.minimum(x, others[0])
        case ["max" | "min", "s32"]:
            pick = np.maximum if parts[0] == "max" else np.minimum
            return pick(x.view(np.int32), others[0].view(np.int32)).view(np.uint32)
        case ["redux", "sync", "max", "s32"]:
            most = x.view(np.int32).reshape(-1, WARP).max(axis=1)
            return np.repeat(most, WARP).view(np.uint32)
        case ["shfl", "sync", mode, "b32"]:
            index, control = others[:2]
            segment, clamp = control >> 8 & 31, control & 31
            least, most = lane & segment, (lane & segment) | (clamp & ~segment)
            other = lane ^ index if mode == "bfly" else least | (index & 31 & ~segment)
            return _lanes(machine, np.where(other <= most, other, lane), x)
        case ["cvt", "f32", "bf16"]:
            return x.astype(np.uint32) << 16
        case ["cvt", "f32", "f16"]:
            return x.view(np.float16).astype(np.float32).view(np.uint32)
        case ["cvt", "rn", "bf16x2", "f32"]:
            return _halves(inputs, jnp.bfloat16)
        case ["cvt", "rn", "f16x2", "f32"]:
            return _halves(inputs, np.float16)
        case ["cvt", "u64", "u32"]:
            return x.astype(np.uint64)
        case ["cvt", "u32", "u16"]:
            return x.astype(np.uint32)
        case ["cvt", "u16", "u32"]:
            return x.astype(np.uint16)
    raise NotImplementedError(".".join(parts))


def _permuted(x: np.ndarray, y: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.stack([x, y], axis=1).view(np.uint8)
    result = np.zeros_like(x)
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = np.take_along_axis(pool, (nibble & 7)[:, None].astype(np.int64), axis=1)[:, 0]
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result
