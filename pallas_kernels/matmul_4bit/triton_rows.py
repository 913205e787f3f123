"""The Triton kernel of `matmul_4bit` without tensor cores: one row of `x` at a time.

Triton compiles `tl.dot` to ordinary multiplications on sm_75, with a tile's worth of shared memory
traffic. For a row or a few it is better to stay in registers: a thread decodes 16 neighbouring
bytes of some rows of `W`, multiplies by the same 16 numbers of `x` in float32, adds up, and
multiplies a block's sum by absmax. Lanes and warps along the input axis add theirs at the end.
"""

from __future__ import annotations

from pallas_kernels.triton_call import jit, tl
from pallas_kernels.triton_decode import decode_16, load_nested, load_scales


@jit
def row_kernel(
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
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    FACTOR: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`x @ W.T + xa @ b + bias` for the row `program_id(1)` of `x`: out [M, N]."""
    HALF: tl.constexpr = N // 2
    CHUNKS: tl.constexpr = K // BK
    BLOCKS: tl.constexpr = K // BLOCK_SIZE
    m = tl.program_id(1)
    row = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), HALF - 1)
    k = tl.arange(0, BK)
    offset = tl.load(offset_ptr)
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None, None] * K + k[None, None, :]
    upper = tl.zeros((BN, GROUPS), tl.float32)
    lower = tl.zeros((BN, GROUPS), tl.float32)
    for step in range(0, CHUNKS, GROUPS):
        chunk = step + tl.arange(0, GROUPS)
        inside = (chunk < CHUNKS)[None, :, None]
        chunk = tl.minimum(chunk, CHUNKS - 1)
        x_ptrs = x_ptr + m * K + (chunk * BK)[None, :, None] + k[None, None, :]
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        codes = tl.load(codes_ptrs + (chunk * BK)[None, :, None])
        first, second = decode_16(codes, ASM, x_ptr.dtype.element_ty)
        block = row[:, None] * BLOCKS + (chunk * BK // BLOCK_SIZE)[None, :]
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        upper += tl.sum(first.to(tl.float32) * x, axis=2) * scale
        block += HALF * BLOCKS
        nested = load_nested(nested_ptr, block, DOUBLE_QUANT)
        scale = load_scales(absmax_ptr, map_ptr, nested, offset, block, DOUBLE_QUANT)
        lower += tl.sum(second.to(tl.float32) * x, axis=2) * scale
    first = tl.sum(upper, axis=1) * FACTOR
    second = tl.sum(lower, axis=1) * FACTOR
    if RANK > 0:
        r = tl.arange(0, RANK_PADDED)
        xa = tl.load(xa_ptr + m * RANK + r, mask=r < RANK, other=0.0).to(tl.float32)
        b_ptrs = b_ptr + r[None, :] * N + row[:, None]
        mask = (r < RANK)[None, :]
        b = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
        first += tl.sum(b * xa[None, :], axis=1)
        b = tl.load(b_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
        second += tl.sum(b * xa[None, :], axis=1)
    if BIAS:
        first += tl.load(bias_ptr + row).to(tl.float32)
        second += tl.load(bias_ptr + HALF + row).to(tl.float32)
    mask = tl.program_id(0) * BN + tl.arange(0, BN) < HALF
    out_ptrs = out_ptr + m * N + row
    tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)
