"""The fused 4-bit products in Pallas Mosaic GPU, in Pallas's interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequantize_4bit import xla
from pallas_kernels.matmul_4bit import mosaic_gpu
from pallas_kernels.quantize_4bit.api import quantize_4bit, quantize_absmax

# Whatever a kernel does not write reads as NaN.
POISONED = plgpu.InterpretGPUParams(uninitialized_memory="nan")
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def packed_weight(shape, quant_type, block_size, double_quant, seed=0):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.02
    codes, absmax = quantize_4bit(jnp.asarray(w), quant_type=quant_type, block_size=block_size)
    if double_quant:
        return codes, *quantize_absmax(absmax)
    return codes, absmax, None, None


def meaning(packed, **static):
    return np.asarray(xla.dequantize(*packed, **static, dtype=jnp.float32), np.float64)


def random_rows(shape, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(function, *arrays, **static):
    """One call at a time: the interpreter's state is global, its threads wait for one another."""
    return jax.block_until_ready(function(*jax.block_until_ready(arrays), **static))


def assert_close(y, exact, magnitude, dtype, roundings=1):
    """Weights are rounded so often and the result once; float32 sums are far below both."""
    bound = ROUNDING[dtype] * (np.abs(exact) + roundings * magnitude) * 1.01 + 1e-7 * magnitude
    assert y.dtype == dtype
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound)


CASES = [
    # rows, W (ragged N, K an odd number of tiles, ...), format, block, double, dtype, tiles
    (1, (130, 320), "nf4", 64, True, "bfloat16", mosaic_gpu.Tiles(2, 2, 1, 1)),
    (3, (128, 192), "fp4", 64, False, "float16", mosaic_gpu.Tiles(2, 1, 2, 2)),
    (16, (128, 64 * 40), "int4", 128, True, "bfloat16", mosaic_gpu.Tiles(2, 1, 2, 3)),
    (64, (128, 64), "nf4", 64, False, "bfloat16", None),
]


@pytest.mark.parametrize("rows,shape,quant_type,block_size,double_quant,dtype,tiles", CASES)
def test_product_has_the_float64_meaning(
    rows, shape, quant_type, block_size, double_quant, dtype, tiles
):
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape)
    packed = packed_weight(shape, quant_type, block_size, double_quant)
    x = random_rows((rows, shape[1]), dtype)
    y = run(mosaic_gpu.matmul, x, *packed, **static, tiles=tiles, interpret=POISONED)
    w, x = meaning(packed, **static), np.asarray(x, np.float64)
    assert_close(y, x @ w.T, np.abs(x) @ np.abs(w).T, dtype)


TRANSPOSED_CASES = [
    (1, (130, 320), "nf4", 64, True, "bfloat16", mosaic_gpu.Tiles(2, 2, 1, 2)),
    (3, (640, 256), "fp4", 64, False, "float16", mosaic_gpu.Tiles(2, 1, 1, 2)),
    (16, (192, 512), "int4", 128, True, "bfloat16", mosaic_gpu.Tiles(2, 1, 1, 1)),
    (64, (128, 320), "nf4", 64, False, "bfloat16", None),
]


@pytest.mark.parametrize(
    "rows,shape,quant_type,block_size,double_quant,dtype,tiles", TRANSPOSED_CASES
)
def test_transposed_product_has_the_float64_meaning(
    rows, shape, quant_type, block_size, double_quant, dtype, tiles
):
    static = dict(quant_type=quant_type, block_size=block_size, shape=shape)
    packed = packed_weight(shape, quant_type, block_size, double_quant)
    g = random_rows((rows, shape[0]), dtype)
    y = run(mosaic_gpu.matmul_transposed, g, *packed, **static, tiles=tiles, interpret=POISONED)
    w, g = meaning(packed, **static), np.asarray(g, np.float64)
    # The codebook, absmax and their product are rounded.
    assert_close(y, g @ w, np.abs(g) @ np.abs(w), dtype, roundings=3)


