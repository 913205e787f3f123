"""`QuantizedTensor`: a frozen 4-bit weight as a pytree, and the functions on it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

import pallas_kernels as pk
from pallas_kernels.devices import compiler_options
from pallas_kernels.formats import check_format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 4 bits, and in 8 more per block.

    `dequantize(q)[i] == codebook[code[i]] * absmax[i // block_size]` with `i` counting row-major,
    and with double quantization
    `absmax[j] == dynamic_map[code8[j]] * nested_absmax[j // 256] + offset`.

    The array fields may all carry the same leading axes `*L`: a stack of tensors, such as the
    same weight of all layers. `jax.vmap(quantize)` makes one, `jax.lax.scan` takes it apart.

    Attributes:
        codes: uint8 [*L, plane], two codes a byte in planar order (`pallas_kernels.formats`).
        absmax: float32 [*L, blocks], or uint8 with double quantization.
        nested_absmax: float32 [*L, ceil(blocks / 256)], or None.
        offset: float32 [*L], or None.
        quant_type: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: elements a block.
        shape: of one tensor, without `*L`; a matrix is `(out_features, in_features)`.
        dtype: of the original, and what `dequantize` gives unless told otherwise.
    """

    codes: UInt8[Array, "*L plane"]
    absmax: Float32[Array, "*L blocks"] | UInt8[Array, "*L blocks"]
    nested_absmax: Float32[Array, "*L nested"] | None
    offset: Float32[Array, "*L"] | None
    quant_type: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The stack's axes, `()` for a single tensor."""
        return tuple(self.codes.shape[:-1])

    @property
    def size(self) -> int:
        """Number of weights, those of the whole stack."""
        return math.prod(self.leading_shape) * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all array fields."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """Stored bits a weight: about 4.127 for NF4, block 64, double quantization."""
        return 8 * self.nbytes / self.size


def quantize(
    w: Float[Array, ...],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantizes one tensor of any shape to 4 bits, as bitsandbytes does.

    Args:
        w: float32, bfloat16 or float16. For `matmul`, a matrix `(out_features, in_features)`.
            A stack of tensors is quantized by `jax.vmap(quantize)`.
        quant_type: `"nf4"` (normal weights), `"fp4"` or `"int4"`.
        block_size: elements that share a scale: 32 to 4096, powers of two.
        double_quant: store the scales in 8 bits.
        name: how messages call the tensor.

    Returns:
        The `QuantizedTensor`.

    Raises:
        ValueError: unknown format, empty, no float of 16 or 32 bits, or (outside of `jit`)
            a NaN or an infinity in `w`.

    >>> q = quantize(jnp.linspace(-1.0, 1.0, 128 * 64).reshape(64, 128))
    >>> q.shape, q.codes.shape, q.absmax.dtype
    ((64, 128), (4096,), dtype('uint8'))
    """
    try:
        q, largest = _quantize(
            jnp.asarray(w), quant_type=quant_type, block_size=block_size, double_quant=double_quant
        )
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    if not isinstance(largest, jax.core.Tracer) and not bool(jnp.isfinite(largest)):
        raise ValueError(f"{name}: holds a NaN or an infinity, which no 4-bit code can store")
    return q


@functools.partial(jax.jit, static_argnames=("quant_type", "block_size", "double_quant"))
def _quantize(w, *, quant_type, block_size, double_quant):
    codes, absmax = pk.quantize_4bit(w, quant_type=quant_type, block_size=block_size)
    largest = absmax.max()
    nested = offset = None
    if double_quant:
        absmax, nested, offset = pk.quantize_absmax(absmax)
    static = dict(quant_type=quant_type, block_size=block_size, shape=w.shape, dtype=w.dtype)
    return QuantizedTensor(codes, absmax, nested, offset, **static), largest


def abstract_quantized(
    shape: tuple[int, ...],
    *,
    leading_shape: tuple[int, ...] = (),
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: jnp.dtype = jnp.float32,
) -> QuantizedTensor:
    """The `QuantizedTensor` of `jax.ShapeDtypeStruct`s that `quantize` would give.

    >>> abstract_quantized((64, 64), leading_shape=(3,)).codes.shape
    (3, 2048)
    """
    check_format(quant_type, block_size)
    q = jax.eval_shape(
        lambda w: _quantize(
            w, quant_type=quant_type, block_size=block_size, double_quant=double_quant
        )[0],
        jax.ShapeDtypeStruct(shape, dtype),
    )
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*leading_shape, *a.shape), a.dtype), q)


