"""Data types for weights, compared by what they cost: bits, and the error of rounding to them.

A data type is a codebook, and every block of weights has a scale (`pallas_kernels.formats`):

    x[i] ~ codebook[nearest(x[i] / absmax[j])] * absmax[j]        j = i // block_size

Quality depends on the values alone, so nothing is packed here: a weight is *rounded*, to what it
would be decoded to, and stays a dense array. Rounding to NF4, FP4 of bitsandbytes and INT4 gives to
the bit what `dequantize(quantize(w))` gives; the other data types exist only to be compared.

FP4 is the name of several sets of values. With the largest scaled to 1, their magnitudes are

    E2M1            0  1/12  1/6  1/4  1/3  1/2  2/3  1     a sign, 2 exponent bits, 1 mantissa bit
    bnb             0  1/192 1/6  1/4  1/3  1/2  2/3  1     bitsandbytes': a smaller subnormal
    E3M0            0  1/64 1/32 1/16  1/8  1/4  1/2  1     a sign, 3 exponent bits: powers of two

The paper (QLoRA, arXiv 2305.14314, table 2) compares E2M1 and E3M0 and does not print their values.

Three kinds of random weights show what a data type is good for: normal ones, which NF4 is made for,
heavy-tailed ones (Student's t), and normal ones with a few outliers. An outlier is the absmax of
its block, and moves the other weights of it towards zero, where a data type has many values or few.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels import dequantize_absmax, quantize_absmax
from pallas_kernels.formats import CODEBOOKS, NESTED_BLOCK_SIZE, num_blocks

_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)


@dataclasses.dataclass(frozen=True)
class Datatype:
    """A codebook that blocks of weights are rounded to.

    Attributes:
        name: for tables.
        values: ascending, the largest magnitude 1, zero among them.
        bits: of a code.
        double_quant: whether the scales are in 8 bits.
    """

    name: str
    values: tuple[float, ...]
    bits: int
    double_quant: bool = False

    def stored_bits(self, size: int, block_size: int) -> int:
        """Bits that a tensor of `size` weights takes, scales included.

        A scale is a float32; with double quantization it is 8 bits, with a float32 for every 256
        scales and one for the tensor.

        >>> DATATYPES["NF4"].stored_bits(128, block_size=64), 128 * 4 + 2 * 32
        (576, 576)
        """
        blocks = num_blocks(size, block_size)
        scales = 32 * blocks
        if self.double_quant:
            scales = 8 * blocks + 32 * num_blocks(blocks, NESTED_BLOCK_SIZE) + 32
        return self.bits * size + scales


def _signed(magnitudes: Sequence[float], largest: float) -> tuple[float, ...]:
    scaled = np.asarray(magnitudes, np.float32) / np.float32(largest)
    return tuple(np.union1d(scaled, -scaled).tolist())


def _codebook(quant_type: str) -> tuple[float, ...]:
    """Those values of a stored format that a block can have."""
    values = np.unique(CODEBOOKS[quant_type])
    return tuple(values[np.abs(values) <= 1].tolist())


DATATYPES: dict[str, Datatype] = {
    datatype.name: datatype
    for datatype in (
        Datatype("NF4", _codebook("nf4"), 4),
        Datatype("NF4 + DQ", _codebook("nf4"), 4, double_quant=True),
        Datatype("FP4 E2M1", _signed((0, 0.5, 1, 1.5, 2, 3, 4, 6), 6), 4),
        Datatype("FP4 E3M0", _signed((0, 1, 2, 4, 8, 16, 32, 64), 64), 4),
        Datatype("FP4 bnb", _codebook("fp4"), 4),
        Datatype("INT4", _codebook("int4"), 4),
        Datatype("INT8", _signed(range(128), 127), 8),
    )
}


def round_weight(w: Float[Array, ...], datatype: Datatype, block_size: int) -> Float[Array, ...]:
    """What a tensor is after it was quantized and dequantized.

    Args:
        w: of any shape, flattened row-major for the blocks; the last one may be short.
        datatype: that it is rounded to.
        block_size: weights that share a scale.

    Returns:
        The same shape and dtype. A block of zeros stays one. A NaN or an infinity makes its block
        NaN, with double quantization all of it (loading refuses both).

    Raises:
        ValueError: the tensor has no elements, or the block size is not positive.

    >>> round_weight(jnp.array([0.3, -2.0, 0.0, 1.1]), DATATYPES["FP4 E3M0"], 4).tolist()
    [0.25, -2.0, 0.0, 1.0]
    """
    if w.size == 0 or block_size < 1:
        raise ValueError(f"{w.shape=}, {block_size=}: needed are elements and a positive size")
    values = np.array(datatype.values, np.float32)
    # One program for all 4-bit codebooks: a value that is there twice is never chosen.
    values = np.pad(values, (0, 2**datatype.bits - len(values)), mode="edge")
    return _round(jnp.asarray(w), values, block_size, datatype.double_quant)


@functools.partial(jax.jit, static_argnames=("block_size", "double_quant"))
def _round(w, values: Float32[Array, " codes"], block_size: int, double_quant: bool):
    flat = w.reshape(-1).astype(jnp.float32)
    blocks = jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)
    absmax = jnp.abs(blocks).max(axis=-1)
    # The same operations as in `pallas_kernels.quantize_4bit`, for the same bits.
    reciprocal = jnp.where(absmax < _SMALLEST_NORMAL, 0.0, 1.0 / absmax)
    scaled = blocks * reciprocal[:, None]
    bounds = (values[:-1] + values[1:]) / 2
    nearest = jnp.searchsorted(bounds, scaled, side="left", method="scan_unrolled")
    if double_quant:
        absmax = dequantize_absmax(*quantize_absmax(absmax))
    rounded = values[nearest] * absmax[:, None]
    rounded = jnp.where(jnp.isnan(scaled), jnp.nan, rounded)  # NaN would count as the largest
    return rounded.reshape(-1)[: w.size].reshape(w.shape).astype(w.dtype)


def squared_error(w: Float[Array, ...], rounded: Float[Array, ...]) -> tuple[float, float]:
    """Sum of the squared differences, and of the squares; the first over the second is the error.

    >>> squared_error(jnp.array([3.0, 4.0]), jnp.array([3.0, 3.0]))
    (1.0, 25.0)
    """
    return tuple(map(float, _squared_error(jnp.asarray(w), jnp.asarray(rounded))))


@jax.jit
def _squared_error(w, rounded):
    w, rounded = w.astype(jnp.float32), rounded.astype(jnp.float32)
    return jnp.sum((w - rounded) ** 2), jnp.sum(w**2)


def signal_to_noise(error: float) -> float:
    """A relative squared error in decibels; infinite for none.

    >>> signal_to_noise(0.01)
    20.0
    """
    return -10 * math.log10(error) if error else math.inf


def _outliers(rng: np.random.Generator, size: int) -> np.ndarray:
    weights = rng.standard_normal(size)
    return np.where(rng.random(size) < 1e-3, 20 * weights, weights)


# Names of random weights; each makes so many of them.
SYNTHETIC: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "Student t": lambda rng, size: rng.standard_t(5, size),
    "outliers": _outliers,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a data type costs somewhere.

    Attributes:
        source: which weights: a key of `SYNTHETIC`, or a model.
        datatype: a name.
        block_size: None where there are no blocks.
        bits: stored, per weight.
        error: sum of squared differences over sum of squares, of the weights.
        nats: of a model, the negative log-likelihood of each window of a text.
    """

    source: str
    datatype: str
    block_size: int | None
    bits: float
    error: float
    nats: tuple[float, ...] = ()


def measure_synthetic(
    block_sizes: Sequence[int], *, size: int = 1 << 20, seed: int = 0
) -> Iterator[Cost]:
    """Rounds random weights to every data type.

    Args:
        block_sizes: to be tried.
        size: weights of each kind.
        seed: of the weights.
    """
    for source, make in SYNTHETIC.items():
        w = jnp.asarray(make(np.random.default_rng(seed), size), jnp.float32)
        for datatype in DATATYPES.values():
            for block_size in block_sizes:
                difference, square = squared_error(w, round_weight(w, datatype, block_size))
                bits = datatype.stored_bits(size, block_size) / size
                yield Cost(source, datatype.name, block_size, bits, difference / square)
