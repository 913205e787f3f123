"""Decoder layers on rows so long that a few arrays of [tokens, features] fill the memory.

A row of a million tokens of an 8B model is 8 GiB in bfloat16, and a layer that is differentiated as
a whole holds dozens of arrays of that size and larger. All of a layer but the attention treats one
token at a time, so it can be done for a chunk of tokens after the other; and attention treats one
key head at a time. Here are these two loops, with backward passes written by hand because of
what they must not hold:

    map_tokens       x, y... = f(x, ...)  chunk by chunk. Backward, a chunk of f is computed again,
                     and the gradient of x is written over the incoming one.
    attend_by_heads  softmax(q k) v, one key head with its query heads at a time. Backward, the
                     gradients are written over q, k and v.

At the peak of a layer's backward pass six arrays like x are left, none of them float32: x,
q, k and v (one and a half with four query heads a key head), the attention's output and its
gradient, and the gradient of x.

What it costs: the weights are decoded for every chunk. Flash attention is not computed again: its
output and the logsumexp of the scores are kept. Where there is none, the backward pass computes a
head again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from qlora_jax.models.attention import attend, implementation, score_options
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import rope_tables

Chunk = Callable[..., tuple[Array, ...]]


def layer_in_chunks(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    config: LlamaConfig,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " half"] | None,
    mask: Bool[Array, "#B 1 T T"] | None,
    window: int | Int[Array, ""] | None,
    chunk: int,
) -> Float[Array, "B T D"]:
    """A decoder layer of rows that are too long to be computed at once.

    Args:
        graphdef: of a `DecoderLayer`.
        state: of it.
        config: the model's shape.
        x: the layer's input.
        positions: of every token in its own sequence.
        frequencies: of the rotations, radians per position; None: nothing is rotated.
        mask: who sees whom; None: the causal (and windowed) mask of one sequence a row.
        window: where `mask` is None, how far back a token sees; an array where layers differ.
        chunk: tokens of a chunk.

    Returns:
        The layer's output. With dropout, other places are dropped than in the whole layer.
    """
    batch, length, _ = x.shape
    tokens = batch * length
    padding = -tokens % chunk

    def merge(state: PyTree, index: Array) -> Any:
        return nnx.merge(graphdef, fold_streams(state, index))

    def project(shared, index, x, positions):
        state, frequencies = shared
        layer, rope = merge(state, index), None
        if frequencies is not None:
            rope = rope_tables(positions[None], frequencies)
        q, k, v = layer.self_attn.project(layer.input_layernorm(x[None]), rope)
        return x, q[0], k[0], v[0]

    def finish(state, index, x, y):
        layer = merge(state, index)
        return (layer.finish(x[None], layer.self_attn.output(y[None]))[0],)

    # An array of the scan cannot be closed over below; it goes beside the mask.
    of_layer = window if isinstance(window, jax.Array) else None
    scores = score_options(config)

    def attend_head(q, k, v, seen):
        mask, of_layer = seen
        reach = window if of_layer is None else of_layer
        return attend(q, k, v, mask, reach, chunk, **scores)

    def flat(array: Array) -> Array:
        array = array.reshape(tokens, *array.shape[2:])
        return jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array

    def rows(array: Array) -> Array:
        return array[:tokens].reshape(batch, length, *array.shape[1:])

    shared = (state, frequencies)
    x, *qkv = map_tokens(project, chunk, shared, flat(x), flat(positions), keeps_x=True)
    kind = implementation(x.dtype, config.head_dim, length, length, scores["softcap"])
    stores = kind == "cudnn"
    y = attend_by_heads(attend_head, *map(rows, qkv), (mask, of_layer), stores=stores)
    (x,) = map_tokens(finish, chunk, state, x, flat(y))
    return rows(x)


def fold_streams(state: PyTree, index: Int[Array, ""]) -> PyTree:
    """Gives every random stream of a module's state a key of its own for a chunk.

    Without it, dropout would drop the same places of every chunk.

    >>> state = nnx.state(nnx.Rngs(dropout=0))
    >>> keys = [fold_streams(state, i).dropout.key.get_value() for i in (0, 1)]
    >>> bool((jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all())
    False
    """

    def fold(leaf: Any) -> Any:
        if isinstance(leaf, nnx.RngKey):
            return leaf.replace(jax.random.fold_in(leaf.get_value(), index))
        return leaf

    return jax.tree.map(fold, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def map_tokens(
    function: Chunk,
    chunk: int,
    state: PyTree,
    x: Float[Array, "N D"],
    *others: Array,
    keeps_x: bool = False,
) -> tuple[Array, ...]:
    """`function` of all tokens, a chunk at a time.

    Args:
        function: `(state, index, x, *others) -> (x, *ys)` of a chunk, `index` being its number. Its
            first result has the shape and dtype of its `x`. It may close over nothing that is
            traced.
        chunk: tokens of a chunk; divides N.
        state: parameters and whatever else all chunks share. Gradients of what is differentiated of
            it are summed over the chunks in float32, in which `function` then gets these leaves.
        x: the residual stream.
        *others: [N, ...] each.
        keeps_x: whether `function` gives back its `x` as it is; then it is not copied.

    Returns:
        `(x, *ys)`, [N, ...] each.

    >>> double = lambda state, index, x: (state * x, x + index)
    >>> map_tokens(double, 2, jnp.float32(2), jnp.ones((4, 1)))[1].ravel().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    count = x.shape[0] // chunk
    shared, shared_tree = jax.tree.flatten(state)

    def cut(array: Array) -> Array:
        return array.reshape(count, chunk, *array.shape[1:])

    def join(array: Array) -> Array:
        return array.reshape(-1, *array.shape[2:])

    def call(index: Array, shared: list[Array], x: Array, others: list[Array]) -> list[Array]:
        return list(function(shared_tree.unflatten(shared), index, x, *others))

    @jax.custom_vjp
    def run(shared: list[Array], x: Array, others: list[Array]) -> list[Array]:
        def body(_, scanned):
            index, x, others = scanned
            x, *ys = call(index, shared, x, others)
            return None, [None if keeps_x else x, *ys]

        _, (new_x, *ys) = jax.lax.scan(body, None, (np.arange(count), cut(x), _map(cut, others)))
        return [x if keeps_x else join(new_x), *_map(join, ys)]

    def forward(shared, x, others):
        # What is not differentiated is kept apart: its gradients would only take memory.
        values = _map(lambda leaf: leaf.value, shared), x.value, _map(lambda o: o.value, others)
        differentiated = _map(lambda leaf: leaf.perturbed, (*shared, *others))
        return run(*values), (values, _Static(tuple(differentiated)))

    def backward(residuals, cotangents):
        (shared, x, others), differentiated = residuals
        of_shared = differentiated.value[: len(shared)]
        of_others = differentiated.value[len(shared) :]
        dx, *dys = _map(_instantiate, cotangents)
        # Gradients are summed in float32, and a parameter in float32 has gradients that are.
        trained = [leaf.astype(jnp.float32) for leaf in _select(of_shared, shared)]

        def body(carry, scanned):
            dx, d_shared = carry
            index, x, others, dys = scanned

            def chunk_of(trained, x, some_others):
                all_shared = _merge(of_shared, trained, shared)
                return call(index, all_shared, x, _merge(of_others, some_others, others))

            _, pull = jax.vjp(chunk_of, trained, x, _select(of_others, others))
            d_chunk, dx_chunk, d_others = pull([dx[index], *dys])
            return (dx.at[index].set(dx_chunk), _map(jnp.add, d_shared, d_chunk)), d_others

        zeros = _map(jnp.zeros_like, trained)
        xs = np.arange(count), cut(x), _map(cut, others), _map(cut, dys)
        (dx, d_shared), d_others = jax.lax.scan(body, (cut(dx), zeros), xs)
        d_shared = _map(lambda d, leaf: d.astype(leaf.dtype), d_shared, _select(of_shared, shared))
        return (
            _merge(of_shared, d_shared, [None] * len(shared)),
            join(dx),
            _merge(of_others, _map(join, d_others), [None] * len(others)),
        )

    run.defvjp(forward, backward, symbolic_zeros=True)
    return tuple(run(shared, x, list(others)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Residuals that are no arrays."""

    value: tuple[bool, ...]


def _map(function: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
    return [function(*items) for items in zip(*lists, strict=True)]


def _select(chosen: Sequence[bool], items: Sequence[Any]) -> list[Any]:
    return [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]


def _merge(chosen: Sequence[bool], new: Sequence[Any], items: Sequence[Any]) -> list[Any]:
    """The inverse of `_select`: `items`, with the chosen ones from `new`."""
    replacements = iter(new)
    pairs = zip(items, chosen, strict=True)
    return [next(replacements) if is_chosen else item for item, is_chosen in pairs]


def _instantiate(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def attend_by_heads(
    attend: Callable[..., Float[Array, "B T G H"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: PyTree,
    *,
    stores: bool,
) -> Float[Array, "B T N H"]:
    """`attend(q, k, v, mask)`, one key head with its query heads after the other.

    Args:
        attend: attention of one key head.
        q: queries.
        k: keys.
        v: values.
        mask: passed on: an array, None, or several of these.
        stores: whether to keep what the backward pass of `attend` stores beside its inputs and
            output. Flash attention stores a number a query, others the scores: these are better
            computed again.

    Returns:
        The output of all heads.

    >>> first = lambda q, k, v, mask: q + v
    >>> q, k = jnp.ones((1, 3, 4, 2)), jnp.ones((1, 3, 2, 2))
    >>> attend_by_heads(first, q, k, k, None, stores=False).shape
    (1, 3, 4, 2)
    """
    shape, kv_heads = q.shape, k.shape[2]
    indices = np.arange(kv_heads)

    def head(array: Array, index: Array) -> Array:
        heads = jax.lax.dynamic_index_in_dim(array, index, axis=2)
        return heads[:, :, 0] if heads.ndim == 5 else heads

    def put(array: Array, value: Array, index: Array) -> Array:
        value = value.reshape(*array.shape[:2], 1, *array.shape[3:])
        return jax.lax.dynamic_update_index_in_dim(array, value, index, axis=2)

    def one(mask: PyTree, q: Array, k: Array, v: Array) -> Array:
        return attend(q, k, v, mask)

    @jax.custom_vjp
    def run(q, k, v, mask):
        def body(y, index):
            return put(y, one(mask, *[head(x, index) for x in (q, k, v)]), index), None

        return jax.lax.scan(body, jnp.zeros_like(q), indices)[0]

    def forward(q, k, v, mask):
        if not stores:
            return run(q, k, v, mask), (q, k, v, mask, None, None)

        def body(y, index):
            inputs = [head(x, index) for x in (q, k, v)]
            y_head, pull = jax.vjp(functools.partial(one, mask), *inputs)
            stored = [x for x in pull.opaque_residuals if x is not y_head]
            return put(y, y_head, index), stored

        y, stored = jax.lax.scan(body, jnp.zeros_like(q), indices)
        return y, (q, k, v, mask, y, stored)

    def backward(residuals, dy):
        q, k, v, mask, y, stored = residuals

        def body(qkv, scanned):
            index, stored = scanned
            inputs = [head(x, index) for x in qkv]
            y_head, pull = jax.vjp(functools.partial(one, mask), *inputs)
            if stores:  # then nothing needs the forward pass of the line above: it is dropped
                rest = iter(stored)
                old = [head(y, index) if x is y_head else next(rest) for x in pull.opaque_residuals]
                pull = pull.replace(opaque_residuals=old)
            gradients = pull(head(dy, index))
            return [put(x, g, index) for x, g in zip(qkv, gradients, strict=True)], None

        return (*jax.lax.scan(body, [q, k, v], (indices, stored))[0], None)

    run.defvjp(forward, backward)
    q = q.reshape(*shape[:2], kv_heads, -1, shape[-1])
    return run(q, k, v, mask).reshape(shape)
