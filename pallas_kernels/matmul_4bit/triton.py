"""`x @ W.T` and `g @ W` with a 4-bit `W` in Triton, for up to 64 rows of `x`.

**One launch.** A few rows of `x` against a big weight is bound by memory, and 4096 outputs are few
tiles for a hundred processors. So a program has few rows of `W` and many warps, and each warp takes
every S-th chunk of the input axis: a *batched* `tl.dot`, whose batch axis is the warps, with one
sum over that axis at the end. No second pass, no atomics: the result is the same every time. Only
for matrices with too few rows the input axis is split over programs as well, and XLA adds up.

**Layouts.** The weights are the *left* operand, `[rows, k] @ [k, m]`: the tensor core's instruction
takes 16 rows of it and as few as 8 columns, so one row of `x` wastes 7 of 8 products and no
instruction. Bytes go to shared memory by asynchronous copies and from there into the registers that
the tensor core wants; they are decoded there, and 16-bit weights never touch memory. A byte holds
the codes of rows `r` and `r + N/2`, hence two accumulators, `upper` and `lower`.

**Scales.** A chunk lies inside a block, so absmax multiplies the chunk's sum and not its weights,
once per 64 products and in float32. The factor of FP4 and INT4 multiplies the result.

Triton has no tensor-core path for sm_75. There the weights are decoded to float32 in registers and
multiplied by ordinary instructions, which suits a row or a few.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import DYNAMIC_MAP
from pallas_kernels.matmul_4bit.triton_dot import dot_kernel, transposed_kernel
from pallas_kernels.matmul_4bit.triton_rows import row_kernel
from pallas_kernels.triton_call import launch, resolve_target
from pallas_kernels.triton_decode import FACTORS, decode_asm
from pallas_kernels.tuning import measured_tiles

MAX_ROWS = 64
# Without tensor cores every row of x costs a pass over the weight.
MAX_ROWS_SM75 = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        rows: rows of bytes in a program, each for two outputs.
        warps: that share the input axis.
        columns: of the result of `g @ W` in a program; at most one block.
        splits: programs that share the input axis.
        num_stages: chunks in flight, plus one.
    """

    rows: int = 16
    warps: int = 8
    splits: int = 1
    num_stages: int = 4
    columns: int = 64

    def __post_init__(self):
        if self.rows % 16:
            raise ValueError(f"{self.rows=} must be a multiple of 16")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.warps=} must be a power of two up to 16")

    @classmethod
    def of(cls, m: int, n: int, k: int, target: int) -> Tiles:
        """For `m` rows of `x`, a weight of shape (n, k) and a compute capability.

        More rows of `W` share the work on `x` and the loop, but make fewer programs. What may be in
        flight is bounded so that two programs fit on a multiprocessor, or one big one on sm_90,
        whose count of multiprocessors fits LLaMA's shapes.
        """
        rows, warps = 16, 8 if m <= 32 else 4
        if m <= 8 and n >= (8192 if target >= 90 else 16384):
            rows = 32
        programs = -(-n // (2 * rows))
        if m <= 8 and target >= 90 and programs <= 132:
            warps = 16
        while warps > 1 and k < 128 * warps:
            warps //= 2
        splits = max(1, min(128 // programs, k // (128 * warps)))
        in_flight = {80: 80, 90: 96}.get(target, 48) * 1024
        num_stages = max(2, min(4, 1 + in_flight // (64 * (rows + 2 * _pad(m)) * warps)))
        return cls(rows, warps, splits, num_stages)

    @classmethod
    def of_transposed(cls, m: int, n: int, k: int) -> Tiles:
        """For `m` rows of `g`: the same weight, summed over its rows."""
        warps, columns = (8, 64) if m <= 16 else (4, 32)
        splits = max(1, min(256 * columns // k, n // (32 * warps)))
        return cls(16, warps, splits, num_stages=2, columns=columns)


def _pad(m: int) -> int:
    return max(8, 1 << (m - 1).bit_length())


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
    interpret: bool = False,
    compute_capability: int | None = None,
) -> Float[Array, "m out"]:
    """`x @ W.T + xa @ b + bias` in `x.dtype`; sums in float32, rounded once.

    Args:
        x: float16 or (not on sm_75) bfloat16, 1 to `MAX_ROWS` rows.
        codes: uint8, planar.
        absmax: float32, or the uint8 codes of double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: `(out_features, in_features)`.
        bias: of any float dtype, or None.
        lora: `(xa, b)`, both taken in `x.dtype`, or None.
        tiles: how the work is cut; by default from the shapes.
        interpret: run in NumPy, without a GPU.
        compute_capability: 75, 80, ...; by default the current target's.

    Raises:
        NotImplementedError: no Triton, or a dtype, shape or device that it does not serve.
    """
    n, k = shape
    m = x.shape[0]
    target = _check(x, shape, block_size, interpret, compute_capability)
    if target < 80 and m > MAX_ROWS_SM75:
        raise NotImplementedError(f"{x.shape=}: up to {MAX_ROWS_SM75} rows without tensor cores")
    xa, b = (absmax, absmax) if lora is None else (a.astype(x.dtype) for a in lora)
    common = dict(
        compute_capability=target,
        interpret=interpret,
        enable_fp_fusion=True,
        N=n,
        K=k,
        RANK=0 if lora is None else xa.shape[1],
        BLOCK_SIZE=block_size,
        BK=min(block_size, 64),
        FACTOR=FACTORS[quant_type],
        DOUBLE_QUANT=nested_absmax is not None,
        BIAS=bias is not None,
        ASM=decode_asm(quant_type, x.dtype.name, integers=True),
    )
    scales = _scales(absmax, nested_absmax, offset)
    arrays = (x, codes, absmax, *scales, absmax if bias is None else bias, xa, b)
    if target < 80:
        return _row_matmul(arrays, common)
    tiles = tiles or measured_tiles(Tiles, "matmul", "triton", shape, m)
    tiles = tiles or Tiles.of(m, n, k, target)
    (y,) = launch(
        dot_kernel,
        arrays,
        [_partial_sums(tiles, (m, n), x.dtype)],
        grid=(-(-n // (2 * tiles.rows)), tiles.splits),
        num_warps=tiles.warps,
        num_stages=tiles.num_stages,
        M=m,
        BM=_pad(m),
        BN=tiles.rows,
        WARPS=tiles.warps,
        STEPS=-(-k // (common["BK"] * tiles.warps * tiles.splits)),
        SPLITS=tiles.splits,
        **common,
    )
    return _add_up(y, x.dtype)


def _row_matmul(arrays, common):
    x, xa = arrays[0], arrays[-2]
    (m, k), n, rows = x.shape, common["N"], 4
    groups = 2048 // (common["BK"])
    (y,) = launch(
        row_kernel,
        arrays,
        [jax.ShapeDtypeStruct((m, n), x.dtype)],
        grid=(-(-n // (2 * rows)), m),
        BN=rows,
        GROUPS=min(groups, 1 << (k // common["BK"] - 1).bit_length()),
        RANK_PADDED=1 << (xa.shape[-1] - 1).bit_length() if common["RANK"] else 1,
        **common,
    )
    return y


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
    interpret: bool = False,
    compute_capability: int | None = None,
) -> Float[Array, "m in"]:
    """`g @ W` in `g.dtype`, with the weights rounded to `g.dtype` as `dequantize` gives them.

    Args:
        g: float16 or bfloat16, 1 to `MAX_ROWS` rows.
        codes: uint8, planar.
        absmax: float32, or the uint8 codes of double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        quant_type: as quantized.
        block_size: as quantized.
        shape: `(out_features, in_features)`.
        tiles: how the work is cut; here `rows` is what a warp takes at a time.
        interpret: run in NumPy, without a GPU.
        compute_capability: 80, 86, ...; by default the current target's.

    Raises:
        NotImplementedError: no Triton, or a dtype, shape or device that it does not serve.
    """
    n, k = shape
    m = g.shape[0]
    target = _check(g, shape, block_size, interpret, compute_capability)
    if target < 80:
        raise NotImplementedError(f"g @ W needs tensor cores, {target=}")
    tiles = tiles or measured_tiles(Tiles, "matmul_transposed", "triton", shape, m)
    tiles = tiles or Tiles.of_transposed(m, n, k)
    columns = min(block_size, tiles.columns)
    (y,) = launch(
        transposed_kernel,
        (g, codes, absmax, *_scales(absmax, nested_absmax, offset)),
        [_partial_sums(tiles, (m, k), g.dtype)],
        grid=(k // columns, tiles.splits),
        compute_capability=target,
        interpret=interpret,
        num_warps=tiles.warps,
        num_stages=tiles.num_stages,
        M=m,
        N=n,
        K=k,
        BLOCK_SIZE=block_size,
        BM=max(16, _pad(m)),
        BN=tiles.rows,
        BK=columns,
        WARPS=tiles.warps,
        STEPS=-(-n // (2 * tiles.rows * tiles.warps * tiles.splits)),
        DOUBLE_QUANT=nested_absmax is not None,
        ASM=decode_asm(quant_type, "float32"),
    )
    return _add_up(y, g.dtype)


def _partial_sums(tiles, shape, dtype):
    dtype = dtype if tiles.splits == 1 else jnp.float32
    return jax.ShapeDtypeStruct((tiles.splits, *shape), dtype)


def _add_up(y, dtype):
    return y[0] if y.shape[0] == 1 else y.sum(axis=0).astype(dtype)


def _scales(absmax, nested_absmax, offset):
    """The kernel's arguments that undo double quantization; without it they are not used."""
    if nested_absmax is None:
        return absmax, absmax, absmax
    return jnp.asarray(DYNAMIC_MAP), nested_absmax, offset


def _check(x, shape, block_size, interpret, compute_capability) -> int:
    """The target, if the product's input is served."""
    n, k = shape
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype=} is not served: float16 or bfloat16")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise NotImplementedError(f"{x.shape=}: 1 to {MAX_ROWS} rows are served")
    if n % 2 or k % block_size or math.prod(shape) == 0:
        raise NotImplementedError(f"{shape=}: an even count of rows of whole {block_size=}")
    return resolve_target(compute_capability, interpret, [x.dtype])
