"""Embeddings and output head in 8 bits: for bases in 4 bits, the largest part that is not.

A row belongs to a token and is stored as int8 codes under one float32 scale:

    scale[v] = max_d |W[v, d]| / 127        codes[v, d] = round(W[v, d] / scale[v])

so a row's largest value is exact and no value is off by more than half a scale. What makes rows the
right unit is the head: a row's scale is the same for all products that its logit is the sum of,

    logits[t, v] = sum_d h[t, d] W[v, d] = scale[v] * sum_d h[t, d] codes[v, d]

and leaves the product. The factors are then integers up to 127, which bfloat16 and float16 hold
exactly, and the scale multiplies the float32 sum: beyond the codes themselves nothing is rounded.

Looking a token up decodes its row alone. The head's product goes over the vocabulary in pieces of a
few thousand rows, forward and backward, so that of a 16-bit copy only one piece exists at a time.
The tables are frozen: the gradient goes to the hidden states only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import substitute
from qlora_jax.linear_layers import is_head
from qlora_jax.nnx_linear import QuantizedParam

VOCAB_QUANT_TYPES = ("none", "int8")
_LARGEST_CODE = 127
# Of one piece of a table: 32 MiB in 16 bits, 2,048 rows of a 65B model.
_PIECE_ELEMENTS = 1 << 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """A table with a row for each token, in 8 bits: `table[v] == scale[v] * codes[v]`.

    Attributes:
        codes: int8 [V, D], in -127 to 127.
        scale: float32 [V], not negative.
    """

    codes: Int8[Array, "V D"]
    scale: Float32[Array, " V"]

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and features."""
        return tuple(self.codes.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.codes.size


def quantize_rows(table: Float[Array, "V D"]) -> Int8Rows:
    """Quantizes each row by its largest magnitude.

    >>> rows = quantize_rows(jnp.array([[1.0, -2.0], [0.0, 0.0]]))
    >>> rows.codes.tolist(), (127 * rows.scale).tolist()
    ([[64, -127], [0, 0]], [2.0, 0.0])
    """
    table = table.astype(jnp.float32)
    scale = jnp.max(jnp.abs(table), axis=-1) / _LARGEST_CODE
    codes = jnp.round(table / jnp.where(scale > 0, scale, 1.0)[:, None])
    return Int8Rows(jnp.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(jnp.int8), scale)


def dequantize_rows(rows: Int8Rows, dtype: DTypeLike = jnp.float32) -> Float[Array, "V D"]:
    """The whole dense table.

    >>> dequantize_rows(quantize_rows(jnp.array([[1.27, -0.5]]))).round(2).tolist()
    [[1.2699999809265137, -0.5]]
    """
    return (rows.codes.astype(jnp.float32) * rows.scale[:, None]).astype(dtype)


def look_up(rows: Int8Rows, tokens: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B D"]:
    """The rows of some tokens; NaN, as of `nnx.Embed`, where there is no such token.

    >>> look_up(quantize_rows(jnp.eye(3)), jnp.array([[2, 0]]), jnp.float32).tolist()
    [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    codes = jnp.take(rows.codes, tokens, axis=0).astype(jnp.float32)
    return (codes * jnp.take(rows.scale, tokens)[..., None]).astype(dtype)


@jax.custom_vjp
def rows_product(hidden: Float[Array, "*B D"], rows: Int8Rows) -> Float32[Array, "*B V"]:
    """`hidden @ table.T`: logits, in float32. The gradient goes to `hidden` only.

    >>> rows_product(jnp.array([[1.0, 2.0]]), quantize_rows(jnp.eye(2))).tolist()
    [[1.0, 2.0]]
    """
    flat = hidden.reshape(-1, hidden.shape[-1])

    def add_piece(piece: _Piece, logits: Float32[Array, "T V"]):
        codes = piece.codes.astype(flat.dtype)
        part = jnp.einsum("td,vd->tv", flat, codes, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(logits, part * piece.scale, piece.start, axis=1)

    empty = jnp.zeros((flat.shape[0], rows.shape[0]), jnp.float32)
    return _over_pieces(rows, add_piece, empty).reshape(*hidden.shape[:-1], -1)


def _rows_product_forward(hidden, rows):
    return rows_product(hidden, rows), (rows, jnp.zeros((0,), hidden.dtype))


def _rows_product_backward(residuals, gradient):
    rows, like_hidden = residuals
    dtype = like_hidden.dtype
    flat = gradient.reshape(-1, gradient.shape[-1])
    # Scales are divided by the largest, else the small gradients of single tokens, times a scale of
    # a thousandth, would vanish in float16.
    largest = jnp.maximum(jnp.max(rows.scale), jnp.finfo(jnp.float32).tiny)

    def add_piece(piece: _Piece, total: Float32[Array, "T D"]):
        g = jax.lax.dynamic_slice_in_dim(flat, piece.start, piece.codes.shape[0], axis=1)
        g = (g * jnp.where(piece.is_new, piece.scale / largest, 0.0)).astype(dtype)
        codes = piece.codes.astype(dtype)
        return total + jnp.einsum("tv,vd->td", g, codes, preferred_element_type=jnp.float32)

    zero = jnp.zeros((flat.shape[0], rows.shape[1]), jnp.float32)
    total = _over_pieces(rows, add_piece, zero) * largest
    return total.reshape(*gradient.shape[:-1], -1).astype(dtype), None


rows_product.defvjp(_rows_product_forward, _rows_product_backward)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some successive rows of a table.

    Attributes:
        start: index of the first.
        codes: int8 [n, D].
        scale: float32 [n].
        is_new: bool [n], False for rows that the piece before had too.
    """

    start: Int[Array, ""]
    codes: Array
    scale: Array
    is_new: Array


def _over_pieces(rows: Int8Rows, function: Callable[[_Piece, Array], Array], carry: Array) -> Array:
    """Applies a function to one piece after the other.

    All pieces have one size; the last one begins earlier where that does not divide the table.

    The loop is a `while_loop`, no `scan` (nor a `fori_loop`, which becomes one). Out of a scan JAX
    moves what depends on constants alone, and would decode all pieces beforehand.
    """
    count, features = rows.shape
    length = min(count, max(1, _PIECE_ELEMENTS // features))

    def body(state: tuple[Int[Array, ""], Array]) -> tuple[Int[Array, ""], Array]:
        index, carry = state
        start = jnp.minimum(index * length, count - length)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        is_new = start + jnp.arange(length) >= index * length
        piece = _Piece(start, take(rows.codes), take(rows.scale), is_new)
        return index + 1, function(piece, carry)

    def is_left(state: tuple[Int[Array, ""], Array]) -> Bool[Array, ""]:
        return state[0] * length < count

    return jax.lax.while_loop(is_left, body, (jnp.int32(0), carry))[1]


class Int8Embed(nnx.Module):
    """Takes the place of an `nnx.Embed`, with a frozen table in 8 bits.

    Attributes:
        embedding: `QuantizedParam` with `Int8Rows` [V, D].
        dtype: of what is looked up; None: float32.
    """

    def __init__(self, embedding: QuantizedParam, dtype: DTypeLike | None):
        """Takes a quantized table over; `quantize_vocabulary` calls it."""
        self.embedding, self.dtype = embedding, dtype

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Looks tokens up."""
        return look_up(self.embedding.get_value(), tokens, self.dtype or jnp.float32)

    def attend(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits of a head that is tied to this table."""
        return rows_product(hidden, self.embedding.get_value())


class Int8Head(nnx.Module):
    """Takes the place of an output head that is an `nnx.Linear`; its logits are float32.

    Attributes:
        kernel: `QuantizedParam` with `Int8Rows` [V, D].
        bias: `nnx.Param` [V] or None.
    """

    def __init__(self, kernel: QuantizedParam, bias: nnx.Param | None):
        """Takes a quantized kernel over; `quantize_vocabulary` calls it."""
        self.kernel, self.bias = kernel, nnx.data(bias)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits."""
        logits = rows_product(hidden, self.kernel.get_value())
        return logits if self.bias is None else logits + self.bias.get_value().astype(logits.dtype)


def quantize_vocabulary(model: nnx.Module) -> nnx.Module:
    """A copy of a model with its embeddings and output heads in 8 bits.

    Replaced are `nnx.Embed` modules and `nnx.Linear` modules with the name of a head (as
    "all-linear" of `apply_qlora` leaves them alone). A model whose head is tied to its embedding
    has to call `embed.attend(hidden)`, because there is no dense table any more.

    Args:
        model: any NNX model, also an abstract one or one with adapters; it stays as it is.

    Returns:
        The model; variables that were not quantized share their arrays with `model`.

    Raises:
        ConfigError: there is no such module.

    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(16, 4, rngs=rngs)
    ...         self.lm_head = nnx.Linear(4, 16, use_bias=False, rngs=rngs)
    >>> model = quantize_vocabulary(Model(nnx.Rngs(0)))
    >>> model.lm_head(model.embed(jnp.array([1, 2]))).shape
    (2, 16)
    """
    model = nnx.clone(model)
    replacements: dict[int, Any] = {}
    found = False
    for path, node in nnx.iter_graph(model):
        found |= isinstance(node, Int8Embed | Int8Head)
        if type(node) is nnx.Embed and len(node.embedding.get_value().shape) == 2:
            table = _quantize(node.embedding, quantize_rows)
            replacements[id(node)] = Int8Embed(table, node.dtype)
        elif type(node) is nnx.Linear and is_head(path, node):
            kernel = _quantize(node.kernel, lambda kernel: quantize_rows(kernel.T))
            replacements[id(node)] = Int8Head(kernel, node.bias)
    if not replacements and not found:
        raise ConfigError(
            "the model has no embedding (nnx.Embed) and no output head (nnx.Linear) to store in 8 "
            'bits; use vocab_quant_type="none"'
        )
    return substitute(model, replacements, {})


def _quantize(variable: nnx.Variable, function: Callable[[Array], Int8Rows]) -> QuantizedParam:
    value = variable.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        return QuantizedParam(jax.eval_shape(function, value))
    return QuantizedParam(jax.jit(function)(value))