def test_bias_and_low_rank_update_are_added_before_rounding():
    shape, rows, rank = (128, 128), 5, 8
    static = dict(quant_type="nf4", block_size=64, shape=shape)
    tiles = mosaic_gpu.Tiles(2)
    packed = packed_weight(shape, "nf4", 64, double_quant=True)
    x, bias = random_rows((rows, shape[1]), "bfloat16"), random_rows(shape[:1], "bfloat16", 2)
    lora = random_rows((rows, rank), "bfloat16", 3), random_rows((rank, shape[0]), "bfloat16", 4)
    y = run(
        mosaic_gpu.matmul, x, *packed, **static, bias=bias, lora=lora, tiles=tiles, interpret=True
    )
    w, x, bias, xa, b = (
        np.asarray(a, np.float64) for a in (meaning(packed, **static), x, bias, *lora)
    )
    assert_close(y, x @ w.T + bias + xa @ b, np.abs(x) @ np.abs(w).T, "bfloat16")


@pytest.mark.parametrize("product,axis", [("matmul", 1), ("matmul_transposed", 0)])
def test_every_run_gives_the_same_bits_and_no_thread_races_another(product, axis):
    shape = (256, 256)
    static = dict(quant_type="nf4", block_size=64, shape=shape, tiles=mosaic_gpu.Tiles(2, 1, 1, 1))
    packed = packed_weight(shape, "nf4", 64, double_quant=True)
    x, product = random_rows((2, shape[axis]), "bfloat16"), getattr(mosaic_gpu, product)
    racing = plgpu.InterpretGPUParams(detect_races=True)
    y = run(product, x, *packed, **static, interpret=racing)
    assert not interpret_pallas_call.get_races().races_found
    again = run(product, x, *packed, **static, interpret=True)
    assert jnp.array_equal(y, again)


@pytest.mark.parametrize(
    "change,reason",
    [
        (dict(dtype="float32"), "dtype"),
        (dict(rows=65), "rows"),
        (dict(rows=0), "rows"),
        (dict(shape=(129, 128)), "n=129"),
        (dict(shape=(64, 128)), "n=64"),
        (dict(shape=(128, 96)), "k=96"),
        (dict(block_size=32), "block_size=32"),
        (dict(interpret=False), "compute capability None"),
    ],
)
def test_other_input_is_left_to_other_implementations(change, reason):
    case = dict(rows=1, shape=(128, 128), dtype="bfloat16", block_size=64, interpret=True) | change
    n, k = case["shape"]
    x = jnp.zeros((case["rows"], k), case["dtype"])
    packed = jnp.zeros(n // 2 * k, jnp.uint8), jnp.zeros(n * k // case["block_size"]), None, None
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.matmul(
            x,
            *packed,
            quant_type="nf4",
            block_size=case["block_size"],
            shape=case["shape"],
            interpret=case["interpret"],
        )


def test_transposed_product_of_fewer_columns_than_a_tile_is_left_to_others():
    g, packed = jnp.zeros((1, 128), "bfloat16"), packed_weight((128, 64), "nf4", 64, False)
    static = dict(quant_type="nf4", block_size=64, shape=(128, 64))
    with pytest.raises(NotImplementedError, match="64"):
        mosaic_gpu.matmul_transposed(g, *packed, **static, interpret=True)


def test_tiles_cover_the_sum_and_refuse_nonsense():
    for tiles, length in ((32, 4096), (86, 4096), (52, 6656), (64, 22016)):
        chosen = mosaic_gpu.Tiles().with_splits(tiles, length, cores=132)
        part = 64 * chosen.blocks * chosen.warpgroups * chosen.splits
        assert (chosen.steps(length) - 1) * part < length <= chosen.steps(length) * part
    with pytest.raises(ValueError, match="warpgroups=3"):
        mosaic_gpu.Tiles(warpgroups=3)
    with pytest.raises(ValueError, match="splits=0"):
        mosaic_gpu.Tiles(splits=0)
