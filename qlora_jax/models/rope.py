"""Rotary position embeddings, the half-split form that Hugging Face checkpoints use.

A head of size H is read as H/2 complex numbers whose real parts are the first half of the vector
and whose imaginary parts are the second. The i-th is turned by the angle position * theta^(-2i/H).
(Meta's own checkpoints and GGUF files of the llama architecture interleave the two parts instead,
so the rows of their q and k projections have to be reordered on loading.)

Long-context models stretch the wavelengths; `RopeScaling` says how.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotation frequencies are changed to reach longer contexts.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides only the slow ones and
        blends in between (Llama 3.1, arXiv 2407.21783); "factors" divides the i-th frequency by
        `factors[i]`, the form in which GGUF files store the result of "llama3".
      factor: the stretch of "linear" and "llama3".
      low_freq_factor: "llama3": wavelengths above `original_max_position_embeddings /
        low_freq_factor` are stretched.
      high_freq_factor: "llama3": wavelengths below `original_max_position_embeddings /
        high_freq_factor` stay.
      original_max_position_embeddings: "llama3": the context length before stretching, in tokens.
      factors: "factors": H/2 divisors.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the `head_dim // 2` rotations, float32.

    >>> inverse_frequencies(4, theta=100.0)
    array([1. , 0.1], dtype=float32)
    >>> inverse_frequencies(4, theta=100.0, scaling=RopeScaling("linear", factor=2.0))
    array([0.5 , 0.05], dtype=float32)
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents)
    if scaling is None:
        return frequencies
    match scaling.kind:
        case "linear":
            return frequencies / np.float32(scaling.factor)
        case "factors":
            return frequencies / np.asarray(scaling.factors, np.float32)
        case "llama3":
            return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    scaled = frequencies * (keep + (1.0 - keep) / scaling.factor)
    return scaled.astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """The cosines and sines of every position, float32; computed once, used by all layers.

    >>> cos, sin = rope_tables(jnp.array([[0, 1]]), inverse_frequencies(4, theta=100.0))
    >>> cos.shape, float(cos[0, 0, 0, 0]), float(sin[0, 0, 0, 0])
    ((1, 2, 1, 2), 1.0, 0.0)
    """
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Turns the heads of `x` by their positions' angles, in float32, and returns `x`'s dtype.

    Where there are fewer angles than half the size of a head, the rest of the head stays (partial
    rotary embeddings).

    >>> cos, sin = rope_tables(jnp.array([[0]]), inverse_frequencies(2, theta=100.0))
    >>> apply_rope(jnp.ones((1, 1, 1, 2)), cos, sin)
    Array([[[[1., 1.]]]], dtype=float32)
    """
    rotary_dim = 2 * cos.shape[-1]
    real, imag = jnp.split(x[..., :rotary_dim].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([real * cos - imag * sin, imag * cos + real * sin], axis=-1)
    turned = turned.astype(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., rotary_dim:]], axis=-1)
