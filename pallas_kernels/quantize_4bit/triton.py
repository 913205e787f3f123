"""Block quantization to 4 bits in Triton: one launch, read once, codes and absmax written once.

A program takes some blocks of the first half of the tensor and as many of the second, because one
byte of the planar codes holds an element of each. A block's absolute maximum is an integer maximum
over the bits without the sign, so that subnormals survive and NaN shows up. The code of a ratio is
found by halving the codebook's 15 decision bounds: four comparisons instead of fifteen.

Codes and absmax equal those of `xla.py` to the bit: the reciprocal is divided to the nearest, the
product treats subnormals as zeros, and a short last block divides as bitsandbytes does.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import decision_bounds, num_blocks, plane_size
from pallas_kernels.triton_call import jit, launch, resolve_target, tl
from pallas_kernels.triton_decode import multiply
from pallas_kernels.tuning import measured_tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        elements: of each plane in a program; at least one block.
        num_warps: of a program.
    """

    elements: int = 2048
    num_warps: int = 4


@functools.cache
def encode_asm(quant_type: str) -> str:
    """PTX that makes four bytes of codes from four ratios of each plane.

    Returns:
        Statements over `$0`, the bytes; `$1` to `$4`, the ratios of the first plane (the high
        nibbles); `$5` to `$8`, those of the second. The number of the interval is built in place,
        bit by bit, so that nothing is left to pack; FP4's codes are then looked up by it.
    """
    bounds, codes = decision_bounds(quant_type)
    b = [f"0f{w:08X}" for w in bounds.view(np.uint32).tolist()]
    lines = ["mov.u32 c, 0;"]
    for i in range(8):
        x, place = f"${1 + i}", 8 * (i % 4) + (4 if i < 4 else 0)
        lines += [
            f"setp.gt.f32 p3, {x}, {b[7]};",
            f"selp.f32 e, {b[11]}, {b[3]}, p3;",
            f"setp.gt.f32 p2, {x}, e;",
            f"selp.f32 e, {b[5]}, {b[1]}, p2;",
            f"selp.f32 f, {b[13]}, {b[9]}, p2;",
            "selp.f32 e, f, e, p3;",
            f"setp.gt.f32 p1, {x}, e;",
            f"selp.f32 e, {b[2]}, {b[0]}, p1;",
            f"selp.f32 f, {b[6]}, {b[4]}, p1;",
            "selp.f32 e, f, e, p2;",
            f"selp.f32 f, {b[10]}, {b[8]}, p1;",
            f"selp.f32 g, {b[14]}, {b[12]}, p1;",
            "selp.f32 f, g, f, p2;",
            "selp.f32 e, f, e, p3;",
            f"setp.gt.f32 p0, {x}, e;",
        ]
        lines += [f"@p{n} or.b32 c, c, {1 << place + n:#x};" for n in range(4)]
    if (codes == np.arange(16)).all():
        lines.append("mov.u32 $0, c;")
    else:
        words = [f"{w:#x}" for w in codes.view("<u4").tolist()]
        lines += ["and.b32 s, c, 0x77777777;", "shr.u32 c, c, 1;"]
        lines += ["lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;"]  # (a & b) | c
        for half in range(2):
            lines.append(f"prmt.b32 u, {words[0]}, {words[1]}, s;")
            lines.append(f"prmt.b32 v, {words[2]}, {words[3]}, s;")
            lines.append(f"prmt.b32 q{half}, u, v, c;")
            lines += ["shr.u32 s, s, 16;", "shr.u32 c, c, 16;"]
        lines += ["prmt.b32 u, q0, q1, 0x6420;", "prmt.b32 v, q0, q1, 0x7531;"]
        lines += ["shl.b32 v, v, 4;", "or.b32 $0, u, v;"]
    registers = ".reg .pred p0, p1, p2, p3; .reg .f32 e, f, g; .reg .b32 c, s, u, v, q0, q1;"
    return "\n".join(("{", registers, *lines, "}"))


@jit
def _quantize_plane(
    x_ptr,
    absmax_ptr,
    block,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """What the blocks `block` are in units of their absmax, which is stored: [rows, BLOCK_SIZE]."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE
    TINY: tl.constexpr = 1.1754943508222875e-38
    position = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(x_ptr + position, mask=position < SIZE, other=0.0).to(tl.float32)
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    reciprocal = tl.where(absmax >= TINY, tl.div_rn(1.0, absmax), 0.0)
    ratio = multiply(x, reciprocal[:, None])
    if SIZE % BLOCK_SIZE != 0:
        last = block == BLOCKS - 1
        divisor = tl.where(last & (absmax >= TINY), absmax, 1.0)[:, None]
        exact = tl.where((absmax >= TINY)[:, None], tl.div_rn(multiply(x, 1.0), divisor), 0.0)
        ratio = tl.where(last[:, None], exact, ratio)
        # The least absmax that bitsandbytes stores for a short block is 1e-38.
        bits = tl.where(last, tl.maximum(bits, 0x006CE3EE), bits)
        absmax = bits.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, mask=block < BLOCKS)
    return ratio


@jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    SIZE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
):
    HALF: tl.constexpr = PLANE // BLOCK_SIZE
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = _quantize_plane(x_ptr, absmax_ptr, block, SIZE, BLOCK_SIZE)
    second = _quantize_plane(x_ptr, absmax_ptr, block + HALF, SIZE, BLOCK_SIZE)
    position = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    codes = tl.inline_asm_elementwise(
        ASM,
        "=r,f,f,f,f,f,f,f,f",
        [first, second],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )
    tl.store(codes_ptr + position, codes, mask=(block < HALF)[:, None])


def quantize(
    x: Float[Array, ...],
    *,
    quant_type: str,
    block_size: int,
    tiles: Tiles | None = None,
    interpret: bool = False,
    compute_capability: int | None = None,
) -> tuple[UInt8[Array, " plane"], Float32[Array, " blocks"]]:
    """Codes in planar order and absmax of `x`, flattened row-major; see `api.quantize_4bit`.

    Args:
        x: float32, float16 or (not on sm_75) bfloat16.
        quant_type: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: elements that share one scale.
        tiles: how the work is cut.
        interpret: run in NumPy, without a GPU.
        compute_capability: 75, 80, ...; by default the current target's.

    Raises:
        NotImplementedError: no Triton, or a dtype or device that it does not serve.
    """
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype=} is not served: float32, float16 or bfloat16")
    target = resolve_target(compute_capability, interpret, [x.dtype])
    if x.size == 0:
        raise NotImplementedError(f"{x.shape=} has no elements")
    tiles = tiles or measured_tiles(Tiles, "quantize", "triton", x.shape) or Tiles()
    plane = plane_size(x.size, block_size)
    rows = max(1, tiles.elements // block_size)
    return launch(
        _quantize_kernel,
        (x.reshape(-1),),
        [
            jax.ShapeDtypeStruct((plane,), jnp.uint8),
            jax.ShapeDtypeStruct((num_blocks(x.size, block_size),), jnp.float32),
        ],
        grid=(-(-plane // (block_size * rows)),),
        compute_capability=target,
        interpret=interpret,
        num_warps=tiles.num_warps,
        SIZE=x.size,
        PLANE=plane,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        ASM=encode_asm(quant_type),
    )
