"""NVIDIA's machine code (SASS) as nvdisasm prints it: instructions, blocks, loops.

Only as much of the language as it takes to find the main loop of a kernel. A *basic block* ends
with a branch or before a label. A *natural loop* is an edge from a block back to one that dominates
it, and everything on paths between the two: compilers place code that is seldom run, such as
waiting for a barrier, behind the end of a kernel, and a jump from there back into it is no loop.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SECTION = re.compile(r"^\s*\.section\s+\.text\.", re.MULTILINE)
_LINE = re.compile(
    r"^\s*(?P<label>\.L\w+):|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*)(?P<rest>[^;\n]*)"
)
# What waits for a barrier, or puts its thread to sleep in between.
_WAITING = {"SYNCS", "NANOSLEEP", "MOV", "IMAD", "BRA", "EXIT", "NOP"}
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: in bytes.
        predicated: whether it may be skipped.
        opcode: without modifiers, e.g. `"LDG"`.
        rest: modifiers and operands.
    """

    address: int
    predicated: bool
    opcode: str
    rest: str


class _Block(NamedTuple):
    instructions: list[Instruction]
    successors: list[int]


def instructions(text: str) -> list[Instruction]:
    """All instructions of all functions in a disassembly, padding too.

    >>> instructions("  /*0010*/   @!P0 LDG.E.128 R4, [R2] ;")
    [Instruction(address=16, predicated=True, opcode='LDG', rest='.E.128 R4, [R2] ')]
    """
    matches = (_LINE.search(line) for line in text.splitlines())
    return [_instruction(match) for match in matches if match and match["address"]]


def _instruction(match: re.Match[str]) -> Instruction:
    predicate = match["predicate"]
    predicated = predicate is not None and predicate not in ("PT", "UPT")
    return Instruction(int(match["address"], 16), predicated, match["opcode"], match["rest"])


def reachable(text: str) -> list[Instruction]:
    """What a warp can come through in the kernel, but for divergent warps and functions called."""
    blocks = _blocks(text)
    return _flatten(blocks, _visit(blocks, 0))


def longest_loop(text: str) -> list[Instruction]:
    """The instructions of the natural loop with the most of them; none where there is none.

    A loop that does nothing but wait is not taken for one.
    """
    blocks = _blocks(text)
    predecessors: dict[int, list[int]] = {}
    alive = _visit(blocks, 0)
    for source in alive:
        for target in blocks[source].successors:
            predecessors.setdefault(target, []).append(source)
    loops = [
        _loop(source, target, predecessors)
        for source in alive
        for target in blocks[source].successors
        # Dominated: without the target, the source cannot be reached.
        if source not in _visit(blocks, 0, without=target)
    ]
    found = [_flatten(blocks, loop) for loop in loops]
    work = [loop for loop in found if not {one.opcode for one in loop} <= _WAITING]
    return max(work, key=len, default=[])


def _loop(source: int, head: int, predecessors: dict[int, list[int]]) -> set[int]:
    body, waiting = {head}, [source]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += predecessors.get(block, [])
    return body


def _flatten(blocks: list[_Block], chosen: set[int]) -> list[Instruction]:
    found = [one for index in sorted(chosen) for one in blocks[index].instructions]
    return [one for one in found if one.opcode != "NOP"]


def _visit(blocks: list[_Block], start: int, without: int | None = None) -> set[int]:
    """The blocks that can be reached, if one of them is a wall."""
    seen, waiting = set(), [start]
    while waiting:
        block = waiting.pop()
        if block not in seen and block != without:
            seen.add(block)
            waiting += blocks[block].successors
    return seen


def _entry(text: str) -> str:
    """The part of a disassembly that is the kernel itself."""
    parts = _SECTION.split(text)
    return next((part for part in parts if "STO_CUDA_ENTRY" in part), text)


def _blocks(text: str) -> list[_Block]:
    code: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in _entry(text).splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        if match["label"]:
            if code[-1]:
                code.append([])
            labels[match["label"]] = len(code) - 1
            continue
        one = _instruction(match)
        code[-1].append(one)
        if one.opcode == "BRA" or one.opcode in _ENDS:
            code.append([])
    return [_Block(code[i], _successors(code, labels, i)) for i in range(len(code))]


def _successors(code: list[list[Instruction]], labels: dict[str, int], index: int) -> list[int]:
    following = [index + 1] if index + 1 < len(code) else []
    last = code[index][-1] if code[index] else None
    if last is None or (last.opcode != "BRA" and last.opcode not in _ENDS):
        return following
    if last.opcode in _ENDS or last.rest.startswith(".DIV"):
        return following if last.predicated or last.rest.startswith(".DIV") else []
    target = labels[re.search(r"\.L\w+", last.rest)[0]]
    # A branch also depends on a predicate among its operands: BRA P0, label; BRA.U UP0, label.
    conditional = last.predicated or re.match(r"\S*\s+!?U?P\d", last.rest) is not None
    return [target, *following] if conditional else [target]
