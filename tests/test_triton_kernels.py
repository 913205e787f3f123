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
    codes, absmax = pk.quantize_4bit(x, quant_type=quant_type, block_size=block_size)
    return (codes, *pk.quantize_absmax(absmax)) if double_quant else (codes, absmax, None, None)


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
    expected = dequantize_xla.dequantize(*weight, **static)
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
    expected = quantize_xla.quantize(x, **static)
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


def compiled(operation, target):
    """Launches of an operation at a LLaMA shape in the dtype that the target knows."""
    dtype = jnp.dtype("float16" if target < 80 else "bfloat16")
    static = dict(quant_type="nf4", block_size=64)
    shape = (4096, 4096)
    if operation == "dequantize":
        call = functools.partial(dequantize_triton.dequantize, **static, shape=shape, dtype=dtype)
        return compile_launches(call, *abstract(shape), compute_capability=target)
    call = functools.partial(quantize_triton.quantize, **static)
    return compile_launches(call, jax.ShapeDtypeStruct(shape, dtype), compute_capability=target)


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", ("dequantize", "quantize"))
def test_compiles_without_spills(operation, target):
    launches = compiled(operation, target)
    assert len(launches) == 1
    for launch in launches:
        assert launch.spill_bytes == 0
        assert f".target sm_{target}" in launch.ptx
        assert launch.instructions()["EXIT"] >= 1


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
    call = functools.partial(
        dequantize_triton.dequantize,
        quant_type="nf4",
        block_size=64,
        shape=shape,
        dtype=jnp.bfloat16,
        compute_capability=90,
    )
    traced = jax.jit(call).trace(*abstract(shape))
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
