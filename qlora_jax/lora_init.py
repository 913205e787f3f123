"""The adapters that training begins with, for one weight or for a tree of them.

A starts uniform in +-1/sqrt(in), PEFT's ``kaiming_uniform(a=sqrt(5))``, and B at zero, so an
adapted model first says exactly what its base says.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from qlora_jax.dora import init_magnitude
from qlora_jax.errors import ConfigError
from qlora_jax.lora import Adapter, is_quantized, lora_scaling, matrix_shape
from qlora_jax.tree import flatten_paths, join_path, key_parts, matches


def init_adapter(
    key: Key[Array, ""],
    in_features: int,
    out_features: int,
    *,
    rank: int,
    leading_shape: tuple[int, ...] = (),
    dtype: DTypeLike = jnp.float32,
) -> Adapter:
    """A new adapter for one weight: A uniform in +-1/sqrt(in_features), B zero.

    Args:
        key: PRNG key.
        in_features: size of the layer's input.
        out_features: size of its output.
        rank: r, at least 1.
        leading_shape: axes of stacked layers, put before both matrices.
        dtype: of both.

    Returns:
        ``{"lora_a": [*L, in, r], "lora_b": [*L, r, out]}``.

    Raises:
        ConfigError: ``rank`` is not a positive whole number.

    Example:
        >>> adapter = init_adapter(jax.random.key(0), 8, 3, rank=2)
        >>> jax.tree.map(jnp.shape, adapter)
        {'lora_a': (8, 2), 'lora_b': (2, 3)}
    """
    lora_scaling(rank, 1.0)  # refuses a rank that is none
    bound = 1.0 / math.sqrt(in_features)
    shape_a = (*leading_shape, in_features, rank)
    # Drawn in float32 so that the same key gives the same adapter, rounded, in every dtype.
    a = jax.random.uniform(key, shape_a, jnp.float32, -bound, bound)
    b = jnp.zeros((*leading_shape, rank, out_features), dtype)
    return {"lora_a": a.astype(dtype), "lora_b": b}


def init_lora(
    key: Key[Array, ""],
    params: Any,
    *,
    rank: int,
    where: str | None = None,
    dtype: DTypeLike = jnp.float32,
    use_dora: bool = False,
) -> dict[Any, Any]:
    """Adapters for the weights of a parameter tree: the only trainable pytree.

    Args:
        key: PRNG key; each weight gets its own.
        params: pytree whose leaves are arrays or ``QuantizedTensor``.
        rank: r, at least 1.
        where: regular expression for whole weight paths ("layers/q_proj/kernel"). None: every
            ``QuantizedTensor``. With it, dense Flax kernels [*L, in, out] are adapted as well.
        dtype: of the adapters.
        use_dora: give each adapter the magnitudes of DoRA as well (``qlora_jax.dora``).

    Returns:
        Nested dict with ``{"lora_a": [*L, in, r], "lora_b": [*L, r, out]}`` at the position of each
        weight's parent, and with DoRA ``"lora_magnitude": [*L, out]`` beside them. Under
        ``jax.eval_shape`` it gives the shapes.

    Raises:
        ConfigError: nothing matches, a match is no matrix, or two matches share a parent.

    Example:
        >>> params = {"q_proj": {"kernel": jnp.ones((8, 4))}, "norm": {"scale": jnp.ones(8)}}
        >>> lora = init_lora(jax.random.key(0), params, rank=2, where=".*_proj/kernel")
        >>> jax.tree.map(jnp.shape, lora)
        {'q_proj': {'lora_a': (8, 2), 'lora_b': (2, 4)}}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    chosen = []
    for key_path, leaf in leaves:
        parts = key_parts(key_path)
        if is_quantized(leaf) if where is None else matches(where, join_path(parts)):
            chosen.append((parts, leaf))
    if not chosen:
        raise ConfigError(_nothing_to_adapt(params, where))
    lora: dict[Any, Any] = {}
    for index, (parts, leaf) in enumerate(chosen):
        in_features, out_features, leading_shape = matrix_shape(leaf, join_path(parts))
        position = lora
        for part in parts[:-1]:
            position = position.setdefault(part, {})
        if "lora_a" in position:
            raise ConfigError(
                f"where={where!r} matches two weights of the parent {join_path(parts[:-1])!r}; an "
                "adapter lies at its weight's parent, so expected one. Narrow the expression."
            )
        adapter = init_adapter(
            jax.random.fold_in(key, index),
            in_features,
            out_features,
            rank=rank,
            leading_shape=leading_shape,
            dtype=dtype,
        )
        if use_dora:  # B is zero, so the scaling has no say yet
            adapter["lora_magnitude"] = init_magnitude(leaf, *adapter.values(), 0.0, dtype)
        position |= adapter
    return lora


def _nothing_to_adapt(params: Any, where: str | None) -> str:
    leaves = flatten_paths(params, is_leaf=is_quantized)
    matrices = [path for path, leaf in leaves.items() if is_quantized(leaf) or leaf.ndim >= 2]
    if where is None:
        return (
            "the parameters hold no QuantizedTensor; quantize them first (quantize_params), or "
            f"give where= for dense kernels. Matrices here: {', '.join(matrices) or 'none'}."
        )
    return (
        f"where={where!r} matches no weight; expected a regular expression for a whole path "
        f"(re.fullmatch). Matrices here: {', '.join(matrices) or 'none'}."
    )
