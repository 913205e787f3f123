"""A projection whose layers are not all in one format: some in 4 bits, some dense.

Checkpoints leave the layers that suffer most from 4 bits in 16 ("dynamic" ones of bitsandbytes),
or give them smaller blocks. But layers are scanned, and `jax.lax.scan` takes the same slice of
every array in every layer. So here is one stack for each format, and for each layer where it is:

    layer       0      1      2      3      4
    format      nf4    bf16   nf4    nf4    bf16
    parts[0]    0             1      2               QuantizedTensor [3, ...]
    parts[1]           0                    1        dense [2, in, out]

Nothing is stored twice and nothing is padded. The parts go into the scanned function whole, as what
all layers share (`qlora_jax.models.unscanned`), together with the layer's number; the product takes
its slice out of its part. Which part that is, the device decides (`jax.lax.switch`): a program has
one branch a format, not one a layer.

The backward pass keeps no slice: each product is under `jax.checkpoint`, so what it stores are the
parts, which are there anyway. Otherwise the slices of all layers would be stored, dense ones also
for the layers that are in 4 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qlora_jax.quantized import QuantizedTensor, dequantize, matmul
from qlora_jax.tree import map_leading

Part = QuantizedTensor | Float[Array, "n K N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedStack:
    """The kernels of stacked layers, in one stack for each format; or one of these layers.

    Layer `places[p][i]` is entry i of `parts[p]`. Parts are in the order of their first layers.

    Attributes:
        parts: each a `QuantizedTensor` [n, ...] or a dense Flax kernel [n, in, out].
        layer: int32 scalar: this is one layer; None: it is the stack.
        places: numbers of the layers that each part holds, ascending; static.

    Example:
        >>> stack = MixedStack((jnp.zeros((1, 4, 2)), jnp.ones((2, 4, 2))), None, ((1,), (0, 2)))
        >>> stack.leading_shape, stack.shape, stack.find(2)
        ((3,), (2, 4), (1, 1))
        >>> multiply_mixed(jnp.ones((1, 4)), stack.at(jnp.int32(2))).tolist()
        [[4.0, 4.0]]
    """

    parts: tuple[Part, ...]
    layer: Int[Array, ""] | None
    places: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """`(L,)`, for one layer `()`."""
        return (sum(map(len, self.places)),) if self.layer is None else ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of a layer, as of a `QuantizedTensor`."""
        part = self.parts[0]
        return part.shape if isinstance(part, QuantizedTensor) else part.shape[:0:-1]

    @property
    def dtype(self) -> Any:
        """Of the dense parts, and of the others before they were quantized."""
        return self.parts[0].dtype

    def at(self, layer: Int[Array, ""]) -> MixedStack:
        """One layer; its number may be traced."""
        return dataclasses.replace(self, layer=layer)

    def find(self, layer: int) -> tuple[int, int]:
        """In which part a layer is, and at which place in it."""
        part = next(number for number, layers in enumerate(self.places) if layer in layers)
        return part, self.places[part].index(layer)

    def with_part(self, number: int, part: Part) -> MixedStack:
        """The same with another part."""
        parts = (*self.parts[:number], part, *self.parts[number + 1 :])
        return dataclasses.replace(self, parts=parts)


