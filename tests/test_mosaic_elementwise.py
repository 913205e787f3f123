"""Quantize and dequantize in Mosaic GPU, against the XLA implementation, to the bit.

Pallas's interpreter runs the kernels but not their inline code, for which they have plain JAX
there. What the compiler made of the inline code is run by `ptx_interpreter`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import ptx_interpreter
import pytest
from cuda_wheels import needs_cuda_wheels

from pallas_kernels import formats
from pallas_kernels.dequantize_4bit import mosaic_gpu as dequantize_mosaic
from pallas_kernels.dequantize_4bit import xla as dequantize_xla
from pallas_kernels.dequantize_4bit.mosaic_gpu import Tiles, default_tiles
from pallas_kernels.mosaic_registers import WARPS
from pallas_kernels.quantize_4bit import mosaic_gpu as quantize_mosaic
from pallas_kernels.quantize_4bit import xla as quantize_xla
from qlora_jax.targets import compile_lowered, find_target, lower_for

TYPES = tuple(formats.CODEBOOKS)
DTYPES = ("bfloat16", "float16", "float32")
ROWS = (66, 192)  # 99 byte rows of 64: no whole number of tiles
# In-kernel and with padding cut off; blocks across rows, odd counts, a short last one.
SHAPES = (
    ((64, 64), 32),
    ((33, 192), 64),
    ((7, 1000), 64),
    ((2, 3, 1000), 256),
    ((64, 64), 1024),
    ((64, 192), 4096),
)


def packed(shape, quant_type, block_size, double_quant, seed=0):
    """Codes and scales of normal numbers, `(codes, absmax, nested_absmax, offset)`."""
    x = jax.random.normal(jax.random.key(seed), shape)
    codes, absmax = quantize_xla.quantize(x, quant_type=quant_type, block_size=block_size)
    if double_quant:
        return codes, *quantize_xla.quantize_absmax(absmax)
    return codes, absmax, None, None


def difficult(shape, dtype):
    """Normal blocks, zeros, infinities, NaN, a subnormal maximum, ones, values at bounds."""
    x = np.array(jax.random.normal(jax.random.key(1), shape)).reshape(-1, 64)
    x[3] = 0
    x[5, 7], x[6] = np.inf, -np.inf
    x[9, 3], x[10] = np.nan, np.nan
    x[11], x[12], x[13] = 1e-40, -1, 2.0**-126
    bounds = np.concatenate([formats.decision_bounds(t)[0][1:] for t in TYPES])
    x[14, : bounds.size], x[14, -1] = bounds, 1
    x[15] = np.nextafter(x[14], np.float32(2))
    x[15, -1] = 1
    x[16] = 2 * x[14]
    return jnp.asarray(x.reshape(shape)).astype(dtype)


def assert_same_bits(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    bits = {2: np.uint16, 4: np.uint32}.get(actual.dtype.itemsize, np.uint8)
    np.testing.assert_array_equal(np.asarray(actual).view(bits), np.asarray(expected).view(bits))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
def test_dequantize_is_that_of_xla(quant_type, dtype, double_quant):
    arrays = packed(ROWS, quant_type, 64, double_quant)
    static = dict(quant_type=quant_type, block_size=64, shape=ROWS, dtype=jnp.dtype(dtype))
    # The interpreter fills outputs with NaN beforehand: this says that every element is written.
    assert_same_bits(
        dequantize_mosaic.dequantize(*arrays, **static, interpret=True),
        dequantize_xla.dequantize(*arrays, **static),
    )


@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
def test_dequantize_serves_all_shapes(shape, block_size):
    arrays = packed(shape, "nf4", block_size, double_quant=True)
    static = dict(quant_type="nf4", block_size=block_size, shape=shape, dtype=jnp.dtype("bfloat16"))
    expected = dequantize_xla.dequantize(*arrays, **static)
    assert_same_bits(dequantize_mosaic.dequantize(*arrays, **static, interpret=True), expected)


def test_tiles_and_repetition_change_nothing():
    shape = (36, 256)
    arrays = packed(shape, "nf4", 64, double_quant=True)
    call = functools.partial(
        dequantize_mosaic.dequantize,
        *arrays,
        **dict(quant_type="nf4", block_size=64, shape=shape, dtype=jnp.dtype("bfloat16")),
        interpret=True,
    )
    first = call(tiles=Tiles(1024))
    for tiles in (Tiles(1024), Tiles(2048), Tiles(4096)):
        assert_same_bits(call(tiles=tiles), first)


def test_the_interpreter_poisons_what_is_not_written():
    assert dequantize_mosaic.interpreter(True).uninitialized_memory == "nan"
    assert dequantize_mosaic.interpreter(False) is None


def test_default_tiles():
    assert default_tiles(22016 * 8192 // 2, 64) == default_tiles(1024 * 2048, 64) == Tiles(2048)
    assert default_tiles(1024, 64) == Tiles(1024)
    assert default_tiles(4096, 4096) == Tiles(4096)
    with pytest.raises(ValueError, match="tile_bytes=1000"):
        Tiles(1000)


@pytest.mark.parametrize(
    ("shape", "block_size", "tiles"), [((3, 64), 64, None), ((64, 4096), 4096, Tiles(1024))]
)
def test_what_is_not_served_is_refused_with_its_values(shape, block_size, tiles):
    static = dict(quant_type="nf4", block_size=block_size)
    codes, absmax, *_ = packed(shape, "nf4", block_size, double_quant=False)
    with pytest.raises(NotImplementedError, match=r"shape|block_size"):
        dequantize_mosaic.dequantize(
            codes, absmax, **static, shape=shape, dtype=jnp.float32, tiles=tiles
        )
    with pytest.raises(NotImplementedError, match=r"shape"):
        quantize_mosaic.quantize(jnp.ones(shape), **static, tiles=tiles)


def test_quantize_refuses_a_short_last_block():
    with pytest.raises(NotImplementedError, match=r"x.shape=\(7, 1000\) in blocks of 64"):
        quantize_mosaic.quantize(jnp.ones((7, 1000)), quant_type="nf4", block_size=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
def test_quantize_is_that_of_xla(quant_type, dtype):
    x = difficult(ROWS, dtype)
    static = dict(quant_type=quant_type, block_size=64)
    actual = quantize_mosaic.quantize(x, **static, interpret=True)
    for a, e in zip(actual, quantize_xla.quantize(x, **static), strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize(
    ("shape", "block_size"), [s for s in SHAPES if math.prod(s[0]) % s[1] == 0]
)
def test_quantize_serves_all_whole_blocks(shape, block_size):
    x = jax.random.normal(jax.random.key(0), shape)
    static = dict(quant_type="nf4", block_size=block_size)
    actual = quantize_mosaic.quantize(x, **static, interpret=True)
    for a, e in zip(actual, quantize_xla.quantize(x, **static), strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_search_tree_finds_the_interval_of_every_float_near_a_bound(quant_type):
    bounds, codes = formats.decision_bounds(quant_type)
    values = np.concatenate(
        [np.nextafter(bounds[bounds > -2], np.float32(side)) for side in (-2, 2)]
        + [bounds[bounds > -2], [-1.0, 0, 1, np.nextafter(np.float32(1), np.float32(2))]]
    ).astype(np.float32)
    lanes = quantize_mosaic.search_lanes(quant_type)
    node = np.ones(values.size, np.int64)
    for _ in range(4):
        node = 2 * node + (values > lanes[node].view(np.float32))
    np.testing.assert_array_equal(lanes[node], codes[np.searchsorted(bounds, values)])


def ptx_of(folder, target, function, *arrays):
    """What Mosaic's compiler makes of the one kernel in `function`."""
    gpu = find_target(target)
    dump = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    lowered = lower_for(function, *arrays, target=gpu)
    compile_lowered(lowered, gpu, environment=dump)
    [path] = folder.glob("*.ptx")
    return path.read_text()


