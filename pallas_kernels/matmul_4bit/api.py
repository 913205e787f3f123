"""`matmul_4bit`: `x @ dequantize(W).T` with a gradient for `x` and packed residuals only."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.formats import check_format
from pallas_kernels.matmul_4bit import xla
from pallas_kernels.quantize_4bit.api import dequantize_absmax


class _Static(NamedTuple):
    quant_type: str
    block_size: int
    shape: tuple[int, int]


def matmul_4bit(
    x: Float[Array, "*b in"],
    codes: UInt8[Array, " plane"],
    absmax: Float32[Array, " blocks"] | UInt8[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None = None,
    offset: Float32[Array, ""] | None = None,
    *,
    shape: tuple[int, int],
    quant_type: str = "nf4",
    block_size: int = 64,
) -> Float[Array, "*b out"]:
    """`x @ W.T` for a frozen 4-bit `W` of shape `(out, in)`.

    The weight is dequantized for the product, and again in the backward pass: what is kept for
    it is the packed weight. The gradient goes to `x` alone; the weight's is zero by definition.

    Args:
        x: floats [..., in].
        codes: uint8, planar; see `quantize_4bit`.
        absmax: float32, or uint8 with double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        shape: `(out_features, in_features)`.
        quant_type: as quantized.
        block_size: as quantized.

    Returns:
        `[..., out]` in `x.dtype`.

    Raises:
        ValueError: unknown format, or `x.shape[-1] != shape[1]`.

    >>> from jax import numpy as jnp
    >>> from pallas_kernels.quantize_4bit.api import quantize_4bit
    >>> w = jnp.eye(4)
    >>> matmul_4bit(jnp.ones((2, 4)), *quantize_4bit(w), shape=(4, 4)).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """
    check_format(quant_type, block_size)
    if len(shape) != 2 or x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"{x.shape=} does not fit a weight of (out, in) = {shape}")
    static = _Static(quant_type, block_size, tuple(shape))
    with jax.named_scope("matmul_4bit"):
        return _matmul(static, x, (codes, absmax, nested_absmax, offset))


def _scales(packed):
    codes, absmax, nested_absmax, offset = packed
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    return codes, absmax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, x, packed):
    return xla.matmul(x, *_scales(packed), **static._asdict())


def _forward(static, x, packed):
    return _matmul(static, x, packed), packed


def _backward(static, packed, g):
    with jax.named_scope("matmul_4bit_transposed"):
        return xla.matmul_transposed(g, *_scales(packed), **static._asdict()), None


_matmul.defvjp(_forward, _backward)