def one_format_each(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by path, with the parts of a `MixedStack` under names of their own.

    Example:
        >>> stack = MixedStack((jnp.zeros((1, 4, 2)), jnp.ones((2, 4, 2))), None, ((1,), (0, 2)))
        >>> [name for name, _ in one_format_each({"norm": jnp.ones(2), "up/kernel": stack})]
        ['norm', 'up/kernel[1]', 'up/kernel[0,2]']
    """
    for path, value in values.items():
        if isinstance(value, MixedStack):
            names = [part_name(path, layers) for layers in value.places]
            yield from zip(names, value.parts, strict=True)
        else:
            yield path, value


def part_name(path: str, layers: Iterable[int]) -> str:
    """The name of a part, which says whose layers it holds."""
    return f"{path}[{','.join(map(str, layers))}]"


def take_layer(stack: Any, layer: int) -> Any:
    """One layer of stacked arrays, of a `QuantizedTensor` or of a `MixedStack`, in its own format.

    Example:
        >>> take_layer(MixedStack((jnp.zeros((1, 4, 2)),), None, ((0,),)), 0).shape
        (4, 2)
    """
    if isinstance(stack, MixedStack):
        part, layer = stack.find(layer)
        stack = stack.parts[part]
    return jax.tree.map(lambda leaf: leaf[layer], stack)


def multiply_mixed(
    x: Float[Array, "*B K"], kernel: MixedStack, precision: Any = None
) -> Float[Array, "*B N"]:
    """`x @ W.T` with one layer's weight, in x's dtype; the gradient goes to `x`.

    Args:
        x: input.
        kernel: of one layer.
        precision: of a product with a dense part.
    """

    def product(part: Part, x: Array) -> Array:
        if isinstance(part, QuantizedTensor):
            return matmul(x, part)
        return jnp.matmul(x, part.astype(x.dtype), precision=precision)

    return _switch(product, kernel, x)


def dense_layer(kernel: MixedStack, dtype: DTypeLike) -> Float[Array, "N K"]:
    """One layer's weight (out, in) in `dtype`."""

    def dense(part: Part) -> Array:
        if isinstance(part, QuantizedTensor):
            return dequantize(part, dtype)
        return part.T.astype(dtype)

    return _switch(dense, kernel)


def dense_stack(kernel: QuantizedTensor | MixedStack) -> Float[Array, "*L K N"]:
    """All layers as one dense Flax kernel, in the dtype that they had before.

    Example:
        >>> stack = MixedStack((jnp.zeros((1, 4, 2)), jnp.ones((2, 4, 2))), None, ((1,), (0, 2)))
        >>> dense_stack(stack)[:, 0, 0].tolist()
        [1.0, 0.0, 1.0]
    """

    def dense(part: Part) -> Array:
        return dequantize(part, part.dtype).T if isinstance(part, QuantizedTensor) else part

    return map_layers(dense, kernel.leading_shape, kernel)


def _switch(function: Callable[..., Array], kernel: MixedStack, *args: Array) -> Array:
    """`function` of the part's slice that is the layer, and `args`."""
    numbers, entries = np.zeros((2, sum(map(len, kernel.places))), np.int32)
    for number, layers in enumerate(kernel.places):
        numbers[list(layers)], entries[list(layers)] = number, np.arange(len(layers))

    def branch(number: int, parts: tuple[Part, ...], entry: Array, *args: Array) -> Array:
        def take(leaf: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(leaf, entry, keepdims=False)

        return function(jax.tree.map(take, parts[number]), *args)

    branches = [functools.partial(branch, number) for number in range(len(kernel.parts))]

    # Inside a scan the compiler cannot merge recomputation and forward pass anyway.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(number: Array, *operands: Any) -> Array:
        return jax.lax.switch(number, branches, *operands)

    layer = kernel.layer
    return run(jnp.asarray(numbers)[layer], kernel.parts, jnp.asarray(entries)[layer], *args)


def map_layers(
    function: Callable[..., Any], leading_shape: tuple[int, ...], kernel: Any, *args: Any
) -> Any:
    """`qlora_jax.tree.map_leading` for kernels of any kind; results must not differ in shape.

    Args:
        function: of a layer's kernel, a `QuantizedTensor` or an array, and of `args`.
        leading_shape: the axes [*L].
        kernel: a `QuantizedTensor`, an array or a `MixedStack`.
        *args: pytrees of arrays [*L, ...].

    Example:
        >>> stack = MixedStack((jnp.zeros((1, 4, 2)), jnp.ones((2, 4, 2))), None, ((1,), (0, 2)))
        >>> map_layers(lambda kernel, bias: kernel.sum() + bias, (3,), stack, jnp.arange(3.0))
        Array([ 8.,  1., 10.], dtype=float32)
    """
    if not isinstance(kernel, MixedStack):
        return map_leading(function, leading_shape, kernel, *args)
    return join_parts(kernel, map_parts(function, kernel, *args))


def map_parts(function: Callable[..., Any], kernel: MixedStack, *args: Any) -> list[Any]:
    """The same for each part on its own: results may differ from part to part."""
    results = []
    for part, layers in zip(kernel.parts, kernel.places, strict=True):
        of_part = jax.tree.map(functools.partial(jnp.take, indices=np.array(layers), axis=0), args)
        results.append(map_leading(function, (len(layers),), part, *of_part))
    return results


def join_parts(kernel: MixedStack, results: Sequence[Any]) -> Any:
    """Puts results of `map_parts` into the order of the layers, [L, ...]."""
    order = np.argsort(np.concatenate(kernel.places))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *results)
