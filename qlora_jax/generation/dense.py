"""A dense copy of the weights for decoding on a CPU, where memory allows.

On a GPU 4-bit weights make decoding faster: the memory is the limit, and a kernel decodes while it
reads (`pallas_kernels.matmul_4bit`). A CPU needs several times longer to decode a weight than to
read it in 16 bits, so there the weights are decoded once, into the dtype of the computation, and
kept beside the packed ones. The values are the same ones that the packed product computes with.

How they lie in memory decides what XLA makes of the product. With several rows it calls a matrix
product, which wants [in, out]. With one row (batch 1) `row_product` gives it pieces of [out, in] in
a loop of their own, for which XLA emits a single kernel that reads, widens and multiplies at the
speed of the memory. The plain product of the same arrays first writes a float32 copy of the matrix,
and takes twice as long.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.flax_nnx import substitute
from qlora_jax.linear_layers import linear_layers
from qlora_jax.memory_limits import host_limits
from qlora_jax.mixed import map_layers
from qlora_jax.models.llama import Llama
from qlora_jax.models.unscanned import UnscannedVariable
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.quantized import QuantizedTensor, dequantize
from qlora_jax.tree import join_path

# Up to so many rows at once the copy made for one row is used, and for more the packed weights.
_FEW_ROWS = 128
# Outputs of one step of `row_product`; for few of them the loop would be unrolled.
_PIECE = 192
# Of the vocabulary in one product of several rows.
_VOCABULARY_PIECE = 16384
# Projections of one input, by their names in every family.
_SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
# What the copy may take of the memory that is free.
_SHARE = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrices:
    """The weights of a projection in all layers, and which layer is asked for."""

    stack: Float[Array, "L N K"]
    layer: Int[Array, ""] | int = 0

    def at(self, layer: Int[Array, ""]) -> "Matrices":
        """What a layer sees."""
        return dataclasses.replace(self, layer=layer)

    @property
    def matrix(self) -> Float[Array, "N K"]:
        """Of the layer."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)


class RowCopy(UnscannedVariable):
    """`Matrices` that were decoded for speed; no part of the model's own state.

    Not sliced by the scan over the layers: the slice would be a copy.
    """


class DenseCopy(nnx.Variable):
    """The same for several rows."""


