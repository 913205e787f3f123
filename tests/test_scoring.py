"""Probabilities of given tokens, against a row by itself through the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
from flax import nnx
from llama_models import random_model, tiny_config

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation.packed_prompts import ROW_WIDTH, lay_out, pack, places_of
from qlora_jax.evaluation.scoring import Scorer

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["full", "window"])
def model(request):
    window = 12 if request.param == "window" else None
    return random_model(tiny_config(sliding_window=window))


def ids(length: int) -> list[int]:
    return RNG.integers(0, 32, length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(graphdef, state, row):
    return jax.nn.log_softmax(nnx.merge(graphdef, state)(row)[0])


def alone(model, row: list[int]) -> np.ndarray:
    """log p of every token at every place of one row; what is behind a place has no say in it."""
    padded = jnp.asarray([[*row, *[0] * (100 - len(row))]])
    return np.asarray(_logprobs(*nnx.split(model), padded))[: len(row)]


def test_likelihoods_are_those_of_each_row_alone_whatever_the_batch(model):
    pairs = [(ids(a), ids(b)) for a, b in [(1, 1), (3, 40), (50, 2), (7, 0), (1, 60), (20, 20)]]
    for batch_tokens in (1, 4096):
        found = Scorer(model, batch_tokens=batch_tokens).log_likelihoods(pairs)
        for (context, continuation), one in zip(pairs, found, strict=True):
            logprobs = alone(model, [*context, *continuation])
            places = range(len(context) - 1, len(context) + len(continuation) - 1)
            wanted = [logprobs[p, t] for p, t in zip(places, continuation, strict=True)]
            np.testing.assert_allclose(one.tokens, wanted, atol=1e-5)
            assert one.total == pytest.approx(sum(wanted), abs=1e-4)


def test_the_likeliest_continuation_is_greedy_and_another_is_not(model):
    context = ids(9)
    row = list(context)
    for _ in range(4):
        row.append(int(alone(model, row)[-1].argmax()))
    other = [*row[:-1], (row[-1] + 1) % 32]
    found = Scorer(model).log_likelihoods([(context, r[9:]) for r in (row, other)])
    assert [one.is_greedy for one in found] == [True, False]


@pytest.mark.parametrize("shared", [0, 3, 45])
def test_choices_are_those_of_each_prompt_alone_with_and_without_a_common_beginning(model, shared):
    beginning = ids(shared)
    prompts = [[*beginning, *ids(n)] for n in (1, 17, 40, 5)]
    done = []
    found = Scorer(model, batch_tokens=160).choose_next(prompts, [4, 30], progress=done.append)
    assert sum(done) == 4
    for prompt, row in zip(prompts, found, strict=True):
        np.testing.assert_allclose(row, alone(model, prompt)[-1][[4, 30]], atol=1e-5)


def test_what_cannot_be_scored_is_refused(model):
    scorer = Scorer(model, max_len=8)
    assert scorer.choose_next([], [1]).shape == (0, 1) and scorer.log_likelihoods([]) == []
    scorer.log_likelihoods([(ids(8), ids(1))])
    for pairs in ([(ids(8), ids(2))], [([], ids(2))]):
        with pytest.raises(DataError):
            scorer.log_likelihoods(pairs)
    for prompts in ([ids(9)], [[]]):
        with pytest.raises(DataError):
            scorer.choose_next(prompts, [1])
    with pytest.raises(ConfigError, match="from 2 to the 128 tokens"):
        Scorer(model, max_len=129)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Scorer(t5_models.fill())


@pytest.mark.parametrize("batch_tokens", [40, 1024, 4096])
def test_rows_hold_every_prompt_once_and_are_nearly_full(batch_tokens):
    prompts = [ids(n) for n in RNG.integers(1, 700, 300).tolist()]
    batches = list(pack([len(ids) for ids in prompts], batch_tokens, 2048))
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(300))
    for batch in batches:
        layout = lay_out(prompts, batch, start=5)
        assert layout.tokens.shape == (batch.size, batch.width)
        assert batch.size == 1 or batch.size * batch.width <= batch_tokens
        assert len(layout.places) == batch.size * places_of(batch.width)
        ends = layout.places[: len(batch.prompts)]
        flat, positions = layout.tokens.ravel(), layout.positions.ravel()
        assert flat[ends].tolist() == [prompts[i][-1] for i in batch.prompts]
        assert positions[ends].tolist() == [4 + len(prompts[i]) for i in batch.prompts]
        assert (layout.segment_ids > 0).sum() == sum(len(prompts[i]) for i in batch.prompts)
    if batch_tokens >= ROW_WIDTH:
        places = sum(batch.size * batch.width for batch in batches)
        assert sum(map(len, prompts)) > 0.95 * places
