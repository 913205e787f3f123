"""What the compiler makes of the Triton kernels gives the right values: their PTX, executed."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import test_triton_kernels as kernels
import triton_ptx

from pallas_kernels import triton_call, triton_interpret, triton_report
from pallas_kernels.dequantize_4bit import triton as dequantize_triton
from pallas_kernels.matmul_4bit import triton as matmul_triton
from pallas_kernels.quantize_4bit import triton as quantize_triton

if triton_call.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


@pytest.fixture
def executes_ptx(monkeypatch):
    """Inside, `interpret=True` compiles the kernel and executes its PTX."""
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(triton_call.recording())

        def call(kernel, arrays, out, *, grid, constants):
            launch = triton_report.compile_record(records[-1])
            outputs = [triton_interpret.poisoned(o.shape, o.dtype) for o in out]
            buffers = [np.array(a) for a in arrays] + outputs
            triton_ptx.run(launch.ptx, buffers, grid=launch.grid, num_warps=launch.num_warps)
            return tuple(map(jnp.asarray, outputs))

        monkeypatch.setattr(triton_interpret, "call", call)
        yield


def half(target):
    return "float16" if target < 80 else "bfloat16"


@pytest.mark.parametrize("target, dtype", ((75, "float16"), (80, "bfloat16"), (90, "float32")))
def test_dequantize(executes_ptx, target, dtype):
    weight = kernels.packed((33, 80), "nf4", 64, True)
    static = dict(quant_type="nf4", block_size=64, shape=(33, 80), dtype=jnp.dtype(dtype))
    options = dict(interpret=True, compute_capability=target)
    got = dequantize_triton.dequantize(*weight, **static, **options)
    kernels.assert_same_bits(got, kernels.dequantize_xla.dequantize(*weight, **static))


@pytest.mark.parametrize("target, quant_type", ((75, "nf4"), (80, "fp4"), (90, "int4")))
def test_quantize(executes_ptx, target, quant_type):
    x = kernels.numbers((33, 80), half(target))
    static = dict(quant_type=quant_type, block_size=64)
    got = quantize_triton.quantize(x, **static, interpret=True, compute_capability=target)
    for array, expected in zip(got, kernels.quantize_xla.quantize(x, **static), strict=True):
        kernels.assert_same_bits(array, expected)


# Target, format, rows of x, (out, in), block size: one row and many, ragged in every direction.
PRODUCTS = (
    (75, "nf4", 2, (70, 64 * 19), 64),
    (80, "nf4", 1, (64, 1024), 64),
    (80, "fp4", 3, (70, 64 * 19), 64),
    (80, "int4", 17, (34, 32 * 7), 32),
    (80, "nf4", 64, (38, 64 * 3), 64),
    (90, "nf4", 5, (34, 128 * 3), 128),
    (90, "fp4", 33, (38, 64 * 3), 64),
)


@pytest.mark.parametrize("target, quant_type, m, shape, block_size", PRODUCTS)
def test_products(executes_ptx, target, quant_type, m, shape, block_size):
    case = (quant_type, half(target), True, m, shape, block_size)
    x, g, weight, static, bias, lora = kernels.matmul_inputs(*case)
    w = kernels.dense(weight, shape, **static)
    options = dict(**static, shape=shape, interpret=True, compute_capability=target)
    y = matmul_triton.matmul(x, *weight, **options, bias=bias, lora=lora)
    one = (np.ones((m, 1)), np.asarray(bias, np.float64)[None, :])
    low_rank = [np.asarray(a, np.float64) for a in lora]
    kernels.assert_near(y, [(np.asarray(x, np.float64), w.T), low_rank, one])
    if target >= 80:
        dx = matmul_triton.matmul_transposed(g, *weight, **options)
        kernels.assert_near(dx, [(np.asarray(g, np.float64), w)])


@pytest.mark.parametrize("n", (4096, 8192))
def test_a_row_with_the_tiles_of_a_big_weight(executes_ptx, n):
    """Many warps, or twice the rows a program: what an H100 gets at M = 1."""
    tiles = matmul_triton.Tiles.of(1, n, n, 90)
    shape = (128, 2048)
    x, _, weight, static, _, _ = kernels.matmul_inputs("nf4", "bfloat16", True, 1, shape, 64)
    options = dict(**static, shape=shape, tiles=tiles, interpret=True, compute_capability=90)
    y = matmul_triton.matmul(x, *weight, **options)
    w = kernels.dense(weight, shape, **static)
    kernels.assert_near(y, [(np.asarray(x, np.float64), w.T)])
