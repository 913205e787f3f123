"""What was measured on one device decides on it, and on devices like it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices, tuning
from pallas_kernels.devices import Target
from pallas_kernels.quantize_4bit import mosaic_gpu as quantize_mosaic

CPU = Target("cpu", None, "cpu")
H100 = Target("NVIDIA H100 80GB HBM3", 132, "gpu", "9.0")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes the files of a package that was measured; none to begin with."""
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)

    def forget():
        tuning.crossovers.cache_clear()
        tuning._tiles.cache_clear()

    def write(name, entries):
        (tmp_path / name).write_text(json.dumps(entries))
        forget()

    forget()
    yield write
    forget()


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int = 1


def test_unmeasured_devices_take_the_nearest_ones_rows(measured):
    assert tuning.fused_rows((4096, 4096), CPU) == 0
    assert tuning.fused_rows((4096, 4096), H100) == 64
    entries = [
        {"device_kind": "A", "compute_capability": "9.0", "rows": [[64, 64, 48], [4096, 4096, 32]]},
        {"device_kind": "B", "compute_capability": "8.0", "rows": [[4096, 4096, 8]]},
    ]
    measured("crossovers.json", entries)
    assert tuning.fused_rows((5120, 5120), H100) == 32
    assert tuning.fused_rows((128, 64), H100) == 48
    assert tuning.fused_rows((128, 64), Target("B", 1, "gpu", "9.0")) == 8
    assert tuning.fused_rows((128, 64), Target("", 1, "gpu", "8.6")) == 8


def test_a_crossover_without_rows_is_refused():
    with pytest.raises(ValueError, match="expected a count of rows"):
        tuning.Crossover("A", "9.0", {})


def entry(device_kind, capability, shape, rows, tiles, operation="matmul"):
    return dict(
        device_kind=device_kind,
        compute_capability=capability,
        operation=operation,
        implementation="triton",
        shape=shape,
        rows=rows,
        tiles=tiles,
    )


def test_tiles_are_those_of_the_nearest_measurement(measured):
    def found(shape, rows, target=H100, operation="matmul"):
        with devices.tracing_for(target):
            return tuning.measured_tiles(Tiles, operation, "triton", shape, rows)

    assert found((64, 128), 1) is None
    measured(
        "tiles.json",
        [
            entry(H100.device_kind, "9.0", [64, 128], 1, {"rows": 2}),
            entry(H100.device_kind, "9.0", [64, 128], 16, {"rows": 4}),
            entry(H100.device_kind, "9.0", [128, 64], 1, {"rows": 8}),
            entry("NVIDIA H200", "9.0", [64, 128], 1, {"rows": 16}),
            entry("NVIDIA A100", "8.0", [64, 128], 1, {"rows": 32}),
        ],
    )
    assert found((64, 128), 1) == Tiles(2)
    assert found((64, 128), 3) == Tiles(2)
    assert found((64, 128), 40) == Tiles(4)
    assert found((128, 64), 16) == Tiles(8)
    assert found((64, 128), 1, Target("NVIDIA H200", 132, "gpu", "9.0")) == Tiles(16)
    assert found((64, 128), 1, Target("NVIDIA L4", 58, "gpu", "8.9")) is None
    assert found((64, 64), 1) is None
    assert found((64, 128), 1, operation="quantize") is None


def test_kernels_take_the_measured_tiles(measured):
    shape = (128, 192)
    measured(
        "tiles.json",
        [
            entry(H100.device_kind, "9.0", list(shape), 0, {"tile_bytes": 1000}, "quantize")
            | {"implementation": "mosaic_gpu"}
        ],
    )
    with devices.tracing_for(H100), pytest.raises(ValueError, match="tile_bytes=1000"):
        jax.eval_shape(
            lambda x: quantize_mosaic.quantize(x, quant_type="nf4", block_size=64),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        )
