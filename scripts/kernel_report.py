"""Prints what the machine code of every 4-bit kernel costs, on a machine without a GPU.

    python scripts/kernel_report.py
    python scripts/kernel_report.py --target=all --json=kernels.json

Each kernel is compiled for the target. The columns: registers of a thread, bytes it spills, KiB of
shared memory and threads of a block, occupancy of a multiprocessor, instructions of the kernel,
instructions of a lane for each weight (qlora_jax/kernel_report.py says how they are counted), and
tensor-core instructions. Nothing is timed. It needs pip install "qlora-jax[cuda]", and ends with
code 1 if a kernel does not compile or spills.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line, kernel_report
from qlora_jax.errors import ConfigError
from qlora_jax.targets import TARGETS, GpuTarget, find_target

_TARGET = flags.DEFINE_string("target", "h100", f"all, or one of {', '.join(TARGETS)}")
_OPERATION = flags.DEFINE_enum("operation", "all", ["all", *kernel_report.OPERATIONS], "which")
_QUANT_TYPE = flags.DEFINE_enum("quant_type", "nf4", ["nf4", "fp4", "int4"], "format of the codes")
_JSON = flags.DEFINE_string("json", None, "file to write the rows to as well")

# Narrow, to fit a terminal of 80 columns; the docstring says what they are.
_COLUMNS = "kernel|by|regs|spill|smem|thr|occ|instr|/weight|tensor".split("|")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "triton")


def by_capability(names: list[str]) -> dict[str, list[GpuTarget]]:
    """Targets that the same machine code runs on, together."""
    groups = collections.defaultdict(list)
    for target in map(find_target, names):
        groups[target.compute_capability].append(target)
    return dict(sorted(groups.items()))


def rows(targets: list[GpuTarget], operations: list[str], quant_type: str) -> Iterator[dict]:
    """The report's rows for targets of one compute capability, as they come."""
    for case in kernel_report.report_cases(targets[0], quant_type):
        if case.operation in operations:
            for implementation in kernel_report.implementations(case.operation):
                yield from kernel_report.rows_for(case, implementation, targets)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    name = "transposed" if row["operation"] == "matmul_transposed" else row["operation"]
    head = [
        f"{name} M={row['rows']}" if row["rows"] else name,
        row["implementation"].removesuffix("_gpu"),
    ]
    if "registers" not in row:
        return head + ["-"] * (len(_COLUMNS) - len(head))
    price = row["instructions_a_weight"]
    return [
        *head,
        str(row["registers"]),
        str(row["spill_bytes"]),
        f"{row['shared_bytes'] / 1024:.1f}",
        str(row["threads"]),
        f"{row['occupancy']:.0%}",
        str(row["instructions"]),
        "?" if price is None else f"{price:.2f}",
        " ".join(row["tensor_core"]) or "no",
    ]


def print_table(found: list[dict[str, Any]], targets: list[GpuTarget], console: Console) -> None:
    """One table, and under it why something is missing in it."""
    names = ", ".join(target.name for target in targets)
    title = f"{names} (compute capability {targets[0].compute_capability})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        left = name in ("kernel", "by", "tensor")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    notes: dict[str, None] = {}
    for row in (row for row in found if row["target"] == targets[0].name):
        table.add_row(*cells(row))
        for kind in ("declined", "failed"):
            if kind in row:
                notes[f"{row['implementation']} {row['operation']} {kind}: {row[kind]}"] = None
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    console.print()


def main() -> int:
    """Compiles, prints, writes."""
    names = list(TARGETS) if _TARGET.value == "all" else [_TARGET.value]
    groups = by_capability(names)
    path = None if _JSON.value is None else pathlib.Path(_JSON.value)
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json={path}: there is no folder {path.parent}")
    operations = list(kernel_report.OPERATIONS)
    if _OPERATION.value != "all":
        operations = [_OPERATION.value]
    # The compiler needs no GPU, and must not take the memory of one.
    jax.config.update("jax_platforms", "cpu")
    console, progress = Console(), Console(stderr=True)
    found: list[dict[str, Any]] = []
    for targets in groups.values():
        for row in rows(targets, operations, _QUANT_TYPE.value):
            found.append(row)
            if sys.stderr.isatty():
                progress.print(f"{row['target']} {row['operation']} {row['implementation']}")
        print_table(found, targets, console)
    if path is not None:
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        path.write_text(json.dumps({"versions": versions, "kernels": found}, indent=1) + "\n")
    return int(any("failed" in row or row.get("spill_bytes") for row in found))


if __name__ == "__main__":
    command_line.run(main)
