"""DoRA: an adapter that learns how large each output's weights are, apart from where they point.

DoRA (arXiv 2402.09353) writes the adapted weight W + s * (A @ B).T, which is (out, in), as a length
and a direction for each output, and learns the length m [out] by itself:

    y = (x @ W.T + (dropout(x) @ A) * s @ B) * m / n,    n[o] = ||W[o] + s * (A @ B)[:, o]||

m starts as n, so the first outputs are those of plain LoRA. n follows A and B but gets no gradient
(section 4.3 of the paper). It is not taken from the sum, which would be a second dense matrix, but

    n^2 = ||W[o]||^2 + 2 s (W @ A)[o] . B[:, o] + s^2 B[:, o].T @ (A.T @ A) @ B[:, o]

which decodes W once, in the dtype that the layer computes in, and needs [out, r] beside it. The
price of DoRA is this second decoding of every weight, in the forward pass and again wherever that
is recomputed, and a product with r columns; it does not grow with the number of tokens.

PEFT computes the same, but for dropout: there the factor m / n - 1 goes to the base's output of the
*dropped* input, at the price of a second product with W. Here the base always sees all of x.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from qlora_jax.mixed import MixedStack, map_layers
from qlora_jax.quantized import QuantizedTensor, dequantize


def adapted_norm(
    w: QuantizedTensor | Float[Array, "N K"],
    lora_a: Float[Array, "K r"],
    lora_b: Float[Array, "r N"],
    scaling: float,
    dtype: DTypeLike = jnp.float32,
) -> Float32[Array, " N"]:
    """The Euclidean norm of every output's weights after adaptation, without a gradient.

    Args:
        w: the frozen weight (out, in).
        lora_a: A.
        lora_b: B.
        scaling: s.
        dtype: that W is decoded into and multiplied with A in; what follows is in float32.

    Returns:
        n, at least the smallest normal float32, so that an output of zeros stays zero.

    Example:
        >>> w = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> adapted_norm(w, jnp.zeros((2, 1)), jnp.zeros((1, 2)), 1.0)
        Array([5., 1.], dtype=float32)
    """
    w, a, b = jax.lax.stop_gradient((w, lora_a, lora_b))
    dense = dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # In `dtype` throughout, as the layer's own products are: 16-bit factors with a float32 result
    # are not everywhere to be had on a CPU (JAX 0.12: "BF16 x BF16 = F32" in some programs).
    product = jnp.matmul(dense, a.astype(dtype), precision="highest").astype(jnp.float32)
    gram = jnp.matmul(a.T, a, precision="highest")
    squares = jnp.sum(jnp.square(dense.astype(jnp.float32)), axis=1)
    squares += scaling * jnp.sum(b * (2.0 * product.T + scaling * (gram @ b)), axis=0)
    norm = jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
    return checkpoint_name(norm, "adapted_norm")


def init_magnitude(
    w: QuantizedTensor | MixedStack | Float[Array, "*L K N"],
    lora_a: Float[Array, "*L K r"],
    lora_b: Float[Array, "*L r N"],
    scaling: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*L N"]:
    """The magnitudes m with which an adapter begins: the norms n of the adapted weight.

    Args:
        w: quantized (out, in), mixed, or a dense Flax kernel [*L, in, out].
        lora_a: A, with the same leading axes.
        lora_b: B.
        scaling: s.
        dtype: of the result.

    Example:
        >>> init_magnitude(jnp.full((4, 2), 0.5), jnp.zeros((4, 1)), jnp.zeros((1, 2)), 1.0)
        Array([1., 1.], dtype=float32)
    """

    def one(w: Any, a: Array, b: Array) -> Array:
        w = w if isinstance(w, QuantizedTensor) else w.T
        return adapted_norm(w, a, b, scaling).astype(dtype)

    return map_layers(one, lora_a.shape[:-2], w, lora_a, lora_b)


def scale_outputs(
    y: Float[Array, "*B N"],
    w: QuantizedTensor | Float[Array, "N K"],
    lora: dict[str, Array],
    scaling: float,
) -> Float[Array, "*B N"]:
    """``y * m / n`` in y's dtype; ``lora`` holds ``lora_a``, ``lora_b`` and ``lora_magnitude``.

    Example:
        >>> lora = dict(lora_a=jnp.zeros((1, 1)), lora_b=jnp.zeros((1, 1)))
        >>> scale_outputs(jnp.ones(1), 2 * jnp.eye(1), lora | {"lora_magnitude": jnp.ones(1)}, 1.0)
        Array([0.5], dtype=float32)
    """
    norm = adapted_norm(w, lora["lora_a"], lora["lora_b"], scaling, y.dtype)
    return y * (lora["lora_magnitude"].astype(jnp.float32) / norm).astype(y.dtype)
