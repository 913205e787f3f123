"""AdamW whose two moments take 8 bits each: 2 bytes a parameter where float32 takes 8.

A moment is cut into blocks of 256. A block is stored as its absolute maximum (float32, the scale)
and one 8-bit code an element, the index of the nearest value of the *dynamic map* (Dettmers et al.,
arXiv 2110.02861; the maps are those of bitsandbytes):

    moment[i] ~ map[code[i]] * scale[i // 256]

The map has seven decades below 1 and spends more codes on the higher ones, so within a block
values from 1 down to a millionth of the largest are told apart. The first moment takes the map
with a sign, the second the one without. Each step decodes, updates in float32, and encodes again:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    update = -lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

The update comes from the moments *before* they are rounded, as in bitsandbytes.

**Cut along axis 0.** Adapters of a scanned model have the layers as their leading axis, and the
paged optimizer hands this transformation a few layers at a time. A block therefore never crosses
from one index of axis 0 to the next (the last block of a row may be short), codes have the
parameter's shape, scales are [axis 0, blocks], and whether a leaf is in 8 bits at all depends on
the size of one row. So a piece gets the result of the whole, and that to the bit: compilers
contract a product and a sum into one rounding in one program and not in another, and so every
product is rounded here before it meets a sum (`_rounded`), and the last operation is none.

Small rows stay in float32. bitsandbytes does that to tensors under 4096 elements, because a
rounded moment of a bias or a norm does more harm than its bytes are worth. An adapter of one layer
on its own, `[features, rank]`, has rows of `rank`: pass a smaller `min_8bit_size` there.

Against bitsandbytes 0.50: the codes are the nearest of the map, as in its CUDA kernel (its CPU code
first rounds to a grid of 65536, which loses the four lowest decades). A second moment above zero is
never rounded to zero, where a later gradient of zero would make the update m / eps. A negative
first moment may be rounded to zero; theirs takes the smallest negative value. A gradient that is
not finite, or whose square is not, shows as NaN in its block, where theirs skips the element in
silence. Neither rounds stochastically; the percentile clipping that older ones had is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32, PyTree, UInt8

from pallas_kernels.formats import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, num_blocks
from qlora_jax.optim.skipping import ApplyIf, Skippable, select

BLOCK_SIZE = 256
# The values of both maps but zero lie above it.
_LEAST_EXPONENT = -24
# XLA on CPU treats subnormal floats as zero.
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)


class Moment8bit(NamedTuple):
    """A moment in 8 bits.

    Attributes:
        codes: uint8, of the parameter's shape.
        scales: float32 [shape[0], blocks], the absolute maximum of every block.
    """

    codes: UInt8[Array, "*shape"]
    scales: Float32[Array, "rows blocks"]


class AdamW8bitState(NamedTuple):
    """State of `adamw8bit`.

    Attributes:
        count: int32 scalar, updates done.
        mu: first moments, a tree like the parameters' of `Moment8bit` or, where rows are small,
            float32 arrays.
        nu: second moments, likewise.
    """

    count: Int32[Array, ""]
    mu: PyTree
    nu: PyTree


@dataclasses.dataclass(frozen=True)
class _Codebook:
    """A dynamic map, and tables that find the nearest of its values in two look-ups.

    The upper 16 bits of a float32 (sign, exponent, 7 bits of the fraction) name a *bucket* of
    numbers. The map is so coarse that a bucket holds at most one midpoint between values of it.

    Attributes:
        values: float32 [256] ascending.
        zero: the code of 0.
        midpoints: float32, between the values from 0 up, and infinity after the last.
        below: int32, by bucket from 2**-24 to 1, how many midpoints are below all of it.
    """

    values: np.ndarray
    zero: int
    midpoints: np.ndarray
    below: np.ndarray


def _codebook(values: np.ndarray) -> _Codebook:
    zero = int(np.searchsorted(values, 0))
    upper = values[zero:]
    midpoints = (upper[1:] + upper[:-1]) / np.float32(2)
    buckets = np.arange(_bucket(2.0**_LEAST_EXPONENT), _bucket(1.0) + 1, dtype=np.uint32)
    below = np.searchsorted(midpoints, (buckets << 16).view(np.float32), side="left")
    below[0] = 0  # this bucket reaches down to zero
    return _Codebook(values, zero, np.append(midpoints, np.float32(np.inf)), below.astype(np.int32))


def _bucket(x: float) -> int:
    return int(np.float32(x).view(np.uint32) >> 16)


_SIGNED = _codebook(DYNAMIC_MAP)
_UNSIGNED = _codebook(UNSIGNED_DYNAMIC_MAP)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    min_8bit_size: int = 4096,
) -> Skippable:
    """AdamW with moments in 8 bits, for leaves that are large enough.

    Args:
        learning_rate: a number, or a schedule of the number of updates done.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        min_8bit_size: a leaf whose slice along axis 0 has fewer elements, or that has only one
            axis, keeps its moments in float32.

    Returns:
        A transformation whose updates have the gradients' dtype, whatever the parameters'.

    >>> tx = adamw8bit(0.1)
    >>> params = {"lora_a": jnp.ones((2, 16, 512), jnp.bfloat16)}
    >>> moment = tx.init(params).mu["lora_a"]
    >>> moment.codes.shape, moment.codes.dtype, moment.scales.shape
    ((2, 16, 512), dtype('uint8'), (2, 32))
    """

    def init(params: PyTree) -> AdamW8bitState:
        def zeros(codebook: _Codebook):
            return jax.tree.map(lambda p: _zeros(p.shape, codebook, min_8bit_size), params)

        return AdamW8bitState(jnp.zeros((), jnp.int32), zeros(_SIGNED), zeros(_UNSIGNED))

    def update(
        updates: PyTree,
        state: AdamW8bitState,
        params: PyTree | None = None,
        *,
        apply_if: ApplyIf = True,
    ):
        if weight_decay and params is None:
            raise ValueError(f"{weight_decay=} needs the params: call update(grads, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        correction1 = _one_minus_power(b1, count)
        # Where the compiler sees that a divisor is a scalar, it multiplies with the reciprocal, and
        # where it does not, it divides: so we multiply.
        inverse2 = 1 / _one_minus_power(b2, count)
        rounded = functools.partial(_rounded, zero=jnp.minimum(count, 0))

        def rows(grad, param, mu, nu):
            g = rounded(grad.astype(jnp.float32))
            m = rounded(b1 * _decode(mu, _SIGNED)) + rounded((1 - b1) * g)
            v = rounded(b2 * _decode(nu, _UNSIGNED)) + rounded((1 - b2) * (g * g))
            found = -rate * m / (correction1 * (jnp.sqrt(v * inverse2) + eps))
            if weight_decay:
                found = found - rounded((rate * weight_decay) * param.astype(jnp.float32))
            new = _encode(m, mu, _SIGNED), _encode(v, nu, _UNSIGNED)
            # Row by row, while the old codes are at hand: a whole leaf of them is not kept.
            return found.astype(grad.dtype), *select(apply_if, new, (mu, nu))

        grads, treedef = jax.tree.flatten(updates)
        trees = (updates if params is None else params, state.mu, state.nu)
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        done = [_row_by_row(rows, *leaf) for leaf in zip(grads, *columns, strict=True)]
        found, mu, nu = (treedef.unflatten(x) for x in zip(*done, strict=True)) if done else trees
        return found, AdamW8bitState(select(apply_if, count, state.count), mu, nu)

    return Skippable(init, update)


def _row_by_row(rows: Callable, grad: Array, param: Array, mu, nu) -> tuple[Array, Any, Any]:
    """`rows` on one index of axis 0 after the other, written in place of what was read.

    On a whole leaf, decoded moments and midway values would take more than the codes save.
    """
    if not isinstance(mu, Moment8bit):
        return rows(grad, param, mu, nu)

    def body(i: Array, carry: PyTree) -> PyTree:
        def write(x: Array, row: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(x, row, i, axis=0)

        read = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=1)
        (grad, mu, nu), at = jax.tree.map(read, (carry, param))
        return jax.tree.map(write, carry, rows(grad, at, mu, nu))

    return jax.lax.fori_loop(0, grad.shape[0], body, (grad, mu, nu))


def _rounded(x: Float32[Array, "*n"], *, zero: Int32[Array, ""]) -> Float32[Array, "*n"]:
    """`x`, rounded to float32 whatever the compiler does around it.

    Exclusive or with a zero that only we know is one.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) ^ zero
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _one_minus_power(decay: float, count: Int32[Array, ""]) -> Float32[Array, ""]:
    # `1 - decay**count` in float32 would lose half its digits at the first steps.
    log = math.log(decay) if decay else -math.inf
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _zeros(shape: tuple[int, ...], codebook: _Codebook, min_8bit_size: int):
    row = math.prod(shape[1:])
    if len(shape) < 2 or row < min_8bit_size:
        return jnp.zeros(shape, jnp.float32)
    scales = jnp.zeros((shape[0], num_blocks(row, BLOCK_SIZE)), jnp.float32)
    return Moment8bit(jnp.full(shape, codebook.zero, jnp.uint8), scales)


