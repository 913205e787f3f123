"""How far one model is from another on the same text: loss, and divergence of the logits.

For every token that carries loss, p is the distribution that the reference predicts and q that of
the other model, both in float32 from the same prefix:

    loss(q)  = mean of -log q(token)                        nats per token
    KL(p||q) = sum over the vocabulary of p log(p / q)      nats; mean and largest over the tokens

A loss may stay the same while answers change; the KL divergence sees that. Logits of a whole text
never exist at once: the hidden states do, and the heads are applied to a few hundred at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.data.batches import eval_batches
from qlora_jax.data.masking import Example
from qlora_jax.losses import next_token_targets

Batch = Mapping[str, np.ndarray]


class Divergence(NamedTuple):
    """Figures of a model against a reference.

    Attributes:
        loss: mean negative log-likelihood of the tokens that carry loss, in nats.
        kl: mean KL divergence from the reference, in nats per token.
        max_kl: that of the token where it is largest.
        max_logit: the largest absolute difference of two logits, each row centred first, for a
            constant added to all logits changes nothing.
    """

    loss: float
    kl: float
    max_kl: float
    max_logit: float


class Predictions(NamedTuple):
    """What is needed to predict the tokens that carry loss.

    Attributes:
        model: has `head`.
        hidden: final hidden states at the positions that predict, [N, D].
        targets: the tokens they predict, int32 [N].
    """

    model: nnx.Module
    hidden: Float[np.ndarray, "N D"]
    targets: Int[np.ndarray, " N"]


class _HiddenStates(Protocol):
    def __call__(self, batches: Sequence[Batch]) -> Iterable[Float[Array, "B T D"]]: ...


def heldout_batches(
    examples: Sequence[Example], *, batch_size: int, seq_len: int, max_tokens: int
) -> list[Batch]:
    """Batches of the first examples, as many as hold about so many tokens, at least one example.

    Args:
        examples: held-out, tokenized.
        batch_size: rows of a batch.
        seq_len: tokens of a row.
        max_tokens: tokens in all; the example that passes it is the first to be left out.
    """
    lengths = np.cumsum([len(example.tokens) for example in examples])
    count = max(1, int(np.searchsorted(lengths, max_tokens, side="right")))
    batches = eval_batches(examples[:count], batch_size=batch_size, seq_len=seq_len)
    return [{name: array[0] for name, array in batch.arrays.items()} for batch in batches]


def predict(
    model: nnx.Module, hidden_states: _HiddenStates, batches: Sequence[Batch]
) -> Predictions:
    """Runs a model over held-out batches.

    Args:
        model: has `head`.
        hidden_states: gives the model's final hidden states of all batches.
        batches: of `heldout_batches`.
    """
    hidden, targets = [], []
    for batch, states in zip(batches, hidden_states(batches), strict=True):
        arrays = (jnp.asarray(batch[k]) for k in ("tokens", "loss_mask", "segment_ids"))
        wanted, mask = map(np.asarray, next_token_targets(*arrays))
        hidden.append(np.asarray(states)[mask > 0])
        targets.append(wanted[mask > 0])
    return Predictions(model, np.concatenate(hidden), np.concatenate(targets))


def predict_in_memory(model: nnx.Module, batches: Sequence[Batch]) -> Predictions:
    """`predict` for a model that is whole in memory; it is put into evaluation mode."""
    model.eval()
    graphdef, state = nnx.split(model)
    return predict(
        model,
        lambda batches: (_hidden_states(graphdef, state, dict(batch)) for batch in batches),
        batches,
    )


def compare(reference: Predictions, other: Predictions, *, chunk_size: int = 256) -> Divergence:
    """Measures a model against a reference on the same text.

    Args:
        reference: p.
        other: q; the same one again for the reference's own loss.
        chunk_size: tokens whose logits exist at one time.
    """
    count = len(reference.targets)
    chunk_size = min(chunk_size, count)
    heads = [nnx.split(each.model) for each in (reference, other)]
    sums, largest = np.zeros(2), np.zeros(2)
    for start in range(0, count, chunk_size):
        # The last chunk begins earlier, to be of the same size; what it repeats is not counted.
        first = min(start, count - chunk_size)
        chunk = slice(first, first + chunk_size)
        terms = _compare_chunk(
            *(graphdef for graphdef, _ in heads),
            *(state for _, state in heads),
            reference.hidden[chunk],
            other.hidden[chunk],
            reference.targets[chunk],
        )
        nll, kl, logit = (np.asarray(term, np.float64)[start - first :] for term in terms)
        sums += nll.sum(), kl.sum()
        largest = np.maximum(largest, (kl.max(), logit.max()))
    loss, kl = sums / count
    return Divergence(float(loss), float(kl), float(largest[0]), float(largest[1]))


@functools.partial(jax.jit, static_argnames="graphdef")
def _hidden_states(graphdef: nnx.GraphDef, state: nnx.State, batch: Any) -> Array:
    model = nnx.merge(graphdef, state)
    return model.hidden_states(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare_chunk(graphdef_p, graphdef_q, state_p, state_q, hidden_p, hidden_q, targets):
    def logits(graphdef: nnx.GraphDef, state: nnx.State, hidden: Array) -> Array:
        raw = nnx.merge(graphdef, state).head(hidden[None])[0].astype(jnp.float32)
        return raw - jnp.mean(raw, axis=-1, keepdims=True)

    p, q = logits(graphdef_p, state_p, hidden_p), logits(graphdef_q, state_q, hidden_q)
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    nll = -jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return nll, kl, jnp.max(jnp.abs(p - q), axis=-1)
