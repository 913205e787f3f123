"""A dense copy of the weights for decoding on a CPU, where memory allows.

On a GPU 4-bit weights make decoding faster: the memory is the limit, and a kernel decodes while it
reads (`pallas_kernels.matmul_4bit`). A CPU needs several times longer to decode a weight than to
read it in 16 bits, so there the weights are decoded once, into the dtype of the computation, and
kept beside the packed ones. The values are the same ones that the packed product computes with.

How they lie in memory decides what XLA makes of the product. One row (batch 1) becomes a loop that
reads the weights once, which is fast if every output's weights lie side by side, [out, in]; with
more rows it calls a matrix product, which wants [in, out]. Both are fast for matrices of a few
thousand rows only, so the vocabulary is cut into pieces.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.flax_nnx import is_head, linear_paths, substitute
from qlora_jax.memory_limits import host_limits
from qlora_jax.mixed import map_layers
from qlora_jax.models.llama import Llama
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.quantized import QuantizedTensor, dequantize
from qlora_jax.tree import join_path

# Up to so many rows at once the copy made for one row is used, and for more the packed weights.
_FEW_ROWS = 16
# Of the vocabulary in one product; few enough for the loop that XLA makes of it to be fast.
_PIECE = 3072
# What the copy may take of the memory that is free.
_SHARE = 0.5


class DenseCopy(nnx.Variable):
    """Weights that were decoded for speed; no part of the model's own state."""


class DenseLinear(nnx.Module):
    """A linear layer without adapter, with a dense copy of its kernel.

    Attributes:
        kernel: [*L, out, in] for one row, [*L, in, out] for more.
        packed: the layer itself, which takes many rows at once; None: the copy takes them too.
        bias: of the layer, or None.
        one_row: whether the copy was made for one row.
    """

    def __init__(self, linear: QLoRALinear, dtype: jnp.dtype, *, one_row: bool):
        """Decodes the kernel of a layer, one matrix at a time."""
        self.kernel = DenseCopy(_decode(linear, dtype, one_row))
        self.packed = linear if one_row else None
        self.bias = nnx.data(linear.bias)
        self.dtype, self.one_row = linear.dtype, one_row

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """Applies the layer."""
        if self.packed is not None and math.prod(x.shape[:-1]) > _FEW_ROWS:
            return self.packed(x)
        kernel = self.kernel.get_value()
        x = x.astype(self.dtype or kernel.dtype)
        y = x @ (kernel.T if self.one_row else kernel)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class DenseHead(nnx.Module):
    """The output head, cut into pieces of the vocabulary.

    Attributes:
        kernel: [pieces, size, D] for one row, [pieces, D, size] for more.
        vocab_size: tokens; the last piece may be longer than what is left of them.
        one_row: see `DenseLinear`.
    """

    def __init__(self, table: Float[Array, "V D"], *, one_row: bool):
        """Cuts the rows of a head (or of a tied embedding) into pieces."""
        self.vocab_size, self.one_row = table.shape[0], one_row
        pieces = -(-table.shape[0] // _PIECE)
        size = -(-table.shape[0] // pieces)
        table = jnp.pad(table, ((0, pieces * size - table.shape[0]), (0, 0)))
        table = table.reshape(pieces, size, -1)
        self.kernel = DenseCopy(table if one_row else jnp.swapaxes(table, 1, 2).copy())

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        kernel, rows = self.kernel.get_value(), hidden.reshape(-1, hidden.shape[-1])
        rows = rows.astype(kernel.dtype)

        def piece(_, kernel):
            kernel = kernel.T if self.one_row else kernel
            return None, jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)

        _, logits = jax.lax.scan(piece, None, kernel)
        logits = jnp.moveaxis(logits, 0, 1).reshape(rows.shape[0], -1)[:, : self.vocab_size]
        return logits.reshape(*hidden.shape[:-1], -1)


def dense_bytes(model: Llama) -> int:
    """What a dense copy takes."""
    config, linears = model.config, _linears(model)
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
    dtype = jnp.dtype(model.dtype)
    linears = _linears(model)
    copies = {}
    for path, node in nnx.iter_graph(model):
        linear = linears.get(join_path(path))
        if linear is not None and (one_row or not _is_dense(linear, dtype)):
            copies[id(node)] = DenseLinear(linear, dtype, one_row=one_row)
    table = _head_table(model)
    model = substitute(model, copies, {})
    if table is not None:
        model.lm_head = nnx.data(DenseHead(table.astype(dtype), one_row=one_row))
    return model


def _linears(model: Llama) -> dict[str, QLoRALinear]:
    """The linear layers by path, without head and adapters; plain ones as views."""
    paths = set(linear_paths(model))
    return {
        name: node if isinstance(node, QLoRALinear) else QLoRALinear.from_linear(node)
        for path, node in nnx.iter_graph(model)
        if (name := join_path(path)) in paths and not is_head(path, node)
    }


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
    linear: QLoRALinear, dtype: jnp.dtype, one_row: bool
) -> Float[Array, "*L rows columns"]:
    def dense(kernel: QuantizedTensor | Array) -> Array:
        if isinstance(kernel, QuantizedTensor):
            kernel = dequantize(kernel, dtype).T
        kernel = kernel.astype(dtype)
        return kernel.T if one_row else kernel

    decode = jax.jit(lambda kernel: map_layers(dense, linear.leading_shape, kernel))
    return decode(linear.matrix_kernel)
