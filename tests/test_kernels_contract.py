"""One contract for every implementation of the 4-bit operations, against their float64 meaning.

What an implementation does not serve it declines with NotImplementedError; everything else must be
right. GPU kernels run in the interpreters of Pallas and Triton, which fill results with NaN first,
so that an element that is not written is seen.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import devices, formats, triton_call
from pallas_kernels.dequantize_4bit import api as dequantize_api
from pallas_kernels.matmul_4bit import api as matmul_api
from pallas_kernels.matmul_4bit.mosaic_gpu import Tiles
from pallas_kernels.quantize_4bit import api as quantize_api

GPU = ("mosaic_gpu", "triton")
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# The rest of a LLaMA layer's proportions: ragged rows, an odd number of blocks a row, tall, wide.
SHAPES = ((128, 128), (160, 192), (320, 128), (128, 448))
FORMATS = (("nf4", 64, True), ("fp4", 64, False), ("int4", 128, True))


def implementations(table):
    """The names, those without their interpreter marked."""
    absent = pytest.mark.skipif(triton_call.triton is None, reason="Triton is not installed")
    return [pytest.param(n, marks=absent if n == "triton" else ()) for n in table]


def on_this_machine(name, function):
    """The implementation as it can run here; dots and decoding of `dequantize` are XLA's.

    One call at a time: Pallas's interpreter has one state, and its threads wait for one another.
    """
    if name not in GPU:
        return function

    if name == "mosaic_gpu" and function in matmul_api.IMPLEMENTATIONS[name]:
        # With more warpgroups the interpreter has more threads than this machine may have cores.
        function = functools.partial(function, tiles=Tiles(2, blocks=1))

    def interpreted(*arrays, **static):
        arrays = jax.block_until_ready(arrays)
        return jax.block_until_ready(function(*arrays, **static, interpret=True))

    return interpreted


def packed_weight(shape, quant_type, block_size, double_quant, dtype="float32", seed=0):
    w = jax.random.normal(jax.random.key(seed), shape, dtype) * 0.05
    codes, absmax = pk.quantize_4bit(w, quant_type=quant_type, block_size=block_size)
    return (codes, *pk.quantize_absmax(absmax)) if double_quant else (codes, absmax, None, None)


def meaning(packed, shape, quant_type, block_size):
    """`codebook[code] * absmax` in float64, from the bytes, in NumPy."""
    codes, absmax, nested, offset = (None if a is None else np.asarray(a) for a in packed)
    if nested is not None:
        scales = np.repeat(nested, formats.NESTED_BLOCK_SIZE)[: absmax.size]
        absmax = formats.DYNAMIC_MAP[absmax].astype(np.float64) * scales + offset
    size = math.prod(shape)
    flat = np.concatenate([codes >> 4, codes & 15])[:size]
    values = formats.CODEBOOKS[quant_type].astype(np.float64)[flat]
    return (values * np.repeat(absmax, block_size)[:size]).reshape(shape)


def rows_of(m, k, dtype, seed=1):
    return jax.random.normal(jax.random.key(seed), (m, k), dtype)


def assert_near(y, exact, magnitude, dtype, roundings):
    """So many relative roundings of `dtype` of what is added up; none of it is NaN."""
    assert y.dtype == dtype and y.shape == exact.shape
    bound = 1.02 * ROUNDING[dtype] * (np.abs(exact) + roundings * magnitude) + 1e-6 * magnitude
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound + 1e-30)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f[0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", implementations(dequantize_api.IMPLEMENTATIONS))
def test_dequantize(name, dtype, fmt):
    quant_type, block_size, _ = fmt
    function = on_this_machine(name, dequantize_api.IMPLEMENTATIONS[name])
    for shape in SHAPES[1:3]:
        packed = packed_weight(shape, *fmt)
        static = dict(quant_type=quant_type, block_size=block_size, shape=shape)
        exact = meaning(packed, **static)
        y = function(*packed, **static, dtype=jnp.dtype(dtype))
        # Rounded to float32 in absmax (twice with double quantization) and in the product.
        assert_near(y, exact, np.abs(exact), dtype, roundings=0 if dtype != "float32" else 3)


@pytest.mark.parametrize("quant_type", formats.CODEBOOKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", implementations(quantize_api.IMPLEMENTATIONS))
def test_quantize(name, dtype, quant_type):
    """Every code names a nearest value, and absmax is exact."""
    shape, block_size = (128, 192), 64
    x = jax.random.normal(jax.random.key(2), shape, dtype)
    function = on_this_machine(name, quantize_api.IMPLEMENTATIONS[name])
    codes, absmax = function(x, quant_type=quant_type, block_size=block_size)
    blocks = np.asarray(x, np.float64).reshape(-1, block_size)
    np.testing.assert_array_equal(np.asarray(absmax, np.float64), np.abs(blocks).max(axis=1))
    scale = np.asarray(absmax, np.float64)[:, None]
    allowed = formats.CODEBOOKS[quant_type][1 if quant_type == "int4" else 0 :].astype(np.float64)
    best = np.abs(blocks[..., None] / scale[..., None] - allowed).min(axis=-1)
    packed = codes, absmax, None, None
    chosen = meaning(packed, blocks.shape, quant_type, block_size) / scale
    assert (np.abs(blocks / scale - chosen) <= best + 3e-7).all()


CASES = [
    (m, shape, fmt, dtype)
    for i, m in enumerate((1, 3, 16, 64))
    for j, fmt in enumerate(FORMATS)
    for shape, dtype in [(SHAPES[(i + j) % 4], ("bfloat16", "float16")[(i + j) % 2])]
]


@pytest.mark.parametrize(
    "m, shape, fmt, dtype", CASES, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v
)
@pytest.mark.parametrize("name", implementations(matmul_api.IMPLEMENTATIONS))
def test_product_and_gradients(name, m, shape, fmt, dtype, monkeypatch):
    """Value and gradients through the public function, with bias and low-rank update."""
    (n, k), (quant_type, block_size, _) = shape, fmt
    pair = matmul_api.IMPLEMENTATIONS[name]
    here = tuple(on_this_machine(name, function) for function in pair)
    monkeypatch.setitem(matmul_api.IMPLEMENTATIONS, name, here)
    packed = packed_weight(shape, *fmt)
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape)
    w = meaning(packed, **static)
    x, g = rows_of(m, k, dtype), rows_of(m, n, dtype, seed=3)
    bias = rows_of(1, n, dtype, seed=4)[0]
    xa, b = rows_of(m, 8, dtype, seed=5), rows_of(8, n, dtype, seed=6)

    def product(x, bias, lora):
        return pk.matmul_4bit(x, *packed, **static, bias=bias, lora=lora, implementation=name)

    try:
        y, vjp = jax.vjp(product, x, bias, (xa, b))
        d_x, d_bias, (d_xa, d_b) = jax.block_until_ready(vjp(g))
    except ValueError as error:
        assert isinstance(error.__cause__, NotImplementedError)
        pytest.skip(str(error.__cause__))
    x, g, bias, xa, b = (np.asarray(a, np.float64) for a in (x, g, bias, xa, b))
    terms = np.abs(x) @ np.abs(w).T + np.abs(xa) @ np.abs(b) + np.abs(bias)
    assert_near(y, x @ w.T + xa @ b + bias, terms, dtype, roundings=3)
    # The codebook's value, absmax and their product may each be rounded.
    assert_near(d_x, g @ w, np.abs(g) @ np.abs(w), dtype, roundings=3)
    assert_near(d_bias, g.sum(axis=0), np.abs(g).sum(axis=0), dtype, roundings=m)
    assert_near(d_xa, g @ b.T, np.abs(g) @ np.abs(b).T, dtype, roundings=1)
    assert_near(d_b, xa.T @ g, np.abs(xa).T @ np.abs(g), dtype, roundings=1)


@pytest.mark.parametrize("name", implementations(matmul_api.IMPLEMENTATIONS))
def test_the_same_call_gives_the_same_bits(name):
    shape = (160, 192)
    packed = packed_weight(shape, "nf4", 64, True)
    static = dict(quant_type="nf4", block_size=64, shape=shape)
    function = on_this_machine(name, matmul_api.IMPLEMENTATIONS[name][0])
    x = rows_of(3, 192, "bfloat16")
    assert jnp.array_equal(function(x, *packed, **static), function(x, *packed, **static))


def test_no_rows_give_no_rows_on_every_target():
    packed = packed_weight((128, 192), "nf4", 64, True)
    for target in (devices.current_target(), devices.Target("a GPU", 100, "gpu", "9.0")):

        def loss(x):
            y = pk.matmul_4bit(x, *packed, shape=(128, 192))
            assert y.shape == (2, 0, 128)
            return y.sum()

        with devices.tracing_for(target):
            gradient = jax.eval_shape(jax.grad(loss), jnp.ones((2, 0, 192)))
        assert gradient.shape == (2, 0, 192)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0"])
def test_what_llama_needs_is_served(capability):
    """No shape of a LLaMA layer falls back to XLA's decoding on GPUs from sm_80."""
    target = devices.Target("a GPU", 100, "gpu", capability)
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (6656, 6656), (22016, 8192)):
        packed = (
            jax.ShapeDtypeStruct((n * k // 2,), jnp.uint8),
            jax.ShapeDtypeStruct((n * k // 64,), jnp.uint8),
            jax.ShapeDtypeStruct((-(-n * k // 64 // 256),), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        with devices.tracing_for(target):
            served = functools.partial(pk.dequantize_4bit, implementation="mosaic_gpu")
            jax.eval_shape(functools.partial(served, shape=(n, k), dtype=jnp.bfloat16), *packed)
