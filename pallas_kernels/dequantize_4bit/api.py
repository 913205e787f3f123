"""`dequantize_4bit`: packed 4-bit codes to a dense array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import devices
from pallas_kernels.dequantize_4bit import mosaic_gpu, triton, xla
from pallas_kernels.formats import check_format

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.dequantize,
    "triton": triton.dequantize,
    "xla": xla.dequantize,
}


def dequantize_4bit(
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    *,
    shape: tuple[int, ...],
    quant_type: str = "nf4",
    block_size: int = 64,
    dtype: jnp.dtype = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, ...]:
    """The dense array: `codebook[codes] * absmax` in float32, then one cast.

    Args:
        codes: uint8, planar, as `quantize_4bit` gives them.
        absmax: float32, or the uint8 codes of double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        shape: of the dense array.
        quant_type: as quantized.
        block_size: as quantized.
        dtype: of the result.
        implementation: one of `IMPLEMENTATIONS`; by default the best that serves this.

    Returns:
        An array of `shape` and `dtype`, the same to the bit from every implementation.

    Raises:
        ValueError: unknown format, or `implementation` does not serve this.

    >>> from pallas_kernels.quantize_4bit.api import quantize_4bit
    >>> packed = quantize_4bit(jnp.array([[0.5, -1.0, 0.0]]))
    >>> dequantize_4bit(*packed, shape=(1, 3)).round(2).tolist()
    [[0.4399..., -1.0, 0.0]]
    """
    check_format(quant_type, block_size)
    static = dict(
        quant_type=quant_type, block_size=block_size, shape=tuple(shape), dtype=jnp.dtype(dtype)
    )
    with jax.named_scope("dequantize_4bit"):
        return devices.run(
            "dequantize_4bit",
            {name: functools.partial(f, **static) for name, f in IMPLEMENTATIONS.items()},
            (codes, absmax, nested_absmax, offset),
            dtype=static["dtype"],
            implementation=implementation,
        )
