"""The inline code of the fused products, evaluated thread by thread, against its plain meaning."""

import functools

import jax.numpy as jnp
import mlir_threads
import numpy as np
import pytest

from pallas_kernels.matmul_4bit import mosaic_columns, mosaic_pairs, mosaic_scales
from pallas_kernels.mosaic_registers import tile_layout


def lanes_table(dtype):
    table = mosaic_pairs.pair_table("nf4", jnp.dtype(dtype))
    return np.repeat(table[:, None], 32, axis=1)


def random_bytes(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_thread_decodes_its_part_of_the_planes(dtype, monkeypatch):
    codes, table = random_bytes((64, 64)), lanes_table(dtype)

    def emit(table, codes):
        return mosaic_pairs.emit_planes(codes, table, jnp.dtype(dtype))

    planes = mlir_threads.run(emit, [table], [(codes, mosaic_pairs.BYTES)], monkeypatch=monkeypatch)
    expected = mosaic_pairs.decode_planes(
        jnp.asarray(codes), jnp.asarray(table), dtype, interpret=True
    )
    for plane, want in zip(planes, expected, strict=True):
        assert np.array_equal(plane.view(np.uint16), np.asarray(want).view(np.uint16))


def swizzled(halves):
    """Two tiles of 64 x 128 bytes as TMA leaves them in shared memory."""
    atoms = halves.reshape(2, 8, 8, 8, 16)
    row, chunk = np.ogrid[:8, :8]
    return atoms[:, :, row, chunk ^ row]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_thread_decodes_its_part_of_the_columns(dtype, part, monkeypatch):
    codes, table = random_bytes((2, 64, 128)), lanes_table(dtype)
    scales = np.random.default_rng(1).normal(size=(2, 64, 5)).astype(np.float32)
    emit = functools.partial(mosaic_columns.emit_columns, part=part, dtype=jnp.dtype(dtype))
    operands = mlir_threads.run(emit, [swizzled(codes), scales, table], monkeypatch=monkeypatch)
    expected = mosaic_columns.decode_columns(
        *map(jnp.asarray, (codes, scales, table)), part, dtype, interpret=True
    )
    for result, want in zip(operands, expected, strict=True):
        assert np.array_equal(result.view(np.uint16), np.asarray(want).view(np.uint16))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_thread_takes_what_its_indices_name(dtype, monkeypatch):
    table, index = np.arange(256).astype(dtype), random_bytes((64, 16)).astype(np.uint32)

    def emit(table, index):
        return [mosaic_scales.emit_take(table, index, np.dtype(dtype))]

    layout = tile_layout(16, 1)
    [taken] = mlir_threads.run(emit, [table], [(index, layout)], monkeypatch=monkeypatch)
    assert np.array_equal(taken, index)
