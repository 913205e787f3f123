"""The 4-bit core against golden files that bitsandbytes 0.50.2 wrote."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
import qlora_jax.quantized as ql
from pallas_kernels import formats

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "bitsandbytes.npz")
CASES = [(f"{i:02d}", name) for i, name in enumerate(GOLDEN["names"].tolist())]


def case(key, name):
    quant_type, block_size, _, dtype, double_quant, _ = name.split("|")
    x = GOLDEN[f"{key}.x"]
    x = jnp.asarray(x.view(jnp.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)))
    return x, quant_type, int(block_size), double_quant == "True"


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def from_golden(key, name):
    """The QuantizedTensor of bitsandbytes' own bytes."""
    x, quant_type, block_size, double_quant = case(key, name)
    codes = formats.interleaved_to_planar(GOLDEN[f"{key}.packed"], x.size, block_size)
    nested = GOLDEN[f"{key}.nested_absmax"] if double_quant else None
    offset = GOLDEN[f"{key}.offset"] if double_quant else None
    arrays = (codes, GOLDEN[f"{key}.absmax"], nested, offset)
    arrays = [None if a is None else jnp.asarray(a) for a in arrays]
    return ql.QuantizedTensor(*arrays, quant_type, block_size, x.shape, x.dtype)


def test_codebooks_are_equal_to_the_bit():
    same_bits(formats.CODEBOOKS["nf4"], GOLDEN["code_nf4"])
    np.testing.assert_array_equal(formats.CODEBOOKS["fp4"], GOLDEN["code_fp4"])
    same_bits(formats.DYNAMIC_MAP, GOLDEN["dynamic_map"])


@pytest.mark.parametrize(("key", "name"), CASES)
def test_codes_and_scales(key, name):
    x, quant_type, block_size, double_quant = case(key, name)
    codes, absmax = pk.quantize_4bit(x, quant_type=quant_type, block_size=block_size)
    packed = formats.planar_to_interleaved(codes, x.size, block_size)
    np.testing.assert_array_equal(packed, GOLDEN[f"{key}.packed"])
    if not double_quant:
        same_bits(absmax, GOLDEN[f"{key}.absmax"])
        return
    codes8, nested, offset = pk.quantize_absmax(absmax)
    np.testing.assert_array_equal(codes8, GOLDEN[f"{key}.absmax"])
    theirs = GOLDEN[f"{key}.offset"]
    assert abs(offset - theirs) <= np.spacing(theirs)
    np.testing.assert_allclose(nested, GOLDEN[f"{key}.nested_absmax"], rtol=3e-6)


@pytest.mark.parametrize(("key", "name"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_from_the_same_bytes(key, name, dtype):
    q = from_golden(key, name)
    same_bits(ql.dequantize(q, jnp.dtype(dtype)), GOLDEN[f"{key}.dequantized_{dtype}"])


@pytest.mark.parametrize(("key", "name"), CASES)
def test_repacking_loses_nothing(key, name):
    q = from_golden(key, name)
    size = int(np.prod(q.shape))
    back = formats.planar_to_interleaved(q.codes, size, q.block_size)
    np.testing.assert_array_equal(back, GOLDEN[f"{key}.packed"])
