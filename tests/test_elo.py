"""Ratings against plain loops and known answers, and the paper's tables from its verdicts."""

import json
import pathlib

import numpy as np
import pytest

from qlora_jax.evaluation import Ratings, bradley_terry, elo_ratings, read_ratings
from qlora_jax.evaluation.elo import head_to_head
from qlora_jax.evaluation.ratings import position_bias, relative_scores

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_ratings = pytest.mark.skipif(
    not (SHARED / "qlora_eval").is_dir(), reason="needs shared/data/qlora_eval"
)


def some_matches(count=300, systems=5, seed=0):
    """Matches of systems, each stronger than the one before."""
    rng = np.random.default_rng(seed)
    first = rng.integers(systems, size=count)
    second = (first + rng.integers(1, systems, size=count)) % systems
    ahead = rng.random(count) < 1 / (1 + np.exp(0.7 * (second - first)))
    return first, second, np.where(rng.random(count) < 0.1, 0.5, ahead), systems


def walk(first, second, score, systems, order):
    """Elo as it is usually written."""
    ratings = [1000.0] * systems
    for m in order:
        i, j = first[m], second[m]
        gain = 32 * (score[m] - 1 / (1 + 10 ** ((ratings[j] - ratings[i]) / 400)))
        ratings[i] += gain
        ratings[j] -= gain
    return ratings


