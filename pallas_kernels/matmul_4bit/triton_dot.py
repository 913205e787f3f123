"""The Triton kernels of `matmul_4bit` that use tensor cores, for sm_80 and newer.

Both put the warps of a program on the *batch* axis of `tl.dot`: a warp has its own part of the
summed axis and its own accumulators, and one sum over the warps at the end makes the result. See
`triton` for the why.
"""

from __future__ import annotations

from pallas_kernels.triton_call import jit, tl
from pallas_kernels.triton_decode import (
    decode_16,
    decode_32,
    load_nested,
    load_scales,
    multiply,
)


@jit
def dot_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    bias_ptr,
    xa_ptr,
    b_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    FACTOR: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`x @ W.T + xa @ b + bias`, or its part of the input axis: out [SPLITS, M, N]."""
    HALF: tl.constexpr = N // 2
    CHUNKS: tl.constexpr = K // BK
    BLOCKS: tl.constexpr = K // BLOCK_SIZE
    # Whether the blocks of a row share one nested absmax.
    NESTED_ONCE: tl.constexpr = 256 % BLOCKS == 0
    RAGGED: tl.constexpr = CHUNKS % WARPS != 0 or CHUNKS != STEPS * WARPS * SPLITS
    # What lies outside repeats the last row, which costs no mask; it is not stored.
    row = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), HALF - 1)
    m = tl.minimum(tl.arange(0, BM), M - 1)
    k = tl.arange(0, BK)
    warp = tl.program_id(1) * (STEPS * WARPS) + tl.arange(0, WARPS)
    codes_ptrs = codes_ptr + row.to(tl.int64)[None, :, None] * K + k[None, None, :]
    x_ptrs = x_ptr + m[None, None, :] * K + k[None, :, None]
    offset = tl.load(offset_ptr)
    first_block = row[None, :] * BLOCKS
    if NESTED_ONCE:
        nested_upper = load_nested(nested_ptr, first_block, DOUBLE_QUANT)
        nested_lower = load_nested(nested_ptr, first_block + HALF * BLOCKS, DOUBLE_QUANT)
    upper = tl.zeros((WARPS, BN, BM), tl.float32)
    lower = tl.zeros((WARPS, BN, BM), tl.float32)
    for step in range(STEPS):
        chunk = warp + step * WARPS
        if RAGGED:
            inside = (chunk < CHUNKS)[:, None, None]
            chunk = tl.minimum(chunk, CHUNKS - 1)
            x = tl.load(x_ptrs + (chunk * BK)[:, None, None], mask=inside, other=0.0)
        else:
            x = tl.load(x_ptrs + (chunk * BK)[:, None, None])
        codes = tl.load(codes_ptrs + (chunk * BK)[:, None, None])
        first, second = decode_16(codes, ASM, x_ptr.dtype.element_ty)
        block = first_block + (chunk * BK // BLOCK_SIZE)[:, None]
        if not NESTED_ONCE:
            nested_upper = load_nested(nested_ptr, block, DOUBLE_QUANT)
            nested_lower = load_nested(nested_ptr, block + HALF * BLOCKS, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested_upper, offset, block, DOUBLE_QUANT)
        upper += tl.dot(first, x) * scale[:, :, None]
        block += HALF * BLOCKS
        scale = load_scales(absmax_ptr, map_ptr, nested_lower, offset, block, DOUBLE_QUANT)
        lower += tl.dot(second, x) * scale[:, :, None]
    upper *= FACTOR
    lower *= FACTOR
    # Only the programs of the first part of the input axis add the low-rank update and the bias.
    if RANK > 0:
        rank = tl.where(tl.program_id(1) == 0, RANK, 0)
        for step in range(0, rank, 16 * WARPS):
            r = step + tl.arange(0, WARPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
            xa_ptrs = xa_ptr + m[None, None, :] * RANK + r[:, :, None]
            xa = tl.load(xa_ptrs, mask=(r < RANK)[:, :, None], other=0.0)
            b_ptrs = b_ptr + r[:, None, :] * N + row[None, :, None]
            mask = (r < RANK)[:, None, :]
            upper = tl.dot(tl.load(b_ptrs, mask=mask, other=0.0), xa, upper)
            lower = tl.dot(tl.load(b_ptrs + HALF, mask=mask, other=0.0), xa, lower)
    first = tl.sum(upper, axis=0)
    second = tl.sum(lower, axis=0)
    if BIAS:
        bias = tl.load(bias_ptr + row).to(tl.float32)
        first += tl.where(tl.program_id(1) == 0, bias, 0.0)[:, None]
        bias = tl.load(bias_ptr + HALF + row).to(tl.float32)
        second += tl.where(tl.program_id(1) == 0, bias, 0.0)[:, None]
    out_ptrs = out_ptr + (tl.program_id(1) * M + m[None, :]) * N + row[:, None]
    inside = tl.program_id(0) * BN + tl.arange(0, BN) < HALF
    mask = inside[:, None] & (tl.arange(0, BM) < M)[None, :]
    tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def transposed_kernel(
    g_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    ASM: tl.constexpr,
):
    """`g @ W`, or its part of the output axis: out [SPLITS, M, K]."""
    HALF: tl.constexpr = N // 2
    BLOCKS: tl.constexpr = K // BLOCK_SIZE
    m = tl.minimum(tl.arange(0, BM), M - 1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    warp = tl.program_id(1) * (STEPS * WARPS) + tl.arange(0, WARPS)
    offset = tl.load(offset_ptr)
    out = tl.zeros((WARPS, BM, BK), tl.float32)
    for step in range(STEPS):
        row = (warp + step * WARPS)[:, None] * BN + tl.arange(0, BN)[None, :]
        # Rows outside count as zeros: their gradient does.
        inside = (row < HALF)[:, None, :]
        row = tl.minimum(row, HALF - 1)
        g_ptrs = g_ptr + m[None, :, None] * N + row[:, None, :]
        codes = tl.load(codes_ptr + row.to(tl.int64)[:, :, None] * K + k[None, None, :])
        first, second = decode_32(codes, ASM)
        # The tile's columns lie inside one block, so a row of it has one scale.
        block = row * BLOCKS + tl.program_id(0) * BK // BLOCK_SIZE
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        w = multiply(first, scale[:, :, None]).to(g_ptr.dtype.element_ty)
        out = tl.dot(tl.load(g_ptrs, mask=inside, other=0.0), w, out)
        block += HALF * BLOCKS
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        w = multiply(second, scale[:, :, None]).to(g_ptr.dtype.element_ty)
        out = tl.dot(tl.load(g_ptrs + HALF, mask=inside, other=0.0), w, out)
    result = tl.sum(out, axis=0)
    out_ptrs = out_ptr + (tl.program_id(1) * M + m[:, None]) * K + k[None, :]
    mask = (tl.arange(0, BM) < M)[:, None]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
