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


def assert_close(y, exact, magnitude, dtype):
    """The codebook is rounded once and the result once; float32 sums are far below both."""
    bound = ROUNDING[dtype] * (np.abs(exact) + magnitude) * 1.01 + 1e-7 * magnitude
    assert y.dtype == dtype
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound)


CASES = [
    # rows, W (ragged N, K an odd number of tiles, ...), format, block, double, dtype, tiles
    (1, (192, 320), "nf4", 64, True, "bfloat16", mosaic_gpu.Tiles(2, 2, 1, 2)),
    (3, (130, 320), "fp4", 64, False, "float16", mosaic_gpu.Tiles(2, 1, 2, 2)),
    (16, (128, 64 * 40), "int4", 128, True, "bfloat16", mosaic_gpu.Tiles(2, 2, 1, 3)),
    (64, (128, 192), "nf4", 64, False, "bfloat16", None),
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


def test_every_run_gives_the_same_bits_and_no_thread_races_another():
    shape = (128, 512)
    static = dict(quant_type="nf4", block_size=64, shape=shape, tiles=mosaic_gpu.Tiles(2, 2, 1, 2))
    packed = packed_weight(shape, "nf4", 64, double_quant=True)
    x = random_rows((2, shape[1]), "bfloat16")
    racing = plgpu.InterpretGPUParams(detect_races=True)
    y = run(mosaic_gpu.matmul, x, *packed, **static, interpret=racing)
    assert not interpret_pallas_call.get_races().races_found
    again = run(mosaic_gpu.matmul, x, *packed, **static, interpret=True)
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
        (dict(shape=(128, 64)), "k=64"),
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


def test_tiles_cover_the_weight_and_refuse_nonsense():
    for rows in (1, 16, 64):
        for shape in ((4096, 4096), (11008, 4096), (6656, 6656), (8192, 22016)):
            tiles = mosaic_gpu.Tiles.choose(rows, shape)
            columns = 64 * tiles.blocks * tiles.warpgroups * tiles.splits
            assert (tiles.steps(shape[1]) - 1) * columns < shape[1]
            assert tiles.steps(shape[1]) * columns >= shape[1]
    with pytest.raises(ValueError, match="warpgroups=3"):
        mosaic_gpu.Tiles(warpgroups=3)
    with pytest.raises(ValueError, match="blocks=3"):
        mosaic_gpu.Tiles(blocks=3)
