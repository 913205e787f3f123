"""Loss and divergence, against NumPy; and which held-out tokens are measured."""

import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data.masking import Example
from qlora_jax.divergence import Predictions, compare, heldout_batches, predict_in_memory
from qlora_jax.training.step import evaluate_loss


class Head(nnx.Module):
    """A head whose logits are given; the hidden state is the row."""

    def __init__(self, logits):
        self.table = nnx.Param(jnp.asarray(logits, jnp.float32))

    def head(self, hidden):
        return self.table[hidden[..., 0].astype(jnp.int32)]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("chunk_size", [3, 7, 100])
def test_figures_are_those_of_numpy(chunk_size):
    generator = np.random.default_rng(0)
    p, q = generator.normal(0, 2, (2, 10, 5))
    targets, rows = generator.integers(0, 5, 10), np.arange(10.0)[:, None]
    reference, other = (Predictions(Head(x), rows, targets) for x in (p, q + 100))
    found = compare(reference, other, chunk_size=chunk_size)
    log_p, log_q = log_softmax(p), log_softmax(q)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    centred = [x - x.mean(axis=-1, keepdims=True) for x in (p, q)]
    expected = (
        -log_q[np.arange(10), targets].mean(),
        kl.mean(),
        kl.max(),
        np.abs(centred[0] - centred[1]).max(),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    same = compare(reference, reference, chunk_size=chunk_size)
    assert same[1:] == (0, 0, 0) and same.loss != found.loss


def examples(count):
    tokens = np.arange(1, 7)
    return [Example(tokens + i, np.array([0, 0, 1, 1, 0, 1]), f"x:{i}") for i in range(count)]


def test_the_loss_is_that_of_evaluation():
    model = llama_models.random_model(llama_models.tiny_config())
    batches = heldout_batches(examples(5), batch_size=2, seq_len=16, max_tokens=1000)
    predictions = predict_in_memory(model, batches)
    assert len(predictions.targets) == 15
    loss = compare(predictions, predictions).loss
    np.testing.assert_allclose(loss, evaluate_loss(model, batches), rtol=1e-5)


@pytest.mark.parametrize(("budget", "records"), [(1, 1), (17, 2), (18, 3), (1000, 5)])
def test_the_budget_counts_tokens_and_is_never_empty(budget, records):
    batches = heldout_batches(examples(5), batch_size=2, seq_len=16, max_tokens=budget)
    assert sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) == 6 * records