@pytest.mark.parametrize("matches", [None, 100])
def test_elo_is_the_mean_over_the_orderings_of_a_plain_loop(matches):
    played = some_matches()
    result = elo_ratings(*played, orderings=40, matches=matches, seed=3)
    rng = np.random.default_rng(3)
    orders = [rng.permutation(300)[:matches] for _ in range(40)]
    single = np.array([walk(*played, order) for order in orders])
    np.testing.assert_allclose(result.mean, single.mean(0), atol=1e-3)
    half = 1.96 * single.std(0, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(result.mean_interval, half, atol=1e-3)
    np.testing.assert_allclose(
        result.spread, np.quantile(single, [0.025, 0.975], axis=0).T, atol=1e-3
    )


def test_orderings_beyond_one_block_are_seeded_and_differ():
    played = some_matches(30)
    once, again = (elo_ratings(*played, orderings=2001, seed=1) for _ in range(2))
    other = elo_ratings(*played, orderings=2001, seed=2)
    assert np.array_equal(once.mean, again.mean) and not np.array_equal(once.mean, other.mean)
    assert once.mean.mean() == pytest.approx(1000, abs=1e-3)


def test_bradley_terry_is_where_the_likelihood_is_flat():
    first, second, score, systems = some_matches()
    rating = bradley_terry(first, second, score, systems, draws=2).rating
    expected = 1 / (1 + 10 ** ((rating[second] - rating[first]) / 400))
    slope = np.bincount(first, score - expected) - np.bincount(second, score - expected)
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    assert rating.mean() == pytest.approx(1000)


def test_bootstrap_intervals_hold_the_truth_and_widen_when_questions_repeat():
    first, second, score, systems = some_matches(2000)
    truth = 400 / np.log(10) * 0.7 * (np.arange(5) - 2) + 1000
    alone = bradley_terry(first, second, score, systems, draws=300)
    # Ties pull towards the middle; the order and the rough place remain.
    assert (np.diff(alone.rating) > 0).all() and np.abs(alone.rating - truth).max() < 60
    assert (alone.interval[:, 0] < alone.rating).all()
    assert (alone.rating < alone.interval[:, 1]).all()
    four = [np.repeat(x, 4) for x in (first, second, score)]
    question = np.repeat(np.arange(2000), 4)
    copied = bradley_terry(*four, systems, question=question, draws=300)
    np.testing.assert_allclose(copied.interval, alone.interval, atol=1e-3)
    naive = bradley_terry(*four, systems, draws=300)
    assert (np.diff(naive.interval) < 0.7 * np.diff(alone.interval)).all()


def test_without_a_maximum_there_is_no_rating():
    first, second = np.array([0, 0, 1, 2]), np.array([1, 2, 2, 1])
    won_all = bradley_terry(first, second, np.array([1.0, 1, 1, 1]), 3, draws=5)
    assert np.isnan(won_all.rating).all() and np.isnan(won_all.interval).all()


def verdicts(rows, judge="gpt"):
    """Ratings of answers A (0) and B (1) to questions, given as (first, score, question)."""
    first = np.array([row[0] for row in rows])
    score = np.array([row[1] for row in rows], float)
    question = np.array([row[2] for row in rows])
    points = np.full((len(rows), 2), np.nan)
    judges, turn = np.array([judge] * len(rows)), np.zeros(len(rows), int)
    return Ratings(("A", "B"), first, 1 - first, score, points, question, judges, turn, 0)


def test_position_bias_compares_the_orders_of_one_question():
    bias = position_bias(
        verdicts(
            [(0, 1, "a"), (1, 0, "a")]  # A both times
            + [(0, 1, "b"), (1, 1, "b")]  # the first both times
            + [(0, 0, "c"), (1, 0, "c")]  # the second both times
            + [(0, 0.5, "d"), (1, 1, "d")]  # a tie and a win
            + [(0, 1, "e")]
        )
    )
    assert (bias.both_orders, bias.same) == (4, 0.25)
    assert (bias.always_first, bias.always_second) == (0.25, 0.25)
    assert (bias.first, bias.second) == (5 / 9, 3 / 9)


def test_head_to_head_counts_both_orders():
    first, second, score, systems = some_matches()
    wins, played = head_to_head(first, second, score, systems)
    assert played.sum() == 600 and wins.sum() == 300 and np.array_equal(wins + wins.T, played)
    mine = ((first == 1) & (second == 3), (first == 3) & (second == 1))
    assert wins[1, 3] == score[mine[0]].sum() + (1 - score[mine[1]]).sum()


@needs_ratings
def test_table_1_of_the_paper():
    ratings = read_ratings(SHARED / "qlora_eval" / "vicuna_pairwise")
    assert (len(ratings.score), ratings.unparsed) == (4467, 13)
    played = (ratings.first, ratings.second, ratings.score, len(ratings.systems))
    table = json.loads((SHARED / "paper_tables.json").read_text())["table1_elo_vicuna_gpt4"]
    result = elo_ratings(*played, matches=493)
    for name, mean, half in zip(ratings.systems, result.mean, result.mean_interval, strict=True):
        assert mean == pytest.approx(table[name][0], abs=4), name
        assert round(half) == table[name][1]
    full = elo_ratings(*played, orderings=2000)
    gpt4 = ratings.systems.index("GPT-4")
    assert full.mean[gpt4] == pytest.approx(1375, abs=3)
    assert np.abs(full.mean - bradley_terry(*played, draws=2).rating).max() < 12


@needs_ratings
def test_table_6_of_the_paper():
    ratings = read_ratings(SHARED / "qlora_eval" / "relative_subset")
    paper = json.loads((SHARED / "paper_tables.json").read_text())
    table = paper["table6_vicuna_relative_to_chatgpt"]
    scores = relative_scores(ratings, "ChatGPT")
    assert set(scores) == set(table) & set(scores) and len(scores) == 6
    for name, shares in scores.items():
        expected = table[name][:3]
        if name == "GPT-4":  # its two columns are swapped in the paper
            expected = [expected[1], expected[0], expected[2]]
        assert [round(share, 1) for share in shares] == expected, name


@needs_ratings
def test_position_bias_of_gpt_4():
    bias = position_bias(read_ratings(SHARED / "qlora_eval" / "vicuna_pairwise"))
    assert bias.both_orders == 2227
    assert bias.always_first == pytest.approx(0.196, abs=1e-3)
    assert bias.always_second == pytest.approx(0.009, abs=1e-3)
