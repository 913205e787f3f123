"""An optimizer whose state may lie in the host's memory and streams through the device.

QLoRA (arXiv 2305.14314, section 3) pages with CUDA unified memory: the driver moves a page when it
is touched. XLA cannot move anything in the middle of a step, because its memory plan is made once.
So here the state is cut into *pages* (a leaf, or some layers of one), each page has its place on
the device or in the host's pinned memory, and the update walks over them:

    for page i:   fetch state i   ->   update slice i of the parameters   ->   send state i back

Left to itself, XLA would fetch everything first and hold it all. So the fetch of page i depends on
the update of page i - 2: at most three pages are on the device at once, one coming, one being
updated and one going, and the copies run beside the update.

The inner transformation is not rewritten. It is traced once, over the tree of pages, and what it
does to a page is found in its program by following what each result depends on; that is then run
in the order of the pages. So scalars (step counters, bias corrections) are computed once for all
pages, as they are for all leaves without paging, and XLA simplifies both programs alike: the
updates are equal to the bit. An inner transformation that mixes pages, such as clipping by the
global norm, is refused and goes outside: `optax.chain(clip, paged(adamw))`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from qlora_jax.errors import ConfigError
from qlora_jax.optim.program import Program, Run
from qlora_jax.optim.skipping import ApplyIf, Skippable, skippable
from qlora_jax.placement import leaf_bytes, tree_bytes

# Leaves with fewer elements stay on the device: there is nothing to gain by moving them.
LEAST_ELEMENTS = 100_000
# State in a page. Three are on the device at once, each with room for its old and its new state;
# smaller ones leave the copies nothing to hide behind.
PAGE_BYTES = 16 << 20


def paged(
    inner: optax.GradientTransformation,
    device_budget_bytes: int | None = None,
    *,
    page_bytes: int = PAGE_BYTES,
) -> Skippable:
    """The same optimizer with as much of its state on the device as the budget allows.

    Updates are equal to the inner transformation's to the bit, wherever the state lies. The state
    is the inner one's over the tree of pages: every leaf of the parameters that is cut is a tuple
    of its pieces. It is cut in the same way whatever the budget, so a checkpoint fits every budget.

    Args:
        inner: treats every leaf alone, and every row along a leaf's first axis too.
        device_budget_bytes: of state on the device; what exceeds it is kept in the host's pinned
            memory, the largest leaves first, none of fewer than `LEAST_ELEMENTS` elements. None:
            everything is on the device.
        page_bytes: about how much state is moved at a time.

    Returns:
        A transformation to call under `jax.jit`. Its state goes in and out of the jitted function
        with the memory kinds that `init` gave it. A jitted function to which the state is donated
        takes the parameters too and returns both in that order, as a training step does: JAX lets
        the first result of a shape have the first donated array of it, and does not ask in which
        memory that one lies.

    Raises:
        ConfigError: `inner` looks at more than one leaf, or more than one row, at a time.

    >>> tx = paged(optax.adamw(1e-3), device_budget_bytes=0)
    >>> state = tx.init({"lora_a": jnp.ones((4, 50_000)), "lora_b": jnp.ones((2, 3))})
    >>> [x.sharding.memory_kind for x in jax.tree.leaves(state[0].mu)]
    ['pinned_host', 'device']
    """

    def cut(params: PyTree) -> _Pages:
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(params))
        key = shapes, jax.tree.structure(params)
        if key not in known:
            known[key] = _Pages(inner, params, page_bytes)
        return known[key]

    inner = skippable(inner)
    known: dict[Any, _Pages] = {}

    def init(params: PyTree) -> optax.OptState:
        pages = cut(params)
        host = pages.on_host(device_budget_bytes)
        weights = jax.tree.leaves(params)
        program = Program(inner.init, pages.split(_abstract(params)))
        leaves = []
        for i in range(len(program.outputs)):
            # Each leaf by itself: what goes to the host is not on the device at one time.
            run = Run(program)
            for page, piece in enumerate(pages.pieces):
                run.give(page, functools.partial(piece.of, weights))
            leaf = jnp.asarray(run.value(i))
            if i in host:
                leaf = jax.block_until_ready(jax.device_put(leaf, jax.memory.Space.Host))
            leaves.append(leaf)
        return program.out_tree.unflatten(leaves)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        apply_if: ApplyIf = True,
    ) -> tuple[PyTree, optax.OptState]:
        pages = cut(updates)
        host = pages.on_host(device_budget_bytes)
        run = Run(pages.program(inner, updates, state, params, apply_if))
        gradients, treedef = jax.tree.flatten(updates)
        weights = jax.tree.leaves(params)
        leaves, state_treedef = jax.tree.flatten(state)
        first_state = len(pages.pieces)
        first_weight = first_state + len(leaves)
        for i in pages.shared:
            run.give(first_state + i, lambda leaf=leaves[i]: leaf)
        if apply_if is not True:
            run.give(-1, lambda: apply_if)
        # Clipped and so on before the first page, not anew in every page.
        gradients = [jax.lax.optimization_barrier(x) for x in gradients]
        streamed: list[Array] = []
        for page, piece in enumerate(pages.pieces):
            old = {i: leaves[i] for i in pages.state_of[page]}
            moved = {i: x for i, x in old.items() if i in host}
            if moved:
                if len(streamed) >= 2:
                    moved, _ = jax.lax.optimization_barrier((moved, streamed[-2]))
                old |= jax.device_put(moved, jax.memory.Space.Device)
            for i, leaf in old.items():
                run.give(first_state + i, lambda leaf=leaf: leaf)
            run.give(page, functools.partial(piece.of, gradients))
            if weights:
                run.give(first_weight + page, functools.partial(piece.of, weights))
            part = run.value(page)
            new = {i: run.value(first_state + i) for i in old}
            if moved:
                streamed.append(part)
                new |= jax.device_put({i: new[i] for i in moved}, jax.memory.Space.Host)
            for i, leaf in new.items():
                leaves[i] = leaf
            # Into the gradient's own memory: this piece of it was read for the last time.
            gradients[piece.leaf] = piece.put(gradients[piece.leaf], part)
        for i in pages.shared:
            leaves[i] = run.value(first_state + i)
        return treedef.unflatten(gradients), state_treedef.unflatten(leaves)

    return Skippable(init, update)


def check_paging(make: Callable[[int | None], optax.GradientTransformation]) -> bool:
    """Whether this device computes the same bits from state in the host's memory as from its own.

    Three steps over four pages, once at start-up: a compiler that gets host memory wrong gives
    wrong numbers and no error.

    Args:
        make: the optimizer, given the bytes of state that it may have on the device.

    >>> check_paging(lambda budget: paged(optax.adamw(1e-3), budget))
    True
    """
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((8, 400_000), np.float32) for name in "ab"}

    def final(budget: int | None) -> PyTree:
        tx = make(budget)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(weights, state):
            updates, state = tx.update(jax.tree.map(jnp.sin, weights), state, weights)
            updates = jax.lax.optimization_barrier(updates)
            return optax.apply_updates(weights, updates), state

        weights = jax.device_put(params)
        state = tx.init(weights)
        for _ in range(3):
            weights, state = step(weights, state)
        return jax.device_get((weights, state))

    same = jax.tree.map(np.array_equal, final(None), final(0))
    return all(jax.tree.leaves(same))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A leaf of the parameters, or some of its rows."""

    leaf: int
    start: int
    stop: int
    whole: bool

    def of(self, leaves: Sequence[Any]) -> Any:
        leaf = leaves[self.leaf]
        if self.whole:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((self.stop - self.start, *leaf.shape[1:]), leaf.dtype)
        return leaf[self.start : self.stop]

    def put(self, leaf: Array, part: Array) -> Array:
        if self.whole:
            return part
        # In place. Without the barrier XLA would make the leaf of its pieces at the end, and keep
        # all of them beside the gradients until then.
        leaf = leaf.at[self.start : self.stop].set(part)
        return jax.lax.optimization_barrier(leaf)


