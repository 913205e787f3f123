"""Finds, on this GPU, each kernel's best tiles and the rows up to which a fused product is fastest.

    python scripts/bench.py --suite=gpu --part=tune

*Tiles.* A kernel with a keyword `tiles` has a frozen dataclass of whole numbers for it. From the
kernel's own choice, each number is doubled and halved, the best is kept, and so on until nothing
gets faster; what the dataclass or the kernel refuses does not count.

*Crossover.* For each weight shape, rows are doubled from 1. The crossover is the largest count up
to which a kernel that decodes inside the product is at least as fast as dequantizing first.

Results are data. With `--write_tuning` they replace this device's entry in
pallas_kernels/crossovers.json, which `pallas_kernels.devices.crossovers` reads, and in
pallas_kernels/tiles.json: a list, sorted, of objects with `device_kind`, `compute_capability`,
`operation`, `implementation`, `shape`, `rows`, `tiles` and the medians `seconds` and
`default_seconds`.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import bench_gpu_cases as cases
from bench_gpu_check import APIS
from bench_workers import ROOT

FUSED = ("mosaic_gpu", "triton")
CROSSOVERS = ROOT / "pallas_kernels" / "crossovers.json"
TILES = ROOT / "pallas_kernels" / "tiles.json"
_MOST_ROWS = 256
_ROUNDS = 3


def tune(suite: Any, worker: Any, facts: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Crossovers first, then tiles, the goals' cases before the others, until the time is over.

    Args:
        suite: the `bench_gpu.Suite`; its sizes, what failed its checks, and its `time_case`.
        worker: one that runs scripts/bench_gpu_ours.py.
        facts: its answer to {"facts": True}.
        deadline: of `time.monotonic()`.

    Returns:
        `crossover`, an entry of crossovers.json, and `tiles`, entries of tiles.json.
    """
    device = {key: facts.get(key) for key in ("device_kind", "compute_capability")}

    def seconds(case: cases.Case, name: str) -> float | None:
        row = suite.time_case(case, [("ours", name)], {"ours": worker})
        found = row["seconds"].get(name)
        return statistics.median(found) if found else None

    rows, shapes = [], list(suite.sizes.shapes)
    for shape in shapes:
        if time.monotonic() > deadline:
            break
        rows.append([*shape, crossover(shape, suite, seconds)])
    tiles = []
    for case, name in tile_cases(suite):
        if time.monotonic() > deadline:
            break
        question = {"default_tiles": [case["operation"], name]}
        start = worker.ask(question, timeout_s=60.0).get("tiles")
        if start is None:
            continue
        found = best_tiles(case, name, start, seconds, deadline)
        if found is not None:
            place = {key: case[key] for key in ("operation", "shape", "rows")}
            tiles.append(device | place | {"implementation": name} | found)
    suite.console.print(f"crossovers: {rows}; tiles of {len(tiles)} cases")
    return {"crossover": device | {"rows": rows}, "tiles": tiles}


def crossover(shape: tuple[int, int], suite: Any, seconds: Any) -> int:
    """Up to how many rows some fused product is at least as fast as dequantizing first."""
    names = [
        name
        for name in APIS["matmul"].IMPLEMENTATIONS
        if name in FUSED and ("matmul", name) not in suite.failed
    ]
    best, count = 0, 1
    while count <= _MOST_ROWS:
        case = {"operation": "matmul", "shape": list(shape), "rows": count}
        fused = [time for name in names if (time := seconds(case, name)) is not None]
        dense = seconds(case, "dequantize")
        if not fused or dense is None or min(fused) > dense:
            return best
        best, count = count, 2 * count
    return best


def tile_cases(suite: Any) -> Iterator[tuple[cases.Case, str]]:
    """Pairs of a case and a kernel whose tiles are to be found."""
    for case in cases.timing_cases(suite.sizes):
        if case["rows"] > _MOST_ROWS:
            continue
        for name in APIS[case["operation"]].IMPLEMENTATIONS:
            if name in FUSED and (case["operation"], name) not in suite.failed:
                yield case, name


def neighbours(tiles: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each whole number doubled and halved.

    >>> list(neighbours({"rows": 4, "pipelined": True}))
    [{'rows': 8, 'pipelined': True}, {'rows': 2, 'pipelined': True}]
    """
    for name, value in tiles.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield tiles | {name: 2 * value}
            if value >= 2:
                yield tiles | {name: value // 2}


def best_tiles(
    case: cases.Case, name: str, start: dict[str, Any], seconds: Any, deadline: float
) -> dict[str, Any] | None:
    """The fastest tiles within `_ROUNDS` steps of doubling or halving; None if nothing ran."""
    default = seconds(case, name)
    tried: dict[str, float] = {}

    def measure(tiles: dict[str, Any]) -> float:
        key = json.dumps(tiles)
        if key not in tried:
            tried[key] = seconds(case | {"tiles": tiles}, name) or float("inf")
        return tried[key]

    best = start
    for _ in range(_ROUNDS):
        around = [best, *neighbours(best)]
        ahead = min(around, key=lambda t: measure(t) if time.monotonic() < deadline else 1e9)
        if ahead == best:
            break
        best = ahead
    least = tried.get(json.dumps(best), float("inf"))
    if default is None or least == float("inf"):
        return None
    return {"tiles": best, "seconds": least, "default_seconds": default}


def write(found: dict[str, Any], folder: pathlib.Path = CROSSOVERS.parent) -> list[pathlib.Path]:
    """Puts what was found in the place of this device's entries; those of others stay.

    Args:
        found: from `tune`.
        folder: of the two files.

    Returns:
        The files written.
    """
    written = []
    entry = found["crossover"]
    for name, new in ((CROSSOVERS.name, [entry]), (TILES.name, found["tiles"])):
        path = folder / name
        kind = entry["device_kind"]
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        kept = [one for one in old if one["device_kind"] != kind]
        new = [one for one in new if one.get("rows") != []]
        if not new:
            continue
        lines = sorted(json.dumps(one, sort_keys=True) for one in kept + new)
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        written.append(path)
    return written