# The shapes differ from each other's, for a process compiles and dumps the same kernel only once.
@needs_cuda_wheels
@pytest.mark.parametrize(
    ("target", "shape", "quant_type", "block_size", "dtype", "double_quant"),
    [
        ("h100", (66, 192), "nf4", 64, "bfloat16", True),
        ("h100", (33, 192), "fp4", 64, "float32", False),
        ("h100", (66, 512), "int4", 512, "float16", True),
        ("h100", (6, 4096), "nf4", 4096, "bfloat16", True),
        ("rtx3090", (66, 320), "nf4", 64, "bfloat16", True),
    ],
)
def test_the_machine_dequantizes_as_xla(
    tmp_path, target, shape, quant_type, block_size, dtype, double_quant
):
    arrays = packed(shape, quant_type, block_size, double_quant)
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape, dtype=jnp.dtype(dtype))
    kernel = functools.partial(dequantize_mosaic.dequantize, **static)
    present = [a for a in arrays if a is not None]
    ptx = ptx_of(tmp_path, target, kernel, *present)
    assert ("mul.rn.f32" in ptx) is double_quant  # which ptxas fuses with no sum
    codes, absmax, nested, offset = (None if a is None else np.asarray(a) for a in arrays)
    absmax = np.pad(absmax, (0, 2 * codes.size // block_size - absmax.size))
    out = np.full(2 * codes.size, 99, dtype)
    # As the compiler orders them: by their first use.
    arguments = [codes, absmax, out]
    if double_quant:
        arguments = [codes, absmax, offset.reshape(1), out, nested, formats.DYNAMIC_MAP]
    programs = -(-codes.size // default_tiles(codes.size, block_size).tile_bytes)
    machine = ptx_interpreter.run(ptx, programs, arguments)
    actual = machine.result(3 if double_quant else 2)[: math.prod(shape)].reshape(shape)
    assert_same_bits(actual, dequantize_xla.dequantize(*arrays, **static))


@needs_cuda_wheels
@pytest.mark.parametrize(
    ("target", "shape", "quant_type", "block_size", "dtype"),
    [
        ("h100", (66, 192), "nf4", 64, "bfloat16"),
        ("h100", (66, 192), "fp4", 64, "float32"),
        ("h100", (66, 320), "int4", 64, "float16"),
        ("h100", (64, 2048), "nf4", 1024, "float32"),
        ("rtx3090", (66, 192), "fp4", 64, "bfloat16"),
    ],
)
def test_the_machine_quantizes_as_xla(tmp_path, target, shape, quant_type, block_size, dtype):
    x = difficult(shape, dtype) if block_size == 64 else jax.random.normal(jax.random.key(2), shape)
    static = dict(quant_type=quant_type, block_size=block_size)
    ptx = ptx_of(tmp_path, target, functools.partial(quantize_mosaic.quantize, **static), x)
    assert "sub.rn.f32" in ptx and "rcp.rn.f32" in ptx and "approx" not in ptx
    lanes = np.tile(quantize_mosaic.search_lanes(quant_type), WARPS)
    codes = np.full(x.size // 2, 0xA5, np.uint8)
    absmax = np.full(x.size // block_size, 99, np.float32)
    programs = -(-codes.size // max(1024, block_size))
    # As the compiler orders them: by their first use.
    machine = ptx_interpreter.run(ptx, programs, [lanes, np.asarray(x), absmax, codes])
    expected_codes, expected_absmax = quantize_xla.quantize(x, **static)
    assert_same_bits(machine.result(3), expected_codes)
    assert_same_bits(machine.result(2), expected_absmax)