class _Pages:
    """How a tree of parameters and its optimizer state are cut.

    Attributes:
        pieces: of the parameters' leaves, in their order; one a page.
        state_of: indices of the state's leaves that belong to a page, by page.
        shared: indices of the state's leaves that all pages share.
    """

    def __init__(self, inner: optax.GradientTransformation, params: PyTree, page_bytes: int):
        params = _abstract(params)
        leaves = jax.tree.leaves(params)
        state = jax.eval_shape(inner.init, params)
        per_element = tree_bytes(state) / max(1, sum(x.size for x in leaves))
        pieces = []
        for index, leaf in enumerate(leaves):
            rows = leaf.shape[0] if leaf.ndim > 1 else 1
            count = min(rows, max(1, round(leaf.size * per_element / page_bytes)))
            if len(leaves) == 1:
                # XLA simplifies a scalar that one array uses in another way than one that several
                # use: cut in two, the only leaf's updates would differ in the last bit.
                count = 1
            edges = [rows * i // count for i in range(count + 1)]
            pairs = zip(edges, edges[1:], strict=False)
            pieces += [_Piece(index, *edge, whole=count == 1) for edge in pairs]
        self.pieces = tuple(pieces)
        if any(not piece.whole for piece in pieces):
            with jax.ensure_compile_time_eval():  # also under jit
                _check_rows(inner, params)
        self._elements = tuple(leaves[piece.leaf].size for piece in pieces)
        split = self.split(params)
        state = jax.eval_shape(inner.init, split)
        self._sizes = tuple(map(leaf_bytes, jax.tree.leaves(state)))
        owners = _owners(Program(inner.update, split, state, split), len(pieces), len(self._sizes))
        self.state_of = tuple(
            tuple(i for i, owner in enumerate(owners) if owner == page)
            for page in range(len(pieces))
        )
        self.shared = tuple(i for i, owner in enumerate(owners) if owner is None)

    def split(self, tree: PyTree) -> PyTree:
        """The tree with every leaf that is cut replaced by the tuple of its pieces."""
        leaves, treedef = jax.tree.flatten(tree)
        parts: list[Any] = [() for _ in leaves]
        for piece in self.pieces:
            part = piece.of(leaves)
            parts[piece.leaf] = part if piece.whole else (*parts[piece.leaf], part)
        return treedef.unflatten(parts)

    def on_host(self, device_budget_bytes: int | None) -> frozenset[int]:
        """Indices of the state's leaves that do not lie on the device."""
        if device_budget_bytes is None:
            return frozenset()
        excess = sum(self._sizes) - device_budget_bytes
        found: list[int] = []
        for page in sorted(range(len(self.pieces)), key=lambda i: (-self._elements[i], i)):
            if excess <= 0 or self._elements[page] < LEAST_ELEMENTS:
                break
            found += self.state_of[page]
            excess -= sum(self._sizes[i] for i in self.state_of[page])
        return frozenset(found)

    def program(
        self,
        inner: Skippable,
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None,
        apply_if: ApplyIf,
    ) -> Program:
        """The inner transformation over the pages; its last argument, if any, is `apply_if`."""
        split = self.split(_abstract(updates))
        weights = None if params is None else self.split(_abstract(params))
        if apply_if is True:
            return Program(inner.update, split, _abstract(state), weights)

        def update(updates, state, params, apply_if):
            return inner.update(updates, state, params, apply_if=apply_if)

        return Program(update, split, _abstract(state), weights, _abstract(apply_if))


def _abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone: where an array lies does not matter to what is computed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _owners(update: Program, pages: int, leaves: int) -> list[int | None]:
    """The page that each leaf of the state belongs to; None: it belongs to all.

    Args:
        update: of an optimizer, over a tree of pages.
        pages: how many the gradients have.
        leaves: how many the state has.

    Raises:
        ConfigError: a result depends on more than one page.
    """
    given = {page: frozenset([page]) for page in range(pages)}
    given |= {pages + leaves + page: frozenset([page]) for page in range(pages)}
    owners = update.reach(given)[pages:]
    # A page's update may use the state that the page changes, and no other's.
    found = update.reach(given | {pages + i: owner for i, owner in enumerate(owners)})
    alone = all(on <= {page} for page, on in enumerate(found[:pages]))
    if not alone or any(len(on) > 1 for on in found[pages:]):
        raise ConfigError(_MIXES)
    return [min(owner, default=None) for owner in owners]


_MIXES = (
    "this optimizer looks at more than one leaf, or more than one row of a leaf, at a time, and "
    "cannot be paged; put clipping and other global steps outside, as in "
    "optax.chain(optax.clip_by_global_norm(0.3), paged(optax.adamw(1e-4)))"
)


def _times_rows(leaf: Array, factors: np.ndarray) -> Array:
    """Rows of a matrix times a factor each."""
    if leaf.ndim < 2:
        return leaf
    return (leaf * factors.reshape(-1, *(1,) * (leaf.ndim - 1))).astype(leaf.dtype)


def _check_rows(inner: optax.GradientTransformation, params: PyTree) -> None:
    """Compares three steps over small leaves with three steps over each of their rows.

    Args:
        inner: an optimizer.
        params: shapes; the same tree with small leaves is tried.

    Raises:
        ConfigError: they differ, by more than rounding.
    """
    rng = np.random.default_rng(0)
    spread = np.float32([[1.0, 1e-3], [1e-2, 30.0], [1e2, 1.0]])  # by step and row

    def small(leaf: jax.ShapeDtypeStruct) -> Array:
        shape = (2, *(min(3, size) for size in leaf.shape[1:])) if leaf.ndim > 1 else leaf.shape
        return jnp.asarray(rng.standard_normal(shape), leaf.dtype)

    def rows(tree: PyTree, *index: int) -> PyTree:
        chosen = slice(*index)
        return jax.tree.map(lambda x: x[chosen] if x.ndim > 1 else x, tree)

    @jax.jit
    def run(weights, gradients):
        state, found = inner.init(weights), []
        for gradient in gradients:
            update, state = inner.update(gradient, state, weights)
            found.append(update)
        return found

    weights = jax.tree.map(small, params)
    gradients = [jax.tree.map(lambda x, s=s: _times_rows(small(x), s), params) for s in spread]
    whole = run(weights, gradients)
    for index in ((0, 1), (1, 2)):
        alone = run(rows(weights, *index), rows(gradients, *index))
        pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(rows(whole, *index)), strict=True)
        if not all(np.allclose(*map(np.float32, pair), rtol=1e-2, atol=1e-6) for pair in pairs):
            raise ConfigError(_MIXES)