def dequantize(q: QuantizedTensor, dtype: jnp.dtype | None = None) -> Float[Array, "*L ..."]:
    """The dense tensor, or stack of tensors.

    Args:
        q: the quantized tensor.
        dtype: of the result; by default the original's.

    Returns:
        An array `[*q.leading_shape, *q.shape]`.

    >>> q = quantize(jnp.array([[1.0, -1.0], [0.0, 1.0]]))
    >>> dequantize(q).tolist()
    [[1.0, -1.0], [0.0, 1.0]]
    """
    dtype = jnp.dtype(dtype or q.dtype)
    if isinstance(q.codes, jax.Array) and not isinstance(q.codes, jax.core.Tracer):
        (platform,) = {device.platform for device in q.codes.devices()}
        return _compiled_dequantize(platform)(q, dtype)
    return _dequantize(q, dtype)


@functools.cache
def _compiled_dequantize(platform):
    return jax.jit(_dequantize, static_argnums=1, compiler_options=compiler_options(platform))


def _dequantize(q, dtype):
    if q.leading_shape:
        return jax.vmap(lambda one: _dequantize(one, dtype))(q)
    return pk.dequantize_4bit(
        q.codes,
        q.absmax,
        q.nested_absmax,
        q.offset,
        shape=q.shape,
        quant_type=q.quant_type,
        block_size=q.block_size,
        dtype=dtype,
    )


def matmul(
    x: Float[Array, "*B in"],
    q: QuantizedTensor,
    *,
    lora: tuple[Float[Array, "*B r"], Float[Array, "r out"]] | None = None,
) -> Float[Array, "*B out"]:
    """`x @ dequantize(q).T` in `x.dtype`; the gradient goes to `x` (and `lora`) only.

    The backward pass keeps the packed weight and dequantizes it again.

    Args:
        x: floats [..., in_features].
        q: a single matrix `(out_features, in_features)`; take stacks apart with `scan` or `vmap`.
        lora: `(xa, b)`: the product `xa @ b` is added, for few rows on a GPU by the same kernel.

    Returns:
        [..., out_features] in `x.dtype`.

    Raises:
        ValueError: `q` is a stack or no matrix, or the shapes do not fit.

    >>> matmul(jnp.ones((1, 2)), quantize(jnp.array([[1.0, -1.0], [0.0, 1.0]]))).tolist()
    [[0.0, 1.0]]
    """
    if q.leading_shape or len(q.shape) != 2:
        raise ValueError(
            f"matmul takes one matrix, got {q.leading_shape=} and {q.shape=}: "
            "use jax.lax.scan or jax.vmap over a stack"
        )
    return pk.matmul_4bit(
        x,
        q.codes,
        q.absmax,
        q.nested_absmax,
        q.offset,
        shape=q.shape,
        quant_type=q.quant_type,
        block_size=q.block_size,
        lora=lora,
    )


def quantize_params(
    params: Any,
    where: str = r".*_proj/kernel",
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> Any:
    """Replaces the matching kernels of a pytree by `QuantizedTensor`s.

    Flax stores a kernel as `(in, out)`; it is transposed to `(out, in)`, so that blocks run along
    the input as they do in checkpoints. Leading axes are a stack of layers and stay.

    Args:
        params: any pytree; a leaf's path is its keys joined by "/".
        where: regular expression that a whole path must match.
        quant_type: see `quantize`.
        block_size: see `quantize`.
        double_quant: see `quantize`.

    Returns:
        The same tree with `QuantizedTensor`s in the place of the matching leaves.

    Raises:
        ValueError: nothing matches, a match has fewer than two axes, or see `quantize`.

    >>> frozen = quantize_params({"q_proj": {"kernel": jnp.ones((8, 4))}})
    >>> frozen["q_proj"]["kernel"].shape
    (4, 8)
    """
    settings = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    seen, matched = [], []

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        seen.append(name)
        if not re.fullmatch(where, name):
            return leaf
        if leaf.ndim < 2:
            raise ValueError(f"{name}: a kernel is (..., in, out), this one is {leaf.shape}")
        matched.append(name)
        quantize_one = functools.partial(quantize, **settings, name=name)
        stack = leaf.reshape(-1, *leaf.shape[-2:]).swapaxes(-1, -2)
        if leaf.ndim == 2:
            return quantize_one(stack[0])
        layers = [quantize_one(w) for w in stack]
        return jax.tree.map(lambda *a: jnp.stack(a).reshape(*leaf.shape[:-2], *a[0].shape), *layers)

    result = jax.tree_util.tree_map_with_path(one, params)
    if not matched:
        raise ValueError(f"{where=} matches no leaf; the first paths are {seen[:8]}")
    return result
