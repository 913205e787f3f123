"""The 4-bit operations against their meaning, written here a second time in float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pallas_kernels as pk
from pallas_kernels import formats
from pallas_kernels.dequantize_4bit import bench

TYPES = tuple(formats.CODEBOOKS)
DTYPES = ("float32", "bfloat16", "float16")
# Blocks inside rows, across rows, a short last one, odd counts, one element, other ranks.
SHAPES = ((8, 64), (48, 96), (33, 80), (7, 9), (1, 1), (3, 5, 7), (130,), (2, 4100))


def widest_half_gap(quant_type):
    """The farthest that a number in the codebook's range lies from it; for INT4 that of -7..7."""
    code = np.sort(formats.CODEBOOKS[quant_type].astype(np.float64))
    return np.diff(code[1:] if quant_type == "int4" else code).max() / 2


def unpack(codes, size, block_size):
    """Planar bytes to one code an element, by the file order."""
    packed = formats.planar_to_interleaved(codes, size, block_size)
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]


def blocked(flat, block_size):
    """`flat` in rows of `block_size`, filled up with zeros, float64."""
    rows = -(-flat.size // block_size)
    return np.resize(np.pad(flat, (0, rows * block_size - flat.size)), (rows, block_size))


def numbers(shape, dtype, seed=0):
    """Weights of a few scales, with a block of zeros and one of subnormals where there is room."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    flat = x.reshape(-1) * np.float32(0.05)
    if flat.size > 256:
        flat[64:128] = 0
        flat[128:192] = rng.standard_normal(64) * 1e-40
    return jnp.asarray(flat.reshape(shape)).astype(dtype)


def check_quantized(x, codes, absmax, quant_type, block_size):
    """absmax is the maximum, and every code is as near as any other."""
    flat = np.asarray(x, np.float64).reshape(-1)
    codebook = formats.CODEBOOKS[quant_type].astype(np.float64)
    assert codes.dtype == jnp.uint8 and absmax.dtype == jnp.float32
    assert codes.shape == (formats.plane_size(flat.size, block_size),)
    blocks = blocked(flat, block_size)
    expected = np.abs(blocks).max(axis=1)
    np.testing.assert_allclose(np.asarray(absmax, np.float64), expected, rtol=0, atol=1.01e-38)
    # Where the scale is subnormal there is no ratio: such a block counts as zeros.
    scale = np.where(expected >= np.finfo(np.float32).smallest_normal, expected, np.inf)[:, None]
    ratio = blocks / scale
    allowed = codebook[1:] if quant_type == "int4" else codebook
    best = np.abs(ratio[..., None] - allowed).min(axis=-1)
    chosen = codebook[blocked(unpack(codes, flat.size, block_size), block_size).astype(int)]
    inside = blocked(np.ones(flat.size), block_size) > 0
    assert (np.abs(ratio - chosen) <= best + 3e-7)[inside].all()


def expected_absmax(absmax, nested, offset):
    """Double quantization undone, in float32 as the format says."""
    if nested is None:
        return np.asarray(absmax)
    values = formats.DYNAMIC_MAP[np.asarray(absmax)]
    return values * np.repeat(np.asarray(nested), 256)[: values.size] + np.asarray(offset)


def dequantized(packed, shape, quant_type, block_size):
    """The dense array in float32: one product an element."""
    codes, absmax, nested, offset = packed
    size = int(np.prod(shape))
    scale = np.repeat(expected_absmax(absmax, nested, offset), block_size)[:size]
    return (formats.CODEBOOKS[quant_type][unpack(codes, size, block_size)] * scale).reshape(shape)


def check_matmul(x, packed, dense, **static):
    """Values and gradient against float64 products with the weight as it is in x's dtype."""
    eps = float(jnp.finfo(x.dtype).eps)
    w = np.asarray(jnp.asarray(dense).astype(x.dtype), np.float64)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((*x.shape[:-1], w.shape[0])), x.dtype)
    y, vjp = jax.vjp(lambda x: pk.matmul_4bit(x, *packed, shape=w.shape, **static), x)
    (dx,) = vjp(g)
    for got, a, b in ((y, x, w.T), (dx, g, w)):
        assert got.dtype == x.dtype
        a = np.asarray(a, np.float64)
        error = np.abs(np.asarray(got, np.float64) - a @ b)
        # One rounding of the result, and the bound for sums of that length in float32.
        bound = 2 * eps + a.shape[-1] * 2.0**-24
        assert (error <= bound * (np.abs(a) @ np.abs(b)) + 1e-30).all()


def check_all(quant_type, block_size, double_quant, dtype, shape):
    """The whole contract for one case."""
    static = dict(quant_type=quant_type, block_size=block_size)
    x = numbers(shape, dtype)
    codes, absmax = pk.quantize_4bit(x, **static)
    check_quantized(x, codes, absmax, quant_type, block_size)
    packed = (codes, *pk.quantize_absmax(absmax)) if double_quant else (codes, absmax, None, None)
    dense = dequantized(packed, shape, quant_type, block_size)
    got = pk.dequantize_4bit(*packed, shape=shape, dtype=dtype, **static)
    assert got.dtype == jnp.dtype(dtype) and got.shape == shape
    normal = np.where(np.abs(dense) < np.finfo(np.float32).smallest_normal, 0, dense)
    expected = np.asarray(jnp.asarray(normal).astype(dtype), np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=1.2e-38)
    if len(shape) == 2:
        inputs = np.random.default_rng(2).standard_normal((2, 3, shape[1]))
        check_matmul(jnp.asarray(inputs, dtype), packed, normal, **static)


