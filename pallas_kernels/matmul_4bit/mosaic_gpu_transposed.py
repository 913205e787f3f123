"""`g @ W` for few rows of `g`, decoding a 4-bit `W` on its way into the tensor cores (Hopper).

The gradient of `x @ W.T`. As there (`mosaic_gpu`), W is the operand in registers, now
transposed:

    y.T [256 columns of W, M]  +=  W.T [256 columns, 128 rows] @ g.T [128 rows, M]

where the 128 rows are the two nibbles of 64 rows of bytes; `mosaic_columns` tells how they
become four operands. Scales change along this sum, so weights are scaled in `g.dtype`: the
codebook, absmax and their product are rounded once each. Relative to the sum of the magnitudes
of the products, the error is at most three roundings (3 * 2**-8 in bfloat16, 3 * 2**-11 in
float16) and that of `y`.

A block of threads has 256 columns and one of `splits` parts of the rows; the rest is as in
`mosaic_gpu`, with the scales of the next tile on their way while one is multiplied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import DYNAMIC_MAP
from pallas_kernels.matmul_4bit.mosaic_columns import (
    COLUMNS,
    SWIZZLE,
    SWIZZLED,
    decode_columns,
    from_operand_rows,
    to_reduction_order,
)
from pallas_kernels.matmul_4bit.mosaic_pairs import TABLE_SHAPE, fill_table, pair_table
from pallas_kernels.matmul_4bit.mosaic_scales import Scales, store
from pallas_kernels.matmul_4bit.mosaic_tiles import (
    TILE,
    Tiles,
    check_served,
    interpret_params,
    multiply_transposed,
)
from pallas_kernels.tuning import measured_tiles


def matmul_transposed(
    g: Float[Array, "m out"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    quant_type: str,
    block_size: int,
    shape: tuple[int, int],
    tiles: Tiles | None = None,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> Float[Array, "m in"]:
    """`g @ W` in `g.dtype`, summed in float32 and rounded once.

    Args:
        g: bfloat16 or float16, at most 64 rows.
        codes: planar, as `quantize_4bit` makes them.
        absmax: float32, or uint8 with double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: `(out, in)` of W.
        tiles: how to cut the work; by default chosen by shape.
        interpret: whether to run in Pallas's interpreter, on any device.

    Raises:
        NotImplementedError: for what this kernel does not serve.
    """
    check_served(g, shape, block_size, interpret)
    if shape[1] < SWIZZLE:
        raise NotImplementedError(f"{shape[1]=} columns: {SWIZZLE} at least are served")
    half, columns = shape[0] // 2, -(-shape[1] // COLUMNS)
    # With more rows than 8, the 128 registers of a thread in four warpgroups do not suffice.
    base = Tiles(warpgroups=4 if g.shape[0] <= 8 else 2, blocks=1)
    tiles = tiles or measured_tiles(Tiles, "matmul_transposed", "mosaic_gpu", shape, g.shape[0])
    tiles = tiles or base.with_splits(columns, half)
    if tiles.blocks != 1:
        raise NotImplementedError(f"{tiles.blocks=}: a buffer of g @ W holds one tile")
    packed = [codes.reshape(half, shape[1]), jnp.asarray(pair_table(quant_type, g.dtype)), absmax]
    if nested_absmax is not None:
        packed += [jnp.asarray(DYNAMIC_MAP), nested_absmax, offset.reshape(1)]
    scales = Scales(shape, block_size, COLUMNS // TILE, len(packed) > 3, bool(interpret))
    parts = _partial_products(g, packed, columns, scales, tiles, interpret)
    return from_operand_rows(parts.sum(0))[: g.shape[0], : shape[1]].astype(g.dtype)


def _partial_products(g, packed, columns, scales, tiles, interpret):
    m_padded, half, dtype = -(-g.shape[0] // 8) * 8, g.shape[1] // 2, g.dtype
    steps = tiles.steps(half)
    rows = steps * tiles.warpgroups * tiles.splits * TILE
    g = to_reduction_order(jnp.pad(g, ((0, m_padded - g.shape[0]), (0, 0))), rows)

    def kernel(g_gmem, codes_gmem, table_gmem, *refs):
        *scales_gmem, out_gmem, g_smem, codes_smem, table_smem, scales_smem, sums_smem = refs[:-2]
        full, meeting = refs[-2:]
        wg, split, column = (lax.axis_index(name) for name in ("wg", "split", "columns"))
        first = (split * tiles.warpgroups + wg) * steps

        def fetch(step, slot):
            barrier, row = full.at[wg * tiles.stages + slot], (first + step) * TILE
            for part in range(2):
                g_tile = g_gmem.at[:, pl.ds(2 * row + part * TILE, TILE)]
                plgpu.copy_gmem_to_smem(g_tile, g_smem.at[wg, slot, part], barrier)
            for half_tile in range(2):
                # TMA fills what lies beyond the last row or column with zeros: any finite weight.
                columns = pl.ds(column * COLUMNS + half_tile * SWIZZLE, SWIZZLE)
                code_tile = codes_gmem.at[pl.ds(row, TILE), columns]
                plgpu.copy_gmem_to_smem(code_tile, codes_smem.at[wg, slot, half_tile], barrier)

        def meet():
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)

        def decode_scales(step):
            with jax.named_scope("scales"):
                return scales.decode(scales_gmem, (first + step) * TILE, column * (COLUMNS // TILE))

        def multiply(i, totals):
            """Adds the products of one buffer to accumulators; interpreted, to arrays."""
            slot = lax.rem(i, tiles.stages)
            plgpu.barrier_wait(full.at[wg * tiles.stages + slot])
            for part in range(2):
                with jax.named_scope("decode"):
                    operands = decode_columns(
                        codes_smem.at[wg, slot],
                        scales_smem.at[wg],
                        table_smem,
                        part,
                        dtype,
                        interpret=bool(interpret),
                    )
                g_tile = g_smem.at[wg, slot, part]
                with jax.named_scope("multiply"):
                    if interpret:  # has no wgmma with an operand in registers
                        products = [multiply_transposed(w, g_tile[...]) for w in operands]
                        totals = tuple(a + b for a, b in zip(totals, products, strict=True))
                        continue
                    for w, total in zip(operands, totals, strict=True):
                        plgpu.wgmma(total, w, g_tile.transpose((1, 0)))
                    plgpu.wgmma_wait(0)

            @pl.when(i + tiles.stages < steps)
            def _():
                plgpu.commit_smem()  # What was read through registers, before TMA overwrites it.
                fetch(i + tiles.stages, slot)

            return totals if interpret else ()

        def accumulate(*accumulators):
            def step(i, carry):
                planes, sums = carry
                scales.store(scales_smem.at[wg], planes)
                planes = decode_scales(jnp.minimum(i + 1, steps - 1))
                return planes, multiply(i, sums or accumulators)

            zeros = (jnp.zeros((TILE, m_padded), jnp.float32),) * 4 if interpret else ()
            _, sums = lax.fori_loop(0, steps, step, (decode_scales(0), zeros))
            return sums or tuple(total[...] for total in accumulators)

        with jax.named_scope("prologue"):
            for i in range(min(tiles.stages, steps)):
                fetch(i, i)
            fill_table(table_gmem, table_smem, wg, tiles.warpgroups)
            meet()
        accumulators = () if interpret else (plgpu.ACC((TILE, m_padded), jnp.float32),) * 4
        totals = pl.run_scoped(accumulate, *accumulators) if accumulators else accumulate()
        with jax.named_scope("sum_warpgroups"):
            for c, total in enumerate(totals):
                store(sums_smem.at[wg], total)
                meet()

                @pl.when(wg == c % tiles.warpgroups)
                def _(c=c):
                    parts = [
                        plgpu.load(sums_smem.at[i], layout=plgpu.Layout.WGMMA, optimized=False)
                        for i in range(tiles.warpgroups)
                    ]
                    out_gmem[split, column, c] = sum(parts[1:], parts[0])

                meet()

    buffers = tiles.warpgroups, tiles.stages
    swizzled = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(2 * TILE)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, columns, 4, TILE, m_padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((*buffers, 2, m_padded, TILE), dtype, transforms=swizzled),
            plgpu.SMEM((*buffers, 2, TILE, SWIZZLE), jnp.uint8, transforms=SWIZZLED),
            plgpu.SMEM(TABLE_SHAPE, jnp.uint32),
            plgpu.SMEM((tiles.warpgroups, *scales.smem), jnp.float32),
            plgpu.SMEM((tiles.warpgroups, TILE, m_padded), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=tiles.warpgroups * tiles.stages),
            plgpu.Barrier(num_arrivals=tiles.warpgroups),
        ],
        grid=(columns, tiles.splits),
        grid_names=("columns", "split"),
        num_threads=tiles.warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret_params(interpret),
    )(g, *packed)
