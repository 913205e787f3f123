"""The Triton kernels: values in Triton's interpreter, machine code for every architecture."""

import functools
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import formats, triton_call
from pallas_kernels.dequantize_4bit import triton as dequantize_triton
from pallas_kernels.dequantize_4bit import xla as dequantize_xla
from pallas_kernels.matmul_4bit import triton as matmul_triton
from pallas_kernels.quantize_4bit import triton as quantize_triton
from pallas_kernels.quantize_4bit import xla as quantize_xla
from pallas_kernels.triton_report import compile_launches

needs_triton = pytest.mark.skipif(
    triton_call.triton is None, reason="Triton is not installed: pip install qlora_jax[cuda]"
)
TYPES = tuple(formats.CODEBOOKS)
TARGETS = triton_call.COMPUTE_CAPABILITIES
# Blocks inside rows, across rows, a short last one, odd counts, one element, other ranks.
SHAPES = ((8, 64), (48, 96), (33, 80), (1, 1), (3, 5, 7), (130,))


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.ndim else array


def assert_same_bits(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_array_equal(bits(got), bits(expected))


def numbers(shape, dtype, seed=0):
    """Weights of a few scales, with a block of zeros and one of subnormals where there is room."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    flat = x.reshape(-1) * np.float32(0.05)
    if flat.size > 256:
        flat[64:128] = 0
        flat[128:192] = rng.standard_normal(64) * 1e-40
    return jnp.asarray(flat.reshape(shape)).astype(dtype)


@functools.cache
def packed(shape, quant_type, block_size, double_quant, seed=0):
    x = numbers(shape, "float32", seed)

    @jax.jit
    def pack(x):
        codes, absmax = pk.quantize_4bit(x, quant_type=quant_type, block_size=block_size)
        return (codes, *pk.quantize_absmax(absmax)) if double_quant else (codes, absmax, None, None)

    return pack(x)


def abstract(shape, *, block_size=64, double_quant=True):
    """Packed weights of that shape, without values."""
    blocks = formats.num_blocks(int(np.prod(shape)), block_size)
    codes = jax.ShapeDtypeStruct((formats.plane_size(int(np.prod(shape)), block_size),), jnp.uint8)
    if not double_quant:
        return codes, jax.ShapeDtypeStruct((blocks,), jnp.float32), None, None
    nested = jax.ShapeDtypeStruct((-(-blocks // 256),), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return codes, jax.ShapeDtypeStruct((blocks,), jnp.uint8), nested, scalar


DEQUANTIZE_CASES = [
    *((t, "bfloat16", s, 64, True) for t, s in itertools.product(TYPES, SHAPES)),
    *((t, "bfloat16", (33, 80), 64, False) for t in TYPES),
    *((t, d, (33, 80), 64, True) for t, d in itertools.product(TYPES, ("float16", "float32"))),
    *(("nf4", "bfloat16", (33, 80), b, True) for b in (32, 128, 4096)),
    ("nf4", "bfloat16", (35, 512), 64, True),  # several programs, the last one partly outside
]


@needs_triton
@pytest.mark.parametrize("quant_type, dtype, shape, block_size, double_quant", DEQUANTIZE_CASES)
def test_dequantize_equals_xla_to_the_bit(quant_type, dtype, shape, block_size, double_quant):
    weight = packed(shape, quant_type, block_size, double_quant)
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape, dtype=jnp.dtype(dtype))
    expected = jax.jit(functools.partial(dequantize_xla.dequantize, **static))(*weight)
    # The interpreter starts with NaN in the result: what is not written differs.
    assert_same_bits(dequantize_triton.dequantize(*weight, **static, interpret=True), expected)


QUANTIZE_CASES = [
    *((t, "bfloat16", s, 64) for t, s in itertools.product(TYPES, SHAPES)),
    *((t, d, (33, 80), 64) for t, d in itertools.product(TYPES, ("float16", "float32"))),
    *(("nf4", "float32", (2, 4100), b) for b in (32, 256, 4096)),
]


@needs_triton
@pytest.mark.parametrize("quant_type, dtype, shape, block_size", QUANTIZE_CASES)
def test_quantize_equals_xla_to_the_bit(quant_type, dtype, shape, block_size):
    x = numbers(shape, dtype)
    static = dict(quant_type=quant_type, block_size=block_size)
    codes, absmax = quantize_triton.quantize(x, **static, interpret=True)
    expected = jax.jit(functools.partial(quantize_xla.quantize, **static))(x)
    assert_same_bits(codes, expected[0])
    assert_same_bits(absmax, expected[1])


@needs_triton
def test_every_code_comes_back():
    """Quantizing the codebook gives each code, and decoding it gives the codebook, by the bit."""
    for quant_type, codebook in formats.CODEBOOKS.items():
        values = np.tile(codebook[1:] if quant_type == "int4" else codebook, 8)[:64]
        values[0] = 1  # the block's absmax
        static = dict(quant_type=quant_type, block_size=64)
        codes, absmax = quantize_triton.quantize(jnp.asarray(values), **static, interpret=True)
        got = dequantize_triton.dequantize(
            codes, absmax, None, None, **static, shape=(64,), dtype=jnp.float32, interpret=True
        )
        np.testing.assert_array_equal(np.asarray(got), values)


def normal(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense(weight, shape, **static):
    """The weight that the codes mean, in float64."""
    static |= dict(shape=shape, dtype=jnp.dtype("float32"))
    w = jax.jit(functools.partial(dequantize_xla.dequantize, **static))(*weight)
    return np.asarray(w, np.float64)


def assert_near(got, terms):
    """Within the rounding of the weights and of the result, and of sums of that length in float32.

    Args:
        got: the result.
        terms: pairs of float64 matrices; the result is the sum of their products.
    """
    expected = sum(a @ b for a, b in terms)
    size = sum(np.abs(a) @ np.abs(b) for a, b in terms)
    length = sum(a.shape[1] for a, _ in terms)
    eps = float(jnp.finfo(got.dtype).eps)
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert (error <= (eps + length * 2.0**-24) * size).all(), (error / size / eps).max()


# Rows of x, (out, in), block size. K = 64 * odd; N not a multiple of the tile; one row and many.
MATMUL_SHAPES = (
    (1, (64, 1024), 64),
    (1, (70, 64 * 19), 64),
    (3, (34, 32 * 7), 32),
    (7, (66, 128 * 5), 128),
    (16, (2, 64), 64),
    (17, (96, 512), 256),
    (64, (38, 64 * 3), 64),
    (5, (32, 4096), 4096),
)
MATMUL_CASES = [
    *(("nf4", "bfloat16", True, *s) for s in MATMUL_SHAPES),
    *((t, "float16", d, *MATMUL_SHAPES[1]) for t in TYPES for d in (False, True)),
    *((t, "bfloat16", False, *MATMUL_SHAPES[6]) for t in ("fp4", "int4")),
]


def matmul_inputs(quant_type, dtype, double_quant, m, shape, block_size):
    weight = packed(shape, quant_type, block_size, double_quant)
    static = dict(quant_type=quant_type, block_size=block_size)
    n, k = shape
    bias, lora = normal(n, dtype, 3), (normal((m, 24), dtype, 4), normal((24, n), dtype, 5))
    return normal((m, k), dtype, 1), normal((m, n), dtype, 2), weight, static, bias, lora


@needs_triton
@pytest.mark.parametrize("quant_type, dtype, double_quant, m, shape, block_size", MATMUL_CASES)
def test_products_are_near_their_meaning(quant_type, dtype, double_quant, m, shape, block_size):
    case = (quant_type, dtype, double_quant, m, shape, block_size)
    x, g, weight, static, bias, lora = matmul_inputs(*case)
    w = dense(weight, shape, **static)
    options = dict(**static, shape=shape, interpret=True)
    y = matmul_triton.matmul(x, *weight, **options)
    assert y.dtype == x.dtype and y.shape == (m, shape[0])
    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    assert_near(y, [(x64, w.T)])
    y = matmul_triton.matmul(x, *weight, **options, bias=bias, lora=lora)
    low_rank = [np.asarray(a, np.float64) for a in lora]
    one = (np.ones((m, 1)), np.asarray(bias, np.float64)[None, :])
    assert_near(y, [(x64, w.T), low_rank, one])
    dx = matmul_triton.matmul_transposed(g, *weight, **options)
    assert dx.dtype == g.dtype and dx.shape == x.shape
    assert_near(dx, [(g64, w)])


@needs_triton
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("m, shape, block_size", MATMUL_SHAPES[:4])
def test_rows_without_tensor_cores_are_near_their_meaning(quant_type, m, shape, block_size):
    case = (quant_type, "float16", True, m, shape, block_size)
    x, _, weight, static, bias, lora = matmul_inputs(*case)
    options = dict(**static, shape=shape, bias=bias, lora=lora, interpret=True)
    y = matmul_triton.matmul(x, *weight, **options, compute_capability=75)
    x64 = np.asarray(x, np.float64)
    one = (np.ones((m, 1)), np.asarray(bias, np.float64)[None, :])
    low_rank = [np.asarray(a, np.float64) for a in lora]
    assert_near(y, [(x64, dense(weight, shape, **static).T), low_rank, one])


@needs_triton
def test_products_split_over_programs_add_up_the_same_every_time():
    x, g, weight, static, bias, lora = matmul_inputs("nf4", "bfloat16", True, 2, (64, 64 * 11), 64)
    tiles = matmul_triton.Tiles(warps=2, splits=3, num_stages=2)
    options = dict(**static, shape=(64, 64 * 11), interpret=True, tiles=tiles)
    w = dense(weight, (64, 64 * 11), **static)
    first = matmul_triton.matmul(x, *weight, **options, bias=bias, lora=lora)
    one = (np.ones((2, 1)), np.asarray(bias, np.float64)[None, :])
    low_rank = [np.asarray(a, np.float64) for a in lora]
    assert_near(first, [(np.asarray(x, np.float64), w.T), low_rank, one])
    assert_same_bits(matmul_triton.matmul(x, *weight, **options, bias=bias, lora=lora), first)
    dx = matmul_triton.matmul_transposed(g, *weight, **options)
    assert_near(dx, [(np.asarray(g, np.float64), w)])


def compiled(operation, target, shape=(4096, 4096), m=1, quant_type="nf4"):
    """Launches of an operation at a LLaMA shape in the dtype that the target knows."""
    dtype = jnp.dtype("float16" if target < 80 else "bfloat16")
    static = dict(quant_type=quant_type, block_size=64)
    if operation == "quantize":
        call = functools.partial(quantize_triton.quantize, **static)
        return compile_launches(call, jax.ShapeDtypeStruct(shape, dtype), compute_capability=target)
    if operation == "dequantize":
        call = functools.partial(dequantize_triton.dequantize, **static, shape=shape, dtype=dtype)
        return compile_launches(call, *abstract(shape), compute_capability=target)
    call = functools.partial(getattr(matmul_triton, operation), **static, shape=shape)
    x = jax.ShapeDtypeStruct((m, shape[operation == "matmul"]), dtype)
    return compile_launches(call, x, *abstract(shape), compute_capability=target)


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", ("dequantize", "quantize", "matmul"))
def test_compiles_without_spills(operation, target):
    (launch,) = compiled(operation, target)
    assert launch.spill_bytes == 0
    assert f".target sm_{target}" in launch.ptx
    assert launch.instructions()["EXIT"] >= 1


@needs_triton
@pytest.mark.parametrize("target", (80, 90))
@pytest.mark.parametrize("operation", ("matmul", "matmul_transposed"))
@pytest.mark.parametrize("m", (1, 16, 64))
def test_products_use_tensor_cores_without_spills(operation, target, m):
    (launch,) = compiled(operation, target, m=m, shape=(11008, 4096))
    opcodes = launch.instructions()
    assert opcodes["HMMA"] > 0 and launch.spill_bytes == 0
    # The least that a program may have: sm_86 and sm_89.
    assert launch.shared_bytes <= 99 * 1024


@needs_triton
@pytest.mark.parametrize("target, n, most", ((80, 4096, 4.8), (89, 4096, 4.8), (90, 8192, 4.0)))
def test_one_row_costs_few_instructions(target, n, most):
    """The main loop at M = 1, double quantization included; an H100's memory allows about 4.6."""
    (launch,) = compiled("matmul", target, shape=(n, n))
    tiles = matmul_triton.Tiles.of(1, n, n, target)
    weights_of_a_thread = 2 * tiles.rows * n // (32 * tiles.warps)
    steps = n // (64 * tiles.warps)
    assert longest_loop(launch.sass) * steps / weights_of_a_thread < most


@needs_triton
@pytest.mark.parametrize("target", (80, 86, 90))
@pytest.mark.parametrize("shape", ((4096, 4096), (8192, 8192), (17920, 6656), (256, 64)))
def test_default_tiles_fit(target, shape):
    for m in (1, 9, 64):
        tiles = matmul_triton.Tiles.of(m, *shape, target)
        programs = tiles.splits * -(-shape[0] // (2 * tiles.rows))
        assert programs >= 104 or shape[1] < 1024  # about one for each multiprocessor
        assert 64 * tiles.warps * tiles.splits <= max(64, shape[1])  # all of them have work


def longest_loop(sass):
    """Instructions between a label and a branch back to it, of the longest such loop."""
    places, count, longest = {}, 0, 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = count
        if re.search(r"/\*[0-9a-f]{4}\*/", line):
            count += 1
        branch = re.search(r"BRA.*?(\.L_\w+)", line)
        if branch and branch[1] in places:
            longest = max(longest, count - places[branch[1]])
    return longest


@needs_triton
@pytest.mark.parametrize("target", (75, 90))
def test_nested_absmax_is_rounded_twice(target):
    """The product and the sum of double quantization are not contracted into one rounding."""
    (launch,) = compiled("dequantize", target)
    opcodes = launch.instructions()
    assert opcodes["FFMA"] == 0 and opcodes["FADD"] > 0
    assert "fma" not in launch.ptx


@needs_triton
def test_lowers_through_jax():
    """The call holds one Triton kernel, and JAX's runtime makes its machine code."""
    shape = (64, 128)
    static = dict(quant_type="nf4", block_size=64, shape=shape, compute_capability=90)
    matmul = functools.partial(matmul_triton.matmul, **static)
    x = jax.ShapeDtypeStruct((3, 128), jnp.bfloat16)
    traced = jax.jit(matmul).trace(x, *abstract(shape))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @triton_kernel_call_ffi", text)) == 1


@needs_triton
def test_refuses_what_it_does_not_serve():
    weight = packed((8, 64), "nf4", 64, True)
    static = dict(quant_type="nf4", block_size=64)
    call = functools.partial(dequantize_triton.dequantize, *weight, **static, shape=(8, 64))
    with pytest.raises(NotImplementedError, match="bfloat16.*75"):
        call(dtype=jnp.bfloat16, compute_capability=75)
    with pytest.raises(NotImplementedError, match="sm_75"):
        call(dtype=jnp.float16, compute_capability=70)
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        call(dtype=jnp.float16)  # the tests' device is a CPU
    with pytest.raises(NotImplementedError, match="int32"):
        quantize_triton.quantize(jnp.zeros(4, jnp.int32), **static, interpret=True)

    def matmul(x, shape=(8, 64), **options):
        matmul_triton.matmul(x, *weight, **static, shape=shape, interpret=True, **options)

    x = jnp.zeros((1, 64), jnp.float16)
    with pytest.raises(NotImplementedError, match="float32"):
        matmul(x.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="65"):
        matmul(jnp.zeros((65, 64), jnp.float16))
    with pytest.raises(NotImplementedError, match=r"\(7, 64\)"):
        matmul(x, shape=(7, 64))
    with pytest.raises(NotImplementedError, match=r"\(8, 96\)"):
        matmul(x, shape=(8, 96))
    with pytest.raises(NotImplementedError, match="8 rows"):
        matmul(jnp.zeros((9, 64), jnp.float16), compute_capability=75)


def test_imports_without_triton():
    """The package works without the extra; only a kernel's call says what to install."""
    program = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None
import jax.numpy as jnp
from pallas_kernels.quantize_4bit import triton
try:
    triton.quantize(jnp.ones(64), quant_type="nf4", block_size=64)
except NotImplementedError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install qlora_jax[cuda]" in result.stdout
