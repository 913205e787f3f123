"""`matmul_4bit`: `x @ dequantize(W).T` with a gradient for `x` and packed residuals only."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import devices, tuning
from pallas_kernels.dequantize_4bit.api import dequantize_4bit
from pallas_kernels.formats import check_format
from pallas_kernels.matmul_4bit import mosaic_gpu, triton, xla


def _zero(x: Float[Array, "m n"]) -> Float32[Array, ""]:
    """Zero, which XLA cannot know before it has computed `x`."""
    if not x.size:
        return jnp.float32(0)
    bits = jax.lax.bitcast_convert_type(x[0, 0], jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.minimum(bits, 0).astype(jnp.float32)


def _after(zero, codes, absmax, nested_absmax, offset):
    """The same weight, which cannot be decoded before `zero` is computed.

    A weight depends on nothing that is computed: a scheduler is free to decode all weights of a
    layer first, and then holds them all at once. An optimization barrier does not help, XLA for
    GPUs removes it before it schedules.
    """
    if offset is None:
        return codes, absmax + zero, nested_absmax, offset
    return codes, absmax, nested_absmax, offset + zero


def _dense_matmul(x, *packed, bias=None, lora=None, **static):
    w = dequantize_4bit(*_after(_zero(x), *packed), **static, dtype=x.dtype)
    return xla.add_epilogue(jnp.einsum("mi,oi->mo", x, w), bias, lora)


def _dense_matmul_transposed(g, *packed, **static):
    return g @ dequantize_4bit(*_after(_zero(g), *packed), **static, dtype=g.dtype)


# `dequantize` is the kernel of that name and then the vendor's dense product: the best for many
# rows, where decoding a weight once costs less than decoding its tiles again and again.
IMPLEMENTATIONS = {
    "mosaic_gpu": (mosaic_gpu.matmul, mosaic_gpu.matmul_transposed),
    "triton": (triton.matmul, triton.matmul_transposed),
    "dequantize": (_dense_matmul, _dense_matmul_transposed),
    "xla": (xla.matmul, xla.matmul_transposed),
}
_FUSED = ("mosaic_gpu", "triton")


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
    bias: Float[Array, " out"] | None = None,
    lora: tuple[Float[Array, "*b r"], Float[Array, "r out"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*b out"]:
    """`x @ W.T + xa @ b + bias` for a frozen 4-bit `W` of shape `(out, in)`.

    The weight is dequantized for the product, and again in the backward pass: what is kept for
    it is the packed weight. Gradients go to `x`, `bias` and `lora`; the weight's is zero by
    definition. On a GPU a product with few rows of `x` (`tuning.fused_rows`) decodes the weight
    inside the product; one with more dequantizes it first.

    Args:
        x: floats [..., in].
        codes: uint8, planar; see `quantize_4bit`.
        absmax: float32, or uint8 with double quantization.
        nested_absmax: float32 scales of double quantization, else None.
        offset: float32 scalar of double quantization, else None.
        shape: `(out_features, in_features)`.
        quant_type: as quantized.
        block_size: as quantized.
        bias: floats [out], or None.
        lora: `(xa, b)` of a low-rank update, floats [..., r] (the scaled `x @ a`) and [r, out].
        implementation: one of `IMPLEMENTATIONS`; by default the best that serves this.

    Returns:
        `[..., out]` in `x.dtype`.

    Raises:
        ValueError: unknown format, shapes that do not fit, or `implementation` does not serve this.

    >>> from jax import numpy as jnp
    >>> from pallas_kernels.quantize_4bit.api import quantize_4bit
    >>> w = jnp.eye(4)
    >>> matmul_4bit(jnp.ones((2, 4)), *quantize_4bit(w), shape=(4, 4)).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """
    check_format(quant_type, block_size)
    if len(shape) != 2 or x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"{x.shape=} does not fit a weight of (out, in) = {shape}")
    if bias is not None:
        if bias.shape != shape[:1]:
            raise ValueError(f"{bias.shape=} does not fit a weight of (out, in) = {shape}")
        bias = bias.astype(x.dtype)
    lead, rows = x.shape[:-1], math.prod(x.shape[:-1])
    if lora is not None:
        xa, b = lora
        if xa.shape[:-1] != lead or b.shape != (xa.shape[-1], shape[0]):
            raise ValueError(f"{xa.shape=} and {b.shape=} do not fit {x.shape=} and {shape=}")
        lora = xa.reshape(rows, -1).astype(x.dtype), b.astype(x.dtype)
    static = _Static(quant_type, block_size, tuple(shape))
    packed = codes, absmax, nested_absmax, offset
    with jax.named_scope("matmul_4bit"):
        y = _matmul(static, implementation, x.reshape(rows, shape[1]), packed, bias, lora)
    return y.reshape(*lead, shape[0])


def _run(static, implementation, which, x, *arrays, epilogue=()):
    """The product (`which` 0) or its transpose (1) of `x [M, ·]` with the packed weight."""
    fused = x.shape[0] <= tuning.fused_rows(static.shape, devices.current_target())
    names = [n for n in IMPLEMENTATIONS if fused or implementation or n not in _FUSED]

    def bound(name):
        function = IMPLEMENTATIONS[name][which]
        return lambda *a: function(
            *a[:5], **static._asdict(), **dict(zip(epilogue, a[5:], strict=True))
        )

    return devices.run(
        "matmul_4bit",
        {name: bound(name) for name in names},
        (x, *arrays),
        dtype=x.dtype,
        implementation=implementation,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(static, implementation, x, packed, bias, lora):
    epilogue = ("bias", "lora")
    return _run(static, implementation, 0, x, *packed, bias, lora, epilogue=epilogue)


def _forward(static, implementation, x, packed, bias, lora):
    y = _matmul(static, implementation, x, packed, bias, lora)
    gpu = devices.current_target().platform == "gpu"
    return y, (packed, bias is None, lora, _zero(x) if gpu else None)


def _backward(static, implementation, residuals, g):
    packed, no_bias, lora, zero = residuals
    if zero is not None:  # where the forward pass is computed again, this weight's turn is later
        packed = _after(zero, *packed)
    with jax.named_scope("matmul_4bit_transposed"):
        d_x = _run(static, implementation, 1, g, *packed)
    d_bias = None if no_bias else g.sum(axis=0)
    d_lora = None if lora is None else (g @ lora[1].T, lora[0].T @ g)
    return d_x, None, d_bias, d_lora


_matmul.defvjp(_forward, _backward)
