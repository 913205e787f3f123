"""Optimizer steps that may be left out, decided inside the compiled program.

A gradient that is not a number would make every moment one, and no later step would mend it. Its
step has to be left out, but whether it is to be is known only on the device, after the backward
pass. So an optimizer here takes one more argument, a truth value that is computed with the
gradient:

    updates, state = tx.update(gradients, state, params, apply_if=finite)

Where it is false the state comes back with the bits that it had; the updates then mean nothing. It
is a selection, element by element, between what was read and what would be written: it adds nothing
to the memory that is read and written, and where the value is true it changes no bit. (`lax.cond`
would do, too, but its branches keep the compiler from updating donated arrays in place, and from
copying pages beside the update.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

ApplyIf = Bool[Array, ""] | bool


class Skippable(optax.GradientTransformationExtraArgs):
    """An optax transformation whose `update` takes `apply_if`."""

    __slots__ = ()


def select(apply_if: ApplyIf, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds, else `old`; no operation where it is known to hold.

    >>> select(jnp.bool_(False), {"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
    {'w': Array([0., 0.], dtype=float32)}
    """
    if apply_if is True:
        return new
    return jax.tree.map(lambda x, y: jnp.where(apply_if, x, y), new, old)


def skippable(inner: optax.GradientTransformation) -> Skippable:
    """The same optimizer, with steps that may be left out.

    State in the host's memory is left to the transformation that put it there (`paged`, also inside
    an `optax.chain`, which hands `apply_if` on): here it would be fetched once more.

    Args:
        inner: any optax transformation; one that is skippable is returned as it is.

    >>> tx = skippable(optax.adam(1e-3))
    >>> state = tx.init(jnp.ones(2))
    >>> _, after = tx.update(jnp.full(2, jnp.nan), state, apply_if=jnp.bool_(False))
    >>> all(map(bool, jax.tree.leaves(jax.tree.map(jnp.array_equal, after, state))))
    True
    """
    if isinstance(inner, Skippable):
        return inner
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        apply_if: ApplyIf = True,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        found, new = inner.update(updates, state, params, apply_if=apply_if, **extra)
        chosen = jax.tree.map(lambda x, y: x if _on_host(y) else select(apply_if, x, y), new, state)
        return found, chosen

    return Skippable(inner.init, update)


def _on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