def row_product(row: Float[Array, "1 K"], matrices: Matrices) -> Float32[Array, "1 N"]:
    """`row @ matrix.T` on a CPU, at the speed of the memory; see the module.

    >>> row_product(jnp.ones((1, 2)), Matrices(jnp.arange(6.0).reshape(1, 3, 2)))
    Array([[1., 5., 9.]], dtype=float32)
    """
    _, outputs, inputs = matrices.stack.shape
    size = min(_PIECE, -(-outputs // 2))

    def piece(index: Int[Array, ""], y: Float32[Array, "1 N"]) -> Float32[Array, "1 N"]:
        # The last piece begins earlier: reading and writing are clamped alike.
        start = (matrices.layer, index * size, 0)
        some = jax.lax.dynamic_slice(matrices.stack, start, (1, size, inputs))[0]
        product = jnp.matmul(row, some.T, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice(y, product, (0, index * size))

    zeros = jnp.zeros((1, outputs), jnp.float32)
    return jax.lax.fori_loop(0, -(-outputs // size), piece, zeros)


class RowLinear(nnx.Module):
    """A linear layer without adapter, with a copy of its kernel for one row at a time.

    Attributes:
        copy: [L, N, in]. Layers with one input share it: their products are the same one, which XLA
            computes once, and one long stretch of memory is read faster than several.
        outputs: of the copy's N the first one of this layer, and the one behind its last.
        packed: the layer itself, which takes many rows at once.
    """

    def __init__(self, linear: QLoRALinear, dtype: jnp.dtype, copy: RowCopy, start: int):
        """Takes its rows of the copy."""
        self.copy, self.outputs = copy, (start, start + linear.out_features)
        self.packed, self.dtype = linear, linear.dtype or dtype

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """Applies the layer."""
        rows = math.prod(x.shape[:-1])
        if rows > _FEW_ROWS:
            return self.packed(x)
        x, kernel, bias = x.astype(self.dtype), self.copy.get_value(), self.packed.bias
        if rows == 1:
            y = row_product(x.reshape(1, -1), kernel).astype(x.dtype).reshape(*x.shape[:-1], -1)
        else:
            y = x @ kernel.matrix.T
        y = y[..., slice(*self.outputs)]
        return y if bias is None else y + bias.get_value().astype(y.dtype)


class DenseLinear(nnx.Module):
    """A linear layer without adapter, with a dense copy of its kernel for several rows.

    Attributes:
        copy: [*L, in, out].
        bias: of the layer, or None.
    """

    def __init__(self, linear: QLoRALinear, dtype: jnp.dtype):
        """Decodes the kernel of a layer, one matrix at a time."""
        self.copy = DenseCopy(_decode(linear, dtype))
        self.bias, self.dtype = nnx.data(linear.bias), linear.dtype or dtype

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """Applies the layer."""
        y = x.astype(self.dtype) @ self.copy.get_value()
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class DenseHead(nnx.Module):
    """The output head.

    Attributes:
        copy: for one row [1, V, D]; for more a tuple of pieces of the vocabulary [D, size], because
            a product with tens of thousands of outputs is slower than two with half of them.
    """

    def __init__(self, table: Float[Array, "V D"], *, one_row: bool):
        """Takes the rows of a head (or of a tied embedding)."""
        if one_row:
            self.copy = RowCopy(Matrices(table[None]))
        else:
            starts = range(0, table.shape[0], _VOCABULARY_PIECE)
            self.copy = DenseCopy(tuple(table[i : i + _VOCABULARY_PIECE].T.copy() for i in starts))

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        copy, rows = self.copy.get_value(), hidden.reshape(-1, hidden.shape[-1])
        if isinstance(copy, Matrices):
            rows = rows.astype(copy.stack.dtype)
            logits = jax.lax.map(lambda row: row_product(row[None], copy)[0], rows)
        else:
            rows = rows.astype(copy[0].dtype)
            pieces = [jnp.matmul(rows, one, preferred_element_type=jnp.float32) for one in copy]
            logits = jnp.concatenate(pieces, axis=-1)
        return logits.reshape(*hidden.shape[:-1], -1)


def dense_bytes(model: Llama) -> int:
    """What a dense copy takes."""
    config, linears = model.config, linear_layers(model, "all-linear")
    count = sum(
        math.prod(one.leading_shape) * one.in_features * one.out_features
        for one in linears.values()
    )
    return (count + config.vocab_size * config.hidden_size) * jnp.dtype(model.dtype).itemsize


def fits_host(model: Llama) -> bool:
    """Whether this is a CPU with memory for a dense copy."""
    if jax.default_backend() != "cpu":
        return False
    return dense_bytes(model) <= _SHARE * min(host_limits(pinned=False).values())


def with_dense_copy(model: Llama, *, one_row: bool) -> Llama:
    """The model, whose linear layers and head have dense copies of their weights.

    Args:
        model: without adapters, or of `adapters.serve_adapters`; it is changed.
        one_row: made for decoding one row at a time.
    """
    dtype, linears = jnp.dtype(model.dtype), linear_layers(model, "all-linear")
    copies = {}
    if one_row:
        for paths in _with_same_input(linears):
            group = [linears[path] for path in paths]
            kernels = [_decode(linear, dtype, transpose=True) for linear in group]
            copy, start = RowCopy(Matrices(jnp.concatenate(kernels, axis=-2))), 0
            for path, linear in zip(paths, group, strict=True):
                copies[path] = RowLinear(linear, dtype, copy, start)
                start += linear.out_features
    else:
        for path, linear in linears.items():
            if not _is_dense(linear, dtype):
                copies[path] = DenseLinear(linear, dtype)
    nodes = {join_path(path): id(node) for path, node in nnx.iter_graph(model)}
    copies = {nodes[path]: copy for path, copy in copies.items()}
    table = _head_table(model)
    model = substitute(model, copies, {})
    if table is not None:
        model.lm_head = nnx.data(DenseHead(table.astype(dtype), one_row=one_row))
    return model


def _with_same_input(linears: Iterable[str]) -> list[list[str]]:
    """The paths, and together those whose layers have one input.

    >>> _with_same_input(["a/q_proj", "a/o_proj", "a/k_proj/base", "b/q_proj"])
    [['a/q_proj', 'a/k_proj/base'], ['a/o_proj'], ['b/q_proj']]
    """
    groups: dict[tuple[str, int | str], list[str]] = {}
    for path in linears:
        # Below an adapter's layer its base is called "base".
        parent, _, name = path.removesuffix("/base").rpartition("/")
        same = (i for i, names in enumerate(_SAME_INPUT) if name in names)
        groups.setdefault((parent, next(same, name)), []).append(path)
    return list(groups.values())


def _is_dense(linear: QLoRALinear, dtype: jnp.dtype) -> bool:
    """Whether a layer lies in memory as it does in a copy for several rows."""
    kernel = linear.kernel.get_value()
    return isinstance(kernel, jax.Array) and kernel.dtype == dtype


def _head_table(model: Llama) -> Float[Array, "V D"] | None:
    """The dense head [V, D], or None where it is stored in another way."""
    if model.lm_head is None:
        if type(model.embed_tokens) is nnx.Embed:
            return model.embed_tokens.embedding.get_value()
        return None
    return model.lm_head.kernel.get_value().T if type(model.lm_head) is nnx.Linear else None


def _decode(
    linear: QLoRALinear, dtype: jnp.dtype, *, transpose: bool = False
) -> Float[Array, "*L rows columns"]:
    """The kernel [*L, in, out], or transposed."""
    return _decode_kernel(linear.matrix_kernel, linear.leading_shape, dtype, transpose)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _decode_kernel(kernel: Any, leading_shape: tuple[int, ...], dtype: jnp.dtype, transpose: bool):
    def dense(kernel: QuantizedTensor | Array) -> Array:
        if isinstance(kernel, QuantizedTensor):
            kernel = dequantize(kernel, dtype).T
        kernel = kernel.astype(dtype)
        return kernel.T if transpose else kernel

    return map_layers(dense, leading_shape, kernel)
