"""Finds, on this GPU, each kernel's best tiles and the rows up to which a fused product is fastest.

    python scripts/bench.py --suite=gpu --part=tune

*Tiles.* A kernel with a keyword `tiles` has a frozen dataclass of whole numbers for it. From the
dataclass's defaults, each number is doubled and halved, the best is kept, and so on until nothing
gets faster; what the dataclass or the kernel refuses does not count, nor does what is fast and
wrong. Beside the result stands the
time of what the kernel chooses by itself.

*Crossover.* For each weight shape, rows are doubled from 1. The crossover is the largest count up
to which a kernel that decodes inside the product is at least as fast as dequantizing first.

Results are data. With `--write_tuning` they replace this device's entry in
pallas_kernels/crossovers.json, which `pallas_kernels.tuning` reads, and in
pallas_kernels/tiles.json: a list, sorted, of objects with `device_kind`, `compute_capability`,
`operation`, `implementation`, `shape`, `rows`, `tiles` and the medians `seconds` and
`default_seconds`.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import bench_gpu_cases as cases
from bench_gpu_check import APIS
from bench_workers import ROOT, WorkerError

FUSED = ("mosaic_gpu", "triton")
CROSSOVERS = ROOT / "pallas_kernels" / "crossovers.json"
TILES = ROOT / "pallas_kernels" / "tiles.json"
_MOST_ROWS = 256
_ROUNDS = 4


class Stopwatch:
    """Median seconds of cases of ours, compiled several at once."""

    def __init__(self, suite: Any, worker: Any):
        """Args: suite: the `bench_gpu.Suite`; worker: of scripts/bench_gpu_ours.py."""
        self._suite, self._worker = suite, worker

    def compile(self, pairs: list[tuple[cases.Case, str]]) -> None:
        """Compiles pairs of a case and an implementation before they are timed."""
        self._suite.compile(self._worker, pairs)

    def seconds(self, case: cases.Case, name: str) -> float | None:
        """The median call; None where the implementation refuses or fails."""
        row = self._suite.time_case(case, [("ours", name)], {"ours": self._worker})
        found = row["seconds"].get(name)
        return statistics.median(found) if found else None

    def right(self, case: cases.Case, name: str, tiles: dict[str, Any]) -> bool:
        """Whether the kernel gives the right result when it is cut so."""
        format_ = {"quant_type": "nf4", "double_quant": True, "block_size": 64, "dtype": "bfloat16"}
        chosen = {"implementation": name, "tiles": tiles, "epilogue": False}
        try:
            answer = self._worker.ask({"check": case | format_ | chosen}, timeout_s=60.0)
        except WorkerError:
            return False
        return answer.get("verdict") == "ok"

    def default_tiles(self, operation: str, name: str) -> dict[str, Any] | None:
        """A kernel's tiles as its dataclass has them; None where it has none."""
        try:
            question = {"default_tiles": [operation, name]}
            return self._worker.ask(question, timeout_s=60.0).get("tiles")
        except WorkerError:
            return None


def tune(suite: Any, worker: Any) -> dict[str, Any]:
    """Crossovers first, then tiles, the goals' cases before the others, until the time is over.

    Args:
        suite: the `bench_gpu.Suite`: its sizes and facts, what failed, and its `time_case`.
        worker: one that runs scripts/bench_gpu_ours.py.

    Returns:
        `crossover`, an entry of crossovers.json, and `tiles`, entries of tiles.json.
    """
    device = {key: suite.facts["ours"].get(key) for key in ("device_kind", "compute_capability")}
    watch, rows, tiles = Stopwatch(suite, worker), [], []
    fused = [
        name
        for name in APIS["matmul"].IMPLEMENTATIONS
        if name in FUSED and ("matmul", name) not in suite.failed
    ]
    for shape in suite.sizes.shapes if fused else ():
        if suite.left() > 0:
            rows.append([*shape, crossover(shape, fused, watch)])
    for case, name in tile_cases(suite):
        if suite.left() < 0:
            break
        start = watch.default_tiles(case["operation"], name)
        found = start and best_tiles(case, name, start, watch, suite.left)
        if found:
            place = {key: case[key] for key in ("operation", "shape", "rows")}
            tiles.append(device | place | {"implementation": name} | found)
    suite.console.print(f"crossovers: {rows}; tiles of {len(tiles)} cases")
    return {"crossover": device | {"rows": rows}, "tiles": tiles}


def crossover(shape: tuple[int, int], fused: list[str], watch: Any) -> int:
    """Up to how many rows some fused product is at least as fast as dequantizing first.

    Args:
        shape: of the weight.
        fused: names of the fused implementations.
        watch: a `Stopwatch`.
    """
    counts = [1 << i for i in range(_MOST_ROWS.bit_length())]
    trials = [{"operation": "matmul", "shape": list(shape), "rows": count} for count in counts]
    watch.compile([(case, name) for case in trials for name in (*fused, "dequantize")])
    best = 0
    for case in trials:
        times = [time for name in fused if (time := watch.seconds(case, name)) is not None]
        dense = watch.seconds(case, "dequantize")
        if not times or dense is None or min(times) > dense:
            break
        best = case["rows"]
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
    case: cases.Case, name: str, start: dict[str, Any], watch: Any, left: Callable[[], float]
) -> dict[str, Any] | None:
    """The fastest right tiles within `_ROUNDS` steps of doubling or halving; None without any.

    Args:
        case: what is timed.
        name: of the implementation.
        start: the first tiles.
        watch: a `Stopwatch`.
        left: how many seconds are left; a round that has begun is finished.
    """
    tried: dict[str, float] = {}
    right: dict[str, bool] = {}
    best, default = start, watch.seconds(case, name)

    def fastest(around: list[dict[str, Any]]) -> dict[str, Any]:
        for tiles in sorted(around, key=lambda tiles: tried[json.dumps(tiles)]):
            key = json.dumps(tiles)
            if tried[key] < float("inf") and key not in right:
                right[key] = watch.right(case, name, tiles)
            if right.get(key):
                return tiles
        return best

    for _ in range(_ROUNDS):
        around = [best, *neighbours(best)]
        new = [tiles for tiles in around if json.dumps(tiles) not in tried]
        watch.compile([(case | {"tiles": tiles}, name) for tiles in new])
        for tiles in new:
            found = watch.seconds(case | {"tiles": tiles}, name)
            tried[json.dumps(tiles)] = float("inf") if found is None else found
        before, best = best, fastest(around)
        if best == before or left() < 0:
            break
    if default is None or not right.get(json.dumps(best)):
        return None
    return {"tiles": best, "seconds": tried[json.dumps(best)], "default_seconds": default}


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
