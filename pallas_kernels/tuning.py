"""What was measured on GPUs, as data: the rows up to which a fused product is used, and tiles.

`scripts/bench.py --suite=gpu --part=tune --write_tuning` writes both files on a device; nobody else
needs one. A device that was not measured takes the crossovers of the nearest one that was, and the
tiles of one with the same compute capability. Before anything is measured there are no files, and
every kernel cuts its work by its own rule.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels.devices import Target, current_target

# Before anything is measured: the fused kernels take up to 64 rows, and published measurements on
# H100s see dequantize + cuBLAS win above about that.
_UNMEASURED_ROWS = 64
_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Up to how many rows of `x` the fused product is faster than dequantize + dense product.

    Attributes:
        device_kind: where it was measured.
        compute_capability: of that device.
        rows: by `(out_features, in_features)`.
    """

    device_kind: str
    compute_capability: str
    rows: Mapping[tuple[int, int], int]

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows.values()) < 0:
            raise ValueError(f"{self.rows=}: expected a count of rows for one shape or more")

    def nearest(self, shape: tuple[int, int]) -> int:
        """The rows of the measured shape that is nearest in size."""
        size = shape[0] * shape[1]
        return self.rows[min(self.rows, key=lambda s: abs(s[0] * s[1] - size))]


def _read(name: str) -> list[dict[str, Any]]:
    path = _FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


@functools.cache
def crossovers() -> tuple[Crossover, ...]:
    """The entries of `crossovers.json`, one a device."""
    return tuple(
        Crossover(
            entry["device_kind"],
            entry["compute_capability"],
            {(n, k): rows for n, k, rows in entry["rows"]},
        )
        for entry in _read("crossovers.json")
    )


def fused_rows(shape: tuple[int, int], target: Target) -> int:
    """Up to how many rows the fused product is used: of this device, else of the nearest one.

    >>> fused_rows((4096, 4096), Target("", None, "cpu"))
    0
    """
    if target.platform != "gpu":
        return 0
    if not crossovers():
        return _UNMEASURED_ROWS

    def distance(entry: Crossover) -> tuple[bool, int, int]:
        major, minor = map(int, entry.compute_capability.split("."))
        ours = target.architecture
        return entry.device_kind != target.device_kind, abs(major - ours[0]), abs(minor - ours[1])

    return min(crossovers(), key=distance).nearest(shape)


@functools.cache
def _tiles() -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The entries of `tiles.json` by what they are for."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in _read("tiles.json"):
        size = math.prod(entry["shape"])
        key = entry["compute_capability"], entry["operation"], entry["implementation"], size
        found.setdefault(key, []).append(entry)
    return found


def measured_tiles[TilesT](
    kind: type[TilesT], operation: str, implementation: str, shape: tuple[int, ...], rows: int = 0
) -> TilesT | None:
    """The tiles that were fastest for a weight of this size, on this device or one of its kind.

    Args:
        kind: the kernel's dataclass.
        operation: `"dequantize"`, `"quantize"`, `"matmul"`, `"matmul_transposed"`.
        implementation: `"mosaic_gpu"` or `"triton"`.
        shape: of the weight.
        rows: of the product's other factor; the nearest count that was measured is taken.

    Returns:
        The tiles; None where nothing was measured.

    >>> measured_tiles(dict, "matmul", "triton", (3, 5), rows=1) is None
    True
    """
    target = current_target()
    size = math.prod(shape)
    entries = _tiles().get((target.compute_capability, operation, implementation, size))
    if not entries:
        return None

    def distance(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        other = entry["device_kind"] != target.device_kind
        steps = abs(math.log2(max(entry["rows"], 1) / max(rows, 1)))
        return other, entry["shape"] != list(shape), steps

    return kind(**min(entries, key=distance)["tiles"])
