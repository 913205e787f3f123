"""Decoding 4-bit codes and block scales inside Triton kernels.

**Byte planes.** A codebook is 16 numbers of 2 (or 4) bytes: a table of 16 for each byte plane, and
such a table is four registers. The instruction `prmt` picks four bytes out of eight by the nibbles
of a third register, and four codes *are* such nibbles. So, for the four codes in half a register,

    lower  = prmt(table[0:8],  codes & 7)
    upper  = prmt(table[8:16], codes & 7)
    plane  = prmt(lower, upper, 3210 + 4 * (codes >> 3))

looks up one byte of four weights, and a last `prmt` weaves the planes into numbers. Per weight
this takes about a third of what a tree of selects or a look-up in memory takes; see the table in
`docs/performance.md`.

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
def decode_table(quant_type: str, dtype: str, integers: bool = False) -> tuple[int, ...]:
    """The registers of the look-up as int32, 4 * bytes of dtype of them: four a byte plane.

    Args:
        quant_type: a key of `CODEBOOKS`.
        dtype: of the numbers: `"float32"`, `"float16"` or `"bfloat16"`.
        integers: leave out the factor `FACTORS[quant_type]`.
    """
    return tuple(_byte_planes(quant_type, dtype, integers).view("<i4").reshape(-1).tolist())


@functools.cache
def decode_asm(quant_type: str, dtype: str, integers: bool = False) -> str:
    """PTX that decodes four bytes into four numbers of each plane; arguments as `decode_table`.

    Returns:
        Statements over `$0`, `$1`, ... Results come first, those of the first plane before those
        of the second; then the register of codes; then four copies of each word of the table
        (an operand for each of the four elements, though they are the same).
    """
    planes = _byte_planes(quant_type, dtype, integers)
    results = 2 * len(planes)
    lines = [
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
            words = [f"${results + 1 + 4 * (4 * p + i)}" for i in range(4)]
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
    names = ("s0, s1, m0, m1, a, b, u, v", *(f"q{p}{h}" for p in range(4) for h in "01"))
    return "\n".join(("{", f".reg .b32 {', '.join(names)};", *lines, "}"))


@jit
def _registers(t: tl.constexpr, FIRST: tl.constexpr, zero):
    return (
        zero ^ t[FIRST],
        zero ^ t[FIRST + 1],
        zero ^ t[FIRST + 2],
        zero ^ t[FIRST + 3],
        zero ^ t[FIRST + 4],
        zero ^ t[FIRST + 5],
        zero ^ t[FIRST + 6],
        zero ^ t[FIRST + 7],
    )


@jit
def table_registers(TABLE: tl.constexpr, FIRST: tl.constexpr):
    """Eight words of the table from `FIRST` on, in registers; call it outside of loops."""
    # A zero that the compiler does not know: no lane has the 32nd lane below itself. It takes
    # known words for constants and moves them into registers again at every use.
    zero = tl.inline_asm_elementwise(
        "mov.u32 $0, %lanemask_lt; shr.u32 $0, $0, 31;",
        "=r,r",
        [tl.program_id(0)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return _registers(TABLE, FIRST, zero)


@jit
def decode_16(codes, t, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Both planes of a block of bytes as 16-bit numbers: first (high nibbles), second (low)."""
    REGISTERS: tl.constexpr = "=r," * 4 + "r" + ",r" * 32
    words = [codes, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]]
    if DTYPE == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            ASM, REGISTERS, words, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        planes = tl.inline_asm_elementwise(
            ASM, REGISTERS, words, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return planes


@jit
def decode_32(codes, t, u, ASM: tl.constexpr):
    """Both planes of a block of bytes as float32; `t` and `u` are the halves of the table."""
    REGISTERS: tl.constexpr = "=r," * 8 + "r" + ",r" * 64
    return tl.inline_asm_elementwise(
        ASM,
        REGISTERS,
        [
            codes,
            t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
            u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7],
        ],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )  # fmt: skip


@jit
def multiply(a, b):
    """`a * b` in float32, rounded by itself; subnormals count as zero, as XLA does on CPU."""
    return tl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def load_scales(
    absmax_ptr, map_ptr, nested_ptr, offset_ptr, index, mask, DOUBLE_QUANT: tl.constexpr
):
    """absmax of the blocks `index`, float32; undoes double quantization as the format says."""
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + index, mask=mask, other=0).to(tl.int32)
        value = tl.load(map_ptr + code, mask=mask, other=0.0)
        nested = tl.load(nested_ptr + index // 256, mask=mask, other=0.0)
        scales = multiply(value, nested) + tl.load(offset_ptr)
    else:
        scales = tl.load(absmax_ptr + index, mask=mask, other=0.0)
    return scales