def _to_blocks(x: Float[Array, "*shape"]) -> Float[Array, "rows blocks b"]:
    rows, row = x.shape[0], math.prod(x.shape[1:])
    x = jnp.pad(x.reshape(rows, row), ((0, 0), (0, -row % BLOCK_SIZE)))
    return x.reshape(rows, num_blocks(row, BLOCK_SIZE), BLOCK_SIZE)


def _decode(moment, codebook: _Codebook) -> Float32[Array, "*shape"]:
    if not isinstance(moment, Moment8bit):
        return moment
    codes, scales = moment
    rows, row = codes.shape[0], math.prod(codes.shape[1:])
    values = jnp.asarray(codebook.values).at[codes].get(mode="promise_in_bounds")
    blocks = _to_blocks(values) * scales[..., None]
    return blocks.reshape(rows, -1)[:, :row].reshape(codes.shape)


def _encode(x: Float32[Array, "*shape"], like, codebook: _Codebook):
    if not isinstance(like, Moment8bit):
        return x
    rows, row = x.shape[0], math.prod(x.shape[1:])
    blocks = _to_blocks(x)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    reciprocal = jnp.where(scales >= _SMALLEST_NORMAL, 1 / scales, 0.0)
    codes = _nearest(blocks * reciprocal[..., None], codebook).astype(jnp.uint8)
    return Moment8bit(codes.reshape(rows, -1)[:, :row].reshape(x.shape), scales)


def _nearest(unit: Float32[Array, "*n"], codebook: _Codebook) -> Int32[Array, "*n"]:
    """The code of the nearest value of the map, for numbers from -1 to 1."""
    size = jnp.abs(unit)
    last = len(codebook.below) - 1
    bucket = jax.lax.bitcast_convert_type(size, jnp.int32) >> 16
    bucket = jnp.clip(bucket - _bucket(2.0**_LEAST_EXPONENT), 0, last)
    below = jnp.asarray(codebook.below).at[bucket].get(mode="promise_in_bounds")
    midpoint = jnp.asarray(codebook.midpoints).at[below].get(mode="promise_in_bounds")
    steps = below + (size > midpoint)
    if codebook.zero == 0:
        return jnp.maximum(steps, (unit > 0).astype(jnp.int32))
    # Below zero there is one value less: -1 is not in the map.
    return codebook.zero + jnp.where(unit < 0, -jnp.minimum(steps, codebook.zero), steps)
