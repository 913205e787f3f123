"""`quantize_4bit`: any array to packed 4-bit codes and block scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import devices
from pallas_kernels.formats import check_format
from pallas_kernels.quantize_4bit import mosaic_gpu, triton, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.quantize,
    "triton": triton.quantize,
    "xla": xla.quantize,
}


def quantize_4bit(
    x: Float[Array, ...],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    implementation: str | None = None,
) -> tuple[UInt8[Array, " plane"], Float32[Array, " blocks"]]:
    """Quantizes `x`, flattened row-major, in blocks.

    Args:
        x: float32, bfloat16 or float16 of any shape with at least one element.
        quant_type: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: elements that share one scale; one of `formats.BLOCK_SIZES`.
        implementation: one of `IMPLEMENTATIONS`; by default the best that serves this.

    Returns:
        `codes`, uint8 [`plane_size(x.size, block_size)`], two codes a byte in planar order (see
        `formats`), and `absmax`, float32 [`num_blocks(x.size, block_size)`]. A NaN or infinity in
        a block makes that block's absmax NaN or infinite.

    Raises:
        ValueError: unknown format, empty array, not a float of 16 or 32 bits, or
            `implementation` does not serve this.

    >>> codes, absmax = quantize_4bit(jnp.array([0.5, -1.0, 0.0]))
    >>> codes.shape, absmax.tolist()
    ((64,), [1.0])
    """
    check_format(quant_type, block_size)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{x.dtype=}: 4-bit quantization takes float32, bfloat16 or float16")
    if x.size == 0:
        raise ValueError(f"{x.shape=}: an array without elements cannot be quantized")
    with jax.named_scope("quantize_4bit"):
        return devices.run(
            "quantize_4bit",
            {
                name: functools.partial(f, quant_type=quant_type, block_size=block_size)
                for name, f in IMPLEMENTATIONS.items()
            },
            (x,),
            dtype=x.dtype,
            implementation=implementation,
        )


def quantize_absmax(
    absmax: Float32[Array, " blocks"],
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " nested"], Float32[Array, ""]]:
    """Double quantization: block scales to 8 bits.

    Args:
        absmax: float32 [blocks].

    Returns:
        `codes` uint8 [blocks] into `formats.DYNAMIC_MAP`, `nested_absmax` float32
        [ceil(blocks / 256)], `offset` float32 scalar, the mean of `absmax`.

    >>> codes, nested, offset = quantize_absmax(jnp.array([1.0, 3.0]))
    >>> codes.tolist(), nested.tolist(), float(offset)
    ([0, 255], [1.0], 2.0)
    """
    return xla.quantize_absmax(absmax)


def dequantize_absmax(
    codes: UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"],
    offset: Float32[Array, ""],
) -> Float32[Array, " blocks"]:
    """The inverse of `quantize_absmax`, up to its rounding: float32 [blocks].

    >>> dequantize_absmax(*quantize_absmax(jnp.array([2.0, 4.0]))).round(2).tolist()
    [2.0099..., 4.0]
    """
    return xla.dequantize_absmax(codes, nested_absmax, offset)
