import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import ConfigError
from qlora_jax.sampling import Sampling, greedy_tokens, penalize_repetition, sample_tokens

# Probabilities 0.5, 0.25, 0.15, 0.1, not in order.
PROBABILITIES = np.array([0.15, 0.5, 0.1, 0.25])
DRAWS = 4000


def frequencies(**settings) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (DRAWS, 4))
    tokens = jax.jit(sample_tokens)(logits, keys, Sampling(**settings).as_arrays())
    return np.bincount(tokens, minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(temperature=1.0), PROBABILITIES),
        (dict(temperature=1.0, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (dict(temperature=1.0, top_k=9), PROBABILITIES),
        (dict(temperature=1.0, top_p=0.5), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_p=0.76), [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        (dict(temperature=1.0, top_p=1e-6), [0, 1, 0, 0]),
        # Among the two that top-k leaves, the first has 2/3.
        (dict(temperature=1.0, top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (dict(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        # At least 0.4 of the likeliest, whatever top-p would keep.
        (dict(temperature=1.0, min_p=0.4), [0, 2 / 3, 0, 1 / 3]),
        (dict(temperature=1.0, min_p=0.1, top_k=1), [0, 1, 0, 0]),
        (dict(temperature=1e-30), [0, 1, 0, 0]),
        (dict(temperature=1e6), [0.25] * 4),
    ],
)
def test_frequencies(settings, expected):
    np.testing.assert_allclose(frequencies(**settings), expected, atol=0.03)


def test_rows_with_settings_of_their_own_draw_what_they_draw_alone():
    keys, logits = jax.random.split(jax.random.key(0), 4), jnp.log(jnp.tile(PROBABILITIES, (4, 1)))
    settings = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=2), Sampling(1.0, top_p=0.8)]
    rows = jax.tree.map(lambda *x: jnp.stack(x), *[one.as_arrays() for one in settings])
    together = sample_tokens(logits, keys, rows)
    for row, one in enumerate(settings):
        alone = sample_tokens(logits[row][None], keys[row][None], one.as_arrays())
        assert together[row] == alone[0]


def test_repetition_is_penalized_where_a_row_has_seen_a_token():
    logits = jnp.array([[2.0, -1.0, 3.0]] * 2)
    seen = jnp.array([[True, True, False], [False, False, True]])
    found = penalize_repetition(logits, seen, Sampling(repetition_penalty=2.0))
    assert found.tolist() == [[1.0, -2.0, 3.0], [2.0, -1.0, 1.5]]
    assert (penalize_repetition(logits, seen, Sampling()) == logits).all()


def test_equal_logits_do_not_widen_top_k():
    keys = jax.random.split(jax.random.key(0), 200)
    settings = Sampling(temperature=1.0, top_k=2).as_arrays()
    tokens = sample_tokens(jnp.zeros((200, 8)), keys, settings)
    assert len(set(tokens.tolist())) == 2


def test_greedy_takes_the_first_of_the_likeliest():
    assert greedy_tokens(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])).tolist() == [1, 0]
    assert greedy_tokens(jnp.full((1, 3), jnp.nan)).tolist() < [3]
    assert Sampling().greedy and not Sampling(temperature=0.1).greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), r"temperature must be 0 \(greedy\) or a finite number.*got -1.0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(top_k=-1), r"top_k must be 0 \(all tokens\) or above, got -1"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.01), "top_p must be above 0"),
        (dict(min_p=1.5), r"min_p must be 0 \(all tokens\) to 1, got 1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings).validate()