FORMATS = list(itertools.product(TYPES, formats.BLOCK_SIZES, (False, True)))


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant", "dtype", "shape"),
    # Every format, each with another dtype and shape ...
    [
        (*fmt, DTYPES[i % len(DTYPES)], SHAPES[(i + i // 8) % len(SHAPES)])
        for i, fmt in enumerate(FORMATS)
    ]
    # ... and every shape in every dtype.
    + [
        (TYPES[i % 3], 64, i % 2 == 0, dtype, shape)
        for i, (shape, dtype) in enumerate(itertools.product(SHAPES, DTYPES))
    ],
)
def test_contract(quant_type, block_size, double_quant, dtype, shape):
    check_all(quant_type, block_size, double_quant, dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_contract_over_the_whole_product(quant_type, block_size, dtype):
    for double_quant, shape in itertools.product((False, True), SHAPES):
        check_all(quant_type, block_size, double_quant, dtype, shape)


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
def test_double_quantization_of_absmax(blocks):
    absmax = jnp.asarray(np.random.default_rng(blocks).lognormal(-4, 1, blocks).astype(np.float32))
    codes, nested, offset = pk.quantize_absmax(absmax)
    assert codes.shape == (blocks,) and nested.shape == (-(-blocks // 256),)
    np.testing.assert_allclose(offset, np.asarray(absmax, np.float64).mean(), rtol=1e-6)
    back = np.asarray(pk.dequantize_absmax(codes, nested, offset))
    np.testing.assert_array_equal(back, expected_absmax(codes, nested, offset))
    # Half the widest gap of the map, and half a step of the grid that values are rounded to.
    bound = np.diff(formats.DYNAMIC_MAP).max() / 2 + 1 / 65535
    assert (np.abs(back - absmax) <= np.repeat(nested, 256)[:blocks] * bound + 1e-7).all()


def test_a_bad_number_shows_in_its_own_block_only():
    x = jnp.ones(256).at[70].set(jnp.nan).at[140].set(-jnp.inf)
    _, absmax = pk.quantize_4bit(x)
    np.testing.assert_array_equal(np.isfinite(absmax), [True, False, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.quantize_4bit(jnp.ones(4), quant_type="nf5"), "'nf5' is unknown"),
        (lambda: pk.quantize_4bit(jnp.ones(4), block_size=48), "48 is not supported"),
        (lambda: pk.quantize_4bit(jnp.ones(4, jnp.int32)), "float32, bfloat16 or float16"),
        (lambda: pk.quantize_4bit(jnp.ones((0, 4))), "without elements"),
        (
            lambda: pk.matmul_4bit(jnp.ones((2, 3)), *pk.quantize_4bit(jnp.eye(4)), shape=(4, 4)),
            r"x.shape=\(2, 3\) does not fit",
        ),
        (lambda: formats.interleaved_to_planar(np.zeros(3, np.uint8), 4, 32), "cannot hold"),
        (lambda: formats.planar_to_interleaved(np.zeros(3, np.uint8), 4, 32), "expected 32"),
    ],
)
def test_refusals_show_the_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_timing_takes_the_case_it_names():
    call = bench.make_case((6, 64), "bfloat16")
    assert call().shape == (6, 64) and call().dtype == jnp.bfloat16
    assert all(seconds > 0 for seconds in bench.time_calls(call, 2))


# ---------------------------------------------------------------------------- properties
# Few distinct sizes: every new one is a compilation.

finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=True)
arrays = st.sampled_from([1, 63, 130]).flatmap(lambda n: hnp.arrays(np.float32, n, elements=finite))
fast = settings(max_examples=40, deadline=None)


@fast
@given(arrays, st.sampled_from(TYPES))
def test_error_is_at_most_half_the_widest_gap(x, quant_type):
    packed = pk.quantize_4bit(jnp.asarray(x), quant_type=quant_type, block_size=32)
    dense = pk.dequantize_4bit(*packed, shape=x.shape, quant_type=quant_type, block_size=32)
    absmax = np.repeat(np.asarray(packed[1], np.float64), 32)[: x.size]
    error = np.abs(x.astype(np.float64) - np.asarray(dense, np.float64))
    assert (error <= absmax * (widest_half_gap(quant_type) + 1e-6) + 1.2e-38).all()


@fast
@given(arrays, st.sampled_from(TYPES))
def test_quantizing_again_changes_nothing(x, quant_type):
    static = dict(quant_type=quant_type, block_size=32)
    codes, absmax = pk.quantize_4bit(jnp.asarray(x), **static)
    dense = pk.dequantize_4bit(codes, absmax, shape=x.shape, **static)
    again, absmax_again = pk.quantize_4bit(dense, **static)
    # The largest element of a block is stored exactly, so the scale is attained again, except
    # in a block that counts as zeros.
    normal = np.asarray(absmax) >= np.finfo(np.float32).smallest_normal
    np.testing.assert_array_equal(np.asarray(absmax)[normal], np.asarray(absmax_again)[normal])
    kept = np.repeat(normal, 32)[: x.size]
    # Values, not codes: FP4 has two zeros, 8 for what rounds down to zero and 0 for zero itself.
    codebook = formats.CODEBOOKS[quant_type]
    first, second = (codebook[unpack(c, x.size, 32)[kept]] for c in (codes, again))
    np.testing.assert_array_equal(first, second)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.sampled_from(formats.BLOCK_SIZES), st.randoms())
def test_repacking_is_a_bijection(size, block_size, random):
    packed = np.frombuffer(random.randbytes(-(-size // 2)), np.uint8)
    planar = formats.interleaved_to_planar(packed, size, block_size)
    assert planar.size == formats.plane_size(size, block_size)
    back = formats.planar_to_interleaved(planar, size, block_size)
    np.testing.assert_array_equal(back, packed)
    np.testing.assert_array_equal(formats.interleaved_to_planar(back, size, block_size), planar)
