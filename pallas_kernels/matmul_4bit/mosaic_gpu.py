"""`x @ W.T` for few rows of `x`, decoding a 4-bit `W` on its way into the tensor cores (Hopper).

At M <= 64 rows the product is bound by reading `W`: half a byte a weight, and about 4.6
instructions of a lane in the time that takes an H100. So the weight is the operand that `wgmma`
takes from registers, 64 rows of it, and `x.T` (padded to a multiple of 8 columns) the one in
shared memory:

    y.T [64 rows of W, M]  +=  W [64 rows, 64 elements] @ x.T [64 elements, M]

A tile of 64 x 64 bytes is two tiles of W, rows `r` (high nibbles) and `r + N/2` (low nibbles),
with one accumulator each. `mosaic_pairs` tells how bytes become operands. The 64 elements are
within one block of the format: the operands are bare codebook values in `x.dtype`, and

    y[r] += absmax[r, block] * (codebook[codes[r, 64 elements]] @ x.T)

in float32, which costs `M / 64` multiply-adds a weight and no rounding. Relative to the sum of
the magnitudes of a row's products, the error is at most that of rounding the codebook once (2**-8
in bfloat16, 2**-11 in float16) and that of `y` itself, with float32 summation below both.

**Work.** A block of threads has 64 rows of bytes and one of `splits` parts of the columns, its
`warpgroups` have equal parts of those, each with a ring of `stages` buffers that TMA fills. The
scales of up to 16 blocks are decoded at a time, from both levels of double quantization, into
shared memory. The warpgroups' sums are added in shared memory, in order; the splits' by XLA, in
order, with bias and the low-rank update, in float32 and rounded once. There are no atomic
additions: every run gives the same bits.

In machine code for sm_90 the loop over the tiles has 3.3 instructions a weight at M = 1, 3.4 at
M = 16 and 4.6 at M = 64, 2 of them for decoding and 0.4 to 0.6 for refilling a buffer; the scales
of double quantization take 0.25 more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import DYNAMIC_MAP
from pallas_kernels.matmul_4bit.mosaic_gpu_transposed import matmul_transposed
from pallas_kernels.matmul_4bit.mosaic_pairs import (
    BYTES,
    TABLE_SHAPE,
    decode_planes,
    fill_table,
    pair_table,
    to_operand_order,
)
from pallas_kernels.matmul_4bit.mosaic_scales import Scales, store
from pallas_kernels.matmul_4bit.mosaic_tiles import (
    TILE,
    Tiles,
    check_served,
    interpret_params,
    multiply_transposed,
)
from pallas_kernels.tuning import measured_tiles

__all__ = ["Tiles", "matmul", "matmul_transposed"]

# Tiles of columns whose scales are decoded at a time.
_CHUNK = 16
_ROW = plgpu.Layout.WGMMA.reduce(1)


def matmul(
    x: Float[Array, "m in"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
    bias: Float[Array, " out"] | None = None,
    lora: tuple[Float[Array, "m r"], Float[Array, "r out"]] | None = None,
    tiles: Tiles | None = None,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> Float[Array, "m out"]:
    """`x @ W.T + xa @ b + bias` in `x.dtype`, summed in float32 and rounded once.

    Args:
        x: bfloat16 or float16, at most 64 rows.
        codes: planar, as `quantize_4bit` makes them.
        absmax: float32, or uint8 with double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: `(out, in)` of W.
        bias: of `out` numbers, or None.
        lora: `(xa, b)` of a low-rank update, or None.
        tiles: how to cut the work; by default chosen by shape.
        interpret: whether to run in Pallas's interpreter, on any device.

    Raises:
        NotImplementedError: for what this kernel does not serve.
    """
    check_served(x, shape, block_size, interpret)
    tiles = tiles or measured_tiles(Tiles, "matmul", "mosaic_gpu", shape, x.shape[0])
    tiles = tiles or _default_tiles(x.shape[0], shape)
    parts = _partial_products(
        x, codes, absmax, nested_absmax, offset, quant_type, block_size, shape, tiles, interpret
    )
    y = parts.sum(0).T[: x.shape[0]]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if lora is not None:
        y = y + jnp.matmul(*lora, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _default_tiles(rows: int, shape: tuple[int, int]) -> Tiles:
    # More rows need more registers and larger buffers. With the 255 registers that a thread has at
    # most, more than 32 rows leave none to overlap two tiles of columns.
    if rows <= 16:
        base = Tiles(stages=3 if rows <= 8 else 2)
    else:
        base = Tiles(warpgroups=2) if rows <= 32 else Tiles(warpgroups=2, blocks=1, stages=4)
    return base.with_splits(-(-shape[0] // (2 * TILE)), shape[1])


def _partial_products(
    x, codes, absmax, nested_absmax, offset, quant_type, block_size, shape, tiles, interpret
) -> Float32[Array, "splits out m_padded"]:
    (m, k), n, dtype = x.shape, shape[0], x.dtype
    m_padded, half = -(-m // 8) * 8, n // 2
    steps = tiles.steps(k)
    k_padded = steps * tiles.blocks * tiles.warpgroups * tiles.splits * TILE
    x = to_operand_order(jnp.pad(x, ((0, m_padded - m), (0, k_padded - k))))
    table = jnp.asarray(pair_table(quant_type, dtype))
    arrays = [x, codes.reshape(half, k), table, absmax]
    if nested_absmax is not None:
        arrays += [jnp.asarray(DYNAMIC_MAP), nested_absmax, offset.reshape(1)]
    scales = Scales(shape, block_size, _CHUNK, nested_absmax is not None, bool(interpret))
    last_tile, chunk = k // TILE - 1, _CHUNK // tiles.blocks

    def kernel(x_gmem, codes_gmem, table_gmem, *refs):
        *scales_gmem, out_gmem, x_smem, codes_smem, table_smem, scales_smem, sums_smem = refs[:-2]
        full, meeting = refs[-2:]
        wg, split = lax.axis_index("wg"), lax.axis_index("split")
        row = jnp.minimum(lax.axis_index("rows") * TILE, half - TILE)
        first = (split * tiles.warpgroups + wg) * (steps * tiles.blocks)

        def fetch(step, slot):
            barrier, start = full.at[wg * tiles.stages + slot], first + step * tiles.blocks
            x_tiles = x_gmem.at[:, pl.ds(start * TILE, tiles.blocks * TILE)]
            plgpu.copy_gmem_to_smem(x_tiles, x_smem.at[wg, slot], barrier)
            for i in range(tiles.blocks):
                # Beyond the last column x is zero, and any finite weight will do.
                code_columns = pl.ds(jnp.minimum(start + i, last_tile) * TILE, TILE)
                code_tile = codes_gmem.at[pl.ds(row, TILE), code_columns]
                plgpu.copy_gmem_to_smem(code_tile, codes_smem.at[wg, slot, i], barrier)

        def product(slot, i):
            x_tile = x_smem.at[wg, slot, :, pl.ds(i * TILE, TILE)]
            with jax.named_scope("decode"):
                codes = plgpu.load(codes_smem.at[wg, slot, i], layout=BYTES, optimized=False)
                planes = decode_planes(codes, table_smem, dtype, interpret=bool(interpret))
            with jax.named_scope("multiply"):
                if interpret:  # has no wgmma with an operand in registers
                    return [multiply_transposed(w, x_tile[...]) for w in planes]
                accumulator = plgpu.ACC((TILE, m_padded), jnp.float32)

                def multiply(*accumulators):
                    for w, sums in zip(planes, accumulators, strict=True):
                        plgpu.wgmma(sums, w, x_tile.transpose((1, 0)))
                    return tuple(sums[...] for sums in accumulators)

                return pl.run_scoped(multiply, accumulator, accumulator)

        def step(i, totals):
            slot = lax.rem(i, tiles.stages)

            if steps > chunk:

                @pl.when((lax.rem(i, chunk) == 0) & (i > 0))
                def _():
                    with jax.named_scope("scales"):
                        tile = first + i * tiles.blocks
                        scales.store(scales_smem.at[wg], scales.decode(scales_gmem, row, tile))

            plgpu.barrier_wait(full.at[wg * tiles.stages + slot])
            for j in range(tiles.blocks):
                column = lax.rem(i, chunk) * tiles.blocks + j
                totals = tuple(
                    total + _to_columns(scales_smem.at[wg, plane, :, column], m_padded) * sums
                    for plane, (total, sums) in enumerate(
                        zip(totals, product(slot, j), strict=True)
                    )
                )

            @pl.when(i + tiles.stages < steps)
            def _():
                plgpu.commit_smem()  # What was read through registers, before TMA overwrites it.
                fetch(i + tiles.stages, slot)

            return totals

        with jax.named_scope("prologue"):
            for i in range(min(tiles.stages, steps)):
                fetch(i, i)
            first_scales = scales.decode(scales_gmem, row, first)
            fill_table(table_gmem, table_smem, wg, tiles.warpgroups)
            scales.store(scales_smem.at[wg], first_scales)
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)
        zero = plgpu.layout_cast(jnp.zeros((TILE, m_padded), jnp.float32), plgpu.Layout.WGMMA)
        totals = lax.fori_loop(0, steps, step, (zero, zero))
        with jax.named_scope("sum_warpgroups"):
            for plane, total in enumerate(totals):
                store(sums_smem.at[wg, plane], total)
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)

            @pl.when(wg < 2)
            def _():
                parts = [
                    plgpu.load(sums_smem.at[i, wg], layout=plgpu.Layout.WGMMA, optimized=False)
                    for i in range(tiles.warpgroups)
                ]
                out_gmem[split, pl.ds(wg * half + row, TILE)] = sum(parts[1:], parts[0])

    buffers = tiles.warpgroups, tiles.stages, tiles.blocks
    swizzled = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, n, m_padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((*buffers[:2], m_padded, tiles.blocks * TILE), dtype, transforms=swizzled),
            plgpu.SMEM((*buffers, TILE, TILE), jnp.uint8),
            plgpu.SMEM(TABLE_SHAPE, jnp.uint32),
            plgpu.SMEM((tiles.warpgroups, *scales.smem), jnp.float32),
            plgpu.SMEM((tiles.warpgroups, 2, TILE, m_padded), jnp.float32),
            plgpu.Barrier(
                num_arrivals=tiles.blocks + 1, num_barriers=tiles.warpgroups * tiles.stages
            ),
            plgpu.Barrier(num_arrivals=tiles.warpgroups),
        ],
        grid=(-(-half // TILE), tiles.splits),
        grid_names=("rows", "split"),
        num_threads=tiles.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret_params(interpret),
    )(*arrays)


def _to_columns(scales_smem, columns: int):
    scales = plgpu.load(scales_smem, layout=_ROW, optimized=False)
    return lax.broadcast_in_dim(scales, (TILE, columns), (0,))
