"""Decoding 4-bit codes and block scales inside Triton kernels.

**Byte planes.** A codebook is 16 numbers of 2 (or 4) bytes: a table of 16 for each byte plane, and
such a table is four registers. The instruction `prmt` picks four bytes out of eight by the nibbles
of a third register, and four codes *are* such nibbles. So, for the four codes in half a register,

    lower  = prmt(table[0:8],  codes & 7)
    upper  = prmt(table[8:16], codes & 7)
    plane  = prmt(lower, upper, 3210 + 4 * (codes >> 3))

looks up one byte of four weights, and a last `prmt` weaves the planes into numbers. A weight takes
3 instructions so in 16 bits, against 16 to 24 for a tree of selects and 5 to 6 and a load from
shared memory for `tl.gather`, counted in the machine code of sm_75 to sm_90.

**Planar codes.** A byte holds element `i` of the first plane (high nibble) and element `i` of the
second (low): four bytes of a register give four neighbours of each, without a shuffle.

**Factors.** FP4 and INT4 are small integers over 12 and over 7. For products the integers are
looked up, which are exact in 16 bits, and the factor joins the scale.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from pallas_kernels.formats import CODEBOOKS
from pallas_kernels.triton_call import jit, tl

FACTORS = {"nf4": 1.0, "fp4": 1 / 12, "int4": 1 / 7}
_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@functools.cache
def _byte_planes(quant_type: str, dtype: str, integers: bool) -> np.ndarray:
    """The codebook's bytes, uint8 [planes, 16], the lowest byte first."""
    table = CODEBOOKS[quant_type].astype(np.float64)
    if integers and quant_type != "nf4":
        table = np.round(table / FACTORS[quant_type] * 16) / 16  # FP4 has a sixteenth
    bits = table.astype(np.float32).astype(_NUMPY[dtype])
    return np.ascontiguousarray(bits.view(np.uint8).reshape(16, -1).T)


@functools.cache
def decode_asm(quant_type: str, dtype: str, integers: bool = False) -> str:
    """PTX that decodes four bytes into four numbers of each plane.

    Args:
        quant_type: a key of `CODEBOOKS`.
        dtype: of the numbers: `"float32"`, `"float16"` or `"bfloat16"`.
        integers: leave out the factor `FACTORS[quant_type]`.

    Returns:
        Statements over `$0`, `$1`, ... Results come first, those of the first plane before those
        of the second; the last operand is the register of codes.
    """
    planes = _byte_planes(quant_type, dtype, integers)
    results = 2 * len(planes)
    # A zero that the assembler does not know: no lane has 32 lanes below it. What it knows for
    # constants it moves into registers again at every use, because `prmt` takes but one of them.
    lines = ["mov.u32 z, %lanemask_lt;", "shr.u32 z, z, 31;"]
    for p, table in enumerate(planes):
        for i, word in enumerate(table.view("<u4").tolist()):
            lines.append(f"xor.b32 t{4 * p + i}, z, {word:#x};")
    lines += [
        f"and.b32 s0, ${results}, 0x77777777;",
        f"shr.u32 m0, ${results}, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;",  # (a & b) | c
        "shr.u32 s1, s0, 16;",
        "shr.u32 m1, m0, 16;",
    ]
    for half in range(2):
        # Bytes of q: second plane, first plane, of one element and then of the next.
        names = []
        for p, table in enumerate(planes):
            if (table == table[0]).all():
                names.append(hex(int(table[0]) * 0x01010101))
                continue
            words = [f"t{4 * p + i}" for i in range(4)]
            names.append(f"q{p}{half}")
            lines.append(f"prmt.b32 a, {words[0]}, {words[1]}, s{half};")
            lines.append(f"prmt.b32 b, {words[2]}, {words[3]}, s{half};")
            lines.append(f"prmt.b32 {names[-1]}, a, b, m{half};")
        if len(planes) == 2:
            lines.append(f"prmt.b32 ${half}, {names[0]}, {names[1]}, 0x7351;")
            lines.append(f"prmt.b32 ${2 + half}, {names[0]}, {names[1]}, 0x6240;")
            continue
        for pair, selector in enumerate(("0x5140", "0x7362")):
            lines.append(f"prmt.b32 u, {names[0]}, {names[1]}, {selector};")
            lines.append(f"prmt.b32 v, {names[2]}, {names[3]}, {selector};")
            lines.append(f"prmt.b32 ${2 * half + pair}, u, v, 0x7632;")
            lines.append(f"prmt.b32 ${4 + 2 * half + pair}, u, v, 0x5410;")
    names = ["s0, s1, m0, m1, a, b, u, v, z"]
    names += [f"q{p}{h}" for p in range(4) for h in "01"] + [f"t{i}" for i in range(16)]
    return "\n".join(("{", f".reg .b32 {', '.join(names)};", *lines, "}"))


@jit
def decode_16(codes, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Both planes of a block of bytes as 16-bit numbers: first (high nibbles), second (low)."""
    REGISTERS: tl.constexpr = "=r,=r,=r,=r,r"
    if DTYPE == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            ASM, REGISTERS, [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        planes = tl.inline_asm_elementwise(
            ASM, REGISTERS, [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return planes


@jit
def decode_32(codes, ASM: tl.constexpr):
    """Both planes of a block of bytes as float32: first (high nibbles), second (low)."""
    REGISTERS: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r"
    return tl.inline_asm_elementwise(
        ASM, REGISTERS, [codes], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
    )


@jit
def multiply(a, b):
    """`a * b` in float32, rounded by itself; subnormals count as zero, as XLA does on CPU."""
    return tl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def load_scales(absmax_ptr, map_ptr, nested, offset, index, DOUBLE_QUANT: tl.constexpr):
    """absmax of the blocks `index`, float32; undoes double quantization as the format says.

    `nested` is the blocks' nested absmax and `offset` the scalar, both loaded before.
    """
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + index).to(tl.uint32)
        scales = multiply(tl.load(map_ptr + code), nested) + offset
    else:
        scales = tl.load(absmax_ptr + index)
    return scales


@jit
def load_nested(nested_ptr, index, DOUBLE_QUANT: tl.constexpr):
    """nested absmax of the blocks `index`; 0 without double quantization."""
    if DOUBLE_QUANT:
        nested = tl.load(nested_ptr + (index >> 8))
    else:
        nested = 0.0
    return nested
