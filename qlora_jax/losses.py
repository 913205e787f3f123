"""Next-token cross-entropy that never holds the logits of a whole batch.

The logits of a batch are its largest tensor by far: 4 x 512 tokens of SmolLM2 against a vocabulary
of 49,152 are 400 MB in float32, as much again for their gradient, and four times the base itself.
So the hidden states are cut into chunks of a few hundred tokens, and `jax.lax.scan` sends one chunk
after the other through the head:

    loss = sum over tokens with mask 1 of  logsumexp(logits) - logits[target]

The gradient of a chunk is taken at once, while its logits are there, and kept: it has the shape of
the hidden states, a thousandth of the logits. The backward pass only scales it, and no head product
is computed twice. Peak memory is a few `[chunk, vocabulary]` arrays, whatever the batch.

The head enters as a function of the hidden states alone; what it closes over is frozen and JAX
never forms its `[vocabulary, features]` gradient. A head that is trained itself (an adapter on it)
needs `trainable_head=True`: then logits are thrown away after the forward pass and recomputed in
the backward pass, at the price of one more head product.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_targets(
    tokens: Int[Array, "*B T"], loss_mask: Int[Array, "*B T"], segment_ids: Int[Array, "*B T"]
) -> tuple[Int[Array, "*B T"], Int[Array, "*B T"]]:
    """What every position has to predict, and whether that counts.

    `loss_mask[t] = 1` means that token `t` is a target, predicted from position `t - 1` if both lie
    in the same segment: the first token of a packed record is never predicted from the end of the
    record before it. The last position predicts nothing. Padding is segment 0.

    Returns:
        targets, mask: of the shape of `tokens`, aligned with the position that predicts.

    >>> row = jnp.array([[5, 6, 7, 8, 0]])
    >>> targets, mask = next_token_targets(row, jnp.ones_like(row), jnp.array([[1, 1, 2, 2, 0]]))
    >>> targets.tolist(), mask.tolist()
    ([[6, 7, 8, 0, 0]], [[1, 0, 1, 0, 0]])
    """

    def shift(x: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
        return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)

    same_segment = (shift(segment_ids) == segment_ids) & (segment_ids > 0)
    return shift(tokens), shift(loss_mask) * same_segment.astype(loss_mask.dtype)


def chunked_cross_entropy(
    head: Callable[[Float[Array, "1 C D"]], Float[Array, "1 C V"]],
    hidden: Float[Array, "*B T D"],
    targets: Int[Array, "*B T"],
    mask: Int[Array, "*B T"],
    *,
    chunk_size: int = 256,
    trainable_head: bool = False,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihood (nats) of `targets` over the positions where `mask` is 1.

    Args:
        head: hidden states to logits; called on `[1, chunk_size, D]`.
        hidden: final hidden states.
        targets: the token each position predicts.
        mask: 1 where the position counts, else 0. Positions with 0 contribute exactly nothing.
        chunk_size: tokens whose logits exist at one time.
        trainable_head: whether anything that `head` closes over is differentiated.

    Returns:
        A float32 scalar, the sum (not the mean): dividing by the number of tokens that count is
        left to the caller, who alone knows all microbatches of a step.

    >>> hidden = jnp.ones((1, 3, 2))
    >>> uniform = lambda h: jnp.zeros((*h.shape[:-1], 8))
    >>> targets, mask = jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 0]])
    >>> loss = chunked_cross_entropy(uniform, hidden, targets, mask)
    >>> bool(jnp.allclose(loss, 2 * jnp.log(8)))
    True
    """
    features = hidden.shape[-1]
    tokens = targets.size
    chunk_size = min(chunk_size, tokens)
    chunks = -(-tokens // chunk_size)
    padding = chunks * chunk_size - tokens

    def cut(x: Array, trailing: tuple[int, ...]) -> Array:
        flat = x.reshape(tokens, *trailing)
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * len(trailing))
        return flat.reshape(chunks, 1, chunk_size, *trailing)

    def chunk_loss(h: Array, target: Array, counts: Array) -> Float[Array, ""]:
        with jax.named_scope("cross_entropy_chunk"):
            logits = head(h).astype(jnp.float32)
            target_logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
            nll = jax.nn.logsumexp(logits, axis=-1) - target_logit
            # where, not a product: 0 * inf would be nan for a position that does not count
            return jnp.sum(jnp.where(counts > 0, nll, 0.0))

    @jax.custom_vjp
    def chunk_loss_and_gradient(h: Array, target: Array, counts: Array) -> Float[Array, ""]:
        return chunk_loss(h, target, counts)

    def forward(h: Array, target: Array, counts: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(chunk_loss)(h, target, counts)

    def backward(gradient: Array, g: Array) -> tuple[Array, None, None]:
        return (gradient * g).astype(gradient.dtype), None, None

    chunk_loss_and_gradient.defvjp(forward, backward)
    loss_of_chunk = jax.checkpoint(chunk_loss) if trainable_head else chunk_loss_and_gradient

    def body(total: Float[Array, ""], chunk: tuple[Array, Array, Array]):
        return total + loss_of_chunk(*chunk), None

    xs = (cut(hidden, (features,)), cut(targets, ()), cut(mask, ()))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), xs)
    return total
