"""LoRA as pure functions over pytrees (arXiv 2106.09685; scaling of rsLoRA, arXiv 2312.03732).

A frozen weight W [out, in] gets two small matrices, A [in, r] and B [r, out], and a layer computes

    y = x @ W.T + (dropout(x) @ A) * s @ B,     s = alpha / r, or with rsLoRA alpha / sqrt(r)

B starts at zero, so an adapted model first says exactly what its base says
(``qlora_jax.lora_init``).

The adapter of a weight is the dict ``{"lora_a": A, "lora_b": B}``, with a third entry
``"lora_magnitude"`` for DoRA (``qlora_jax.dora``), and lies in the adapter tree where the weight's
*parent* lies in the parameters: ``lora["q_proj"]`` belongs to
``params["q_proj"]["kernel"]``. Stacked layers carry the same leading axes [*L, ...] on all arrays;
``jax.lax.scan`` or ``jax.vmap`` takes them off before ``lora_matmul`` sees them.

Adapters are kept in float32 by default. The products run in ``x``'s dtype, and the scaling is
applied to the [tokens, r] intermediate, which is smaller than the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qlora_jax.dora import adapted_norm, scale_outputs
from qlora_jax.errors import ConfigError
from qlora_jax.mixed import MixedStack, join_parts, map_layers, map_parts
from qlora_jax.quantized import QuantizedTensor, dequantize, matmul, quantize
from qlora_jax.tree import flatten_paths, join_path, key_parts

Adapter = dict[str, Array]


class MergeError(NamedTuple):
    """What merging an adapter into one weight cost, against the exact ``W + s * A @ B``.

    Attributes:
        max_abs: largest absolute difference, float32 [*L] (a scalar for an unstacked weight).
        relative_frobenius: Frobenius norm of the difference over that of the exact weight, [*L].
    """

    max_abs: Float[Array, "*L"]
    relative_frobenius: Float[Array, "*L"]


def is_quantized(leaf: Any) -> bool:
    """Whether a pytree node is a ``QuantizedTensor``, to use as ``is_leaf``.

    Example:
        >>> is_quantized(jnp.zeros((4, 4)))
        False
    """
    return isinstance(leaf, QuantizedTensor)


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor on the adapter's output: ``alpha / rank``, with rsLoRA ``alpha / sqrt(rank)``.

    Raises:
        ConfigError: ``rank`` is not a positive whole number.

    Example:
        >>> lora_scaling(64, 16.0), lora_scaling(64, 16.0, use_rslora=True)
        (0.25, 2.0)
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{rank=}: expected a whole number of at least 1, for example 64.")
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def lora_delta(
    x: Float[Array, "*B K"],
    lora: Adapter,
    *,
    alpha: float = 16.0,
    use_rslora: bool = False,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*B N"]:
    """What an adapter adds to its layer's output: ``(dropout(x) @ A) * s @ B``, in x's dtype.

    Arguments and errors are those of ``lora_matmul``. Magnitudes of DoRA, which scale the base's
    output as well, are not looked at here.

    Example:
        >>> lora_delta(jnp.ones((1, 2)), {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 1))})
        Array([[32.]], dtype=float32)
    """
    a, b = lora["lora_a"], lora["lora_b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != x.shape[-1] or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"adapter lora_a {a.shape}, lora_b {b.shape} for an input {x.shape}: expected "
            f"[{x.shape[-1]}, r] and [r, out]. Stacked adapters go through lax.scan or vmap."
        )
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{dropout=}: expected at least 0 and below 1, for example 0.05.")
    if dropout and key is not None:
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros((), x.dtype))
    scaling = lora_scaling(a.shape[1], alpha, use_rslora)
    # Flat tokens: a gradient that contracts two token axes makes XLA transpose its operands, which
    # on a CPU takes longer than the product itself.
    tokens = x.reshape(-1, x.shape[-1])
    delta = ((tokens @ a.astype(x.dtype)) * scaling) @ b.astype(x.dtype)
    return delta.reshape(*x.shape[:-1], b.shape[1])


def lora_matmul(
    x: Float[Array, "*B K"],
    w: QuantizedTensor | Float[Array, "N K"],
    lora: Adapter,
    *,
    alpha: float = 16.0,
    use_rslora: bool = False,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*B N"]:
    """An adapted linear layer: ``x @ W.T + (dropout(x) @ A) * s @ B``, with DoRA times ``m / n``.

    Args:
        x: input, floating point; its dtype is that of all products and of the result.
        w: the frozen weight (out, in): quantized (then it gets no gradient and the backward pass
            keeps its packed form only) or dense.
        lora: ``{"lora_a": [in, r], "lora_b": [r, out]}``, any floating dtype; for DoRA also
            ``"lora_magnitude": [out]``.
        alpha: LoRA's alpha; the factor is ``lora_scaling(r, alpha, use_rslora)``.
        use_rslora: divide by sqrt(r) rather than r.
        dropout: probability with which an element of the adapter's input is zeroed; the rest is
            scaled by 1 / (1 - dropout). The base always sees all of ``x``.
        key: PRNG key for the dropout. None means evaluation: no dropout.

    Returns:
        y [*B, out] in x's dtype.

    Raises:
        ConfigError: ``dropout`` is outside [0, 1).
        ValueError: the adapter's shapes do not fit, or still have the axes of a stack.

    Example:
        >>> x, w = jnp.ones((1, 4)), jnp.ones((2, 4))
        >>> adapter = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 2))}
        >>> lora_matmul(x, w, adapter, alpha=0.5)
        Array([[6., 6.]], dtype=float32)
    """
    base = matmul(x, w) if is_quantized(w) else x @ w.astype(x.dtype).T
    y = base + lora_delta(x, lora, alpha=alpha, use_rslora=use_rslora, dropout=dropout, key=key)
    if "lora_magnitude" not in lora:
        return y
    return scale_outputs(y, w, lora, lora_scaling(lora["lora_a"].shape[1], alpha, use_rslora))


def merged_kernel(
    kernel: Float[Array, "K N"], lora: Adapter, scaling: float
) -> Float[Array, "K N"]:
    """The kernel that an adapted layer in effect has, in float32: with plain LoRA W.T + s * A @ B.

    Everything that merges calls this, so a variant of LoRA is merged as it computes.

    Args:
        kernel: of one layer, a dense Flax kernel.
        lora: its adapter (also of DoRA), without the axes of a stack.
        scaling: of ``lora_scaling``.

    Example:
        >>> adapter = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
        >>> merged_kernel(jnp.eye(2), adapter, 0.5).tolist()
        [[1.5, 0.5], [0.5, 1.5]]
    """
    a, b, kernel = lora["lora_a"], lora["lora_b"], kernel.astype(jnp.float32)
    update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    merged = kernel + update * scaling
    if "lora_magnitude" in lora:
        merged *= lora["lora_magnitude"] / adapted_norm(kernel.T, a, b, scaling)
    return merged


def merge_weight(
    w: QuantizedTensor | MixedStack | Float[Array, "*L K N"],
    lora: Adapter,
    *,
    alpha: float,
    use_rslora: bool = False,
    requantize: bool = False,
) -> tuple[QuantizedTensor | MixedStack | Float[Array, "*L K N"], MergeError]:
    """Adds an adapter (also of DoRA) into one weight and measures the rounding this caused.

    Stacked weights are merged one layer after the other, so the float32 temporaries are those of a
    single matrix.

    Args:
        w: quantized (out, in), or a dense Flax kernel [*L, in, out], or stacked layers of both.
        lora: its adapter, with the same leading axes.
        alpha: as in training.
        use_rslora: as in training.
        requantize: a quantized weight comes back quantized the same way; otherwise as a dense Flax
            kernel [*L, in, out] in the dtype the weight had before it was quantized. A dense weight
            stays dense in its dtype either way.

    Returns:
        The merged weight and its ``MergeError``, both with the leading axes of ``w``.

    Example:
        >>> adapter = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 2))}
        >>> merged, error = merge_weight(jnp.zeros((4, 2)), adapter, alpha=0.5)
        >>> float(merged[0, 0]), float(error.max_abs)
        (0.5, 0.0)
    """
    scaling = lora_scaling(lora["lora_a"].shape[-1], alpha, use_rslora)
    return _merge_stack(w, lora, scaling, requantize=requantize)


def merge_lora(
    params: Any,
    lora: Any,
    *,
    alpha: float,
    use_rslora: bool = False,
    requantize: bool = False,
) -> tuple[Any, dict[str, MergeError]]:
    """Adds adapters into the weights they belong to.

    Args:
        params: the tree given to ``init_lora``.
        lora: the (trained) tree that it returned.
        alpha: as in training.
        use_rslora: as in training.
        requantize: see ``merge_weight``.

    Returns:
        ``params`` with every adapted weight merged (the others are the same objects), and a report:
        path of the weight -> ``MergeError``. Requantizing typically costs more than a small update
        changes; the report tells.

    Raises:
        ConfigError: an adapter has no weight of its shape at its position.

    Example:
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 2))}}
        >>> lora = {"q_proj": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 2))}}
        >>> merged, report = merge_lora(params, lora, alpha=16)
        >>> bool((merged["q_proj"]["kernel"] == 1).all()), list(report)
        (True, ['q_proj/kernel'])
    """
    adapters = flatten_paths(lora, is_leaf=lambda node: isinstance(node, dict) and "lora_a" in node)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    merged_leaves, report = [], {}
    for key_path, leaf in leaves:
        parts = key_parts(key_path)
        parent = join_path(parts[:-1])
        if parent in adapters and _fits(leaf, adapters[parent]):
            leaf, report[join_path(parts)] = merge_weight(
                leaf,
                adapters.pop(parent),
                alpha=alpha,
                use_rslora=use_rslora,
                requantize=requantize,
            )
        merged_leaves.append(leaf)
    if adapters:
        shapes = {path: jax.tree.map(jnp.shape, adapter) for path, adapter in adapters.items()}
        raise ConfigError(
            f"these adapters belong to no weight: {shapes}; expected under the same name a weight "
            "of these features. Give the parameters that the adapters were made for."
        )
    return treedef.unflatten(merged_leaves), report


@functools.partial(jax.jit, static_argnames="requantize")
def _merge_stack(w: Any, lora: Adapter, scaling: float, *, requantize: bool) -> Any:
    def merge_matrix(w, lora):
        dense = dequantize(w, jnp.float32).T if is_quantized(w) else w.astype(jnp.float32)
        exact = merged_kernel(dense, lora, scaling)
        if is_quantized(w) and requantize:
            merged = _quantize_like(w, exact.T)
            stored = dequantize(merged, jnp.float32).T
        else:
            merged = exact.astype(w.dtype)
            stored = merged.astype(jnp.float32)
        difference = stored - exact
        # A weight of zeros merges without error; 0 / 0 would report NaN.
        norm = jnp.maximum(jnp.linalg.norm(exact), jnp.finfo(jnp.float32).tiny)
        relative = jnp.linalg.norm(difference) / norm
        return merged, MergeError(jnp.max(jnp.abs(difference)), relative)

    if isinstance(w, MixedStack) and requantize:
        parts, errors = zip(*map_parts(merge_matrix, w, lora), strict=True)
        return dataclasses.replace(w, parts=parts), join_parts(w, errors)
    return map_layers(merge_matrix, lora["lora_a"].shape[:-2], w, lora)


def _quantize_like(q: QuantizedTensor, w: Float[Array, "N K"]) -> QuantizedTensor:
    new = quantize(
        w,
        quant_type=q.quant_type,
        block_size=q.block_size,
        double_quant=q.nested_absmax is not None,
    )
    return dataclasses.replace(new, dtype=q.dtype)


def matrix_shape(leaf: Any, path: str) -> tuple[int, int, tuple[int, ...]]:
    """(in_features, out_features, leading_shape) of a weight that is to be adapted.

    Args:
        leaf: an array or ``QuantizedTensor``.
        path: what messages call it.

    Raises:
        ConfigError: it is no matrix.
    """
    if is_quantized(leaf):
        return leaf.shape[-1], leaf.shape[-2], tuple(leaf.leading_shape)
    if leaf.ndim < 2:
        raise ConfigError(
            f"where matches {path!r} of shape {leaf.shape}; expected a kernel [..., in, out]. "
            'Narrow the expression, for example to ".*_proj/kernel".'
        )
    return leaf.shape[-2], leaf.shape[-1], tuple(leaf.shape[:-2])


def _fits(leaf: Any, adapter: Adapter) -> bool:
    if not is_quantized(leaf) and leaf.ndim < 2:
        return False
    *leading, in_features, _ = adapter["lora_a"].shape
    return matrix_shape(leaf, "") == (in_features, adapter["lora_b"].shape[-1], tuple(leading))
