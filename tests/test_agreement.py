"""Agreement of raters: published and derived figures, ties, what is missing, and the command."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from running_server import client, running
from test_ratings import arena, write

from qlora_jax.errors import DataError
from qlora_jax.evaluation import read_ratings
from qlora_jax.evaluation.agreement import by_rater, compare_raters, fleiss_kappa
from qlora_jax.serving.stored import StoredQuestion

ROOT = pathlib.Path(__file__).parents[1]
RATINGS = ROOT.parent / "shared" / "data" / "qlora_eval" / "vicuna_pairwise"


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        # P = (1 + 1 + 1/3 + 1/3) / 4 = 2/3, P_e = 1/2.
        ([[3, 0], [0, 3], [2, 1], [1, 2]], 1 / 3),
        # Every pair differs: P = 0, P_e = 1/2.
        ([[1, 1], [1, 1]], -1.0),
        # P = 1, whatever chance gives.
        ([[2, 0, 0], [0, 5, 0], [0, 0, 3]], 1.0),
        # An item with one rating says nothing: as above without it.
        ([[3, 0], [0, 3], [1, 0], [2, 1], [0, 1], [1, 2], [0, 0]], 1 / 3),
        # Three ratings of one item, two of another: P = (1 + 0) / 2, P_e = 16/25 + 1/25.
        ([[3, 0], [1, 1]], (0.5 - 0.68) / 0.32),
        # A class that nobody chose changes nothing.
        ([[3, 0, 0], [0, 0, 3], [2, 0, 1], [1, 0, 2]], 1 / 3),
    ],
)
def test_kappa_by_hand(counts, kappa):
    assert fleiss_kappa(np.array(counts)) == pytest.approx(kappa)


def test_kappa_of_a_published_example():
    """14 raters, 10 items, 5 classes; P = 0.378, P_e = 0.213."""
    rows = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2"
    rows += "|6 5 2 1 0|0 2 2 3 7"
    counts = np.array([[int(n) for n in row.split()] for row in rows.split("|")])
    assert (counts.sum(1) == 14).all()
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_kappa_where_it_does_not_exist():
    assert math.isnan(fleiss_kappa(np.array([[3, 0], [2, 0]])))
    with pytest.raises(DataError, match="every item has only one"):
        fleiss_kappa(np.array([[1, 0], [0, 1]]))


def rater(path, name, wins, *, swapped=False):
    """Ratings of one judge; `wins` has the better system (or "tie") by question and pair."""
    records = []
    for (question, a, b), best in wins.items():
        first, second = (b, a) if swapped else (a, b)
        winner = {first: "model_a", second: "model_b"}.get(best, "tie")
        records.append(arena(first, second, winner, name, question))
    return write(path / f"{name}.jsonl", records)


WINS = {
    (1, "x", "y"): "x",
    (2, "x", "y"): "x",
    (1, "y", "z"): "y",
    (2, "y", "z"): "tie",
    (1, "x", "z"): "x",
    (2, "x", "z"): "z",
}


def test_the_order_of_the_answers_does_not_matter(tmp_path):
    a = read_ratings(rater(tmp_path, "a", WINS))
    b = read_ratings(rater(tmp_path, "b", WINS, swapped=True))
    found = compare_raters({"a": a, "b": b}, orderings=50)
    pair = found.pairs["a", "b"]
    assert (pair.items, pair.same, pair.kappa) == (6, 1, 1)
    assert (pair.systems, pair.tau, pair.rho) == (3, pytest.approx(1), pytest.approx(1))
    assert found.together == (6, 1) and found.alone["a"][:2] == (6, 0)
    assert math.isnan(found.alone["a"].kappa)


def test_some_verdicts_differ_and_some_are_missing(tmp_path):
    other = {key: best for key, best in WINS.items() if key != (1, "x", "y")}
    other[2, "x", "z"] = "x"
    other[2, "y", "z"] = "z"
    other[3, "x", "y"] = "y"  # that the first has not rated
    files = [rater(tmp_path, "a", WINS), rater(tmp_path, "b", other)]
    found = compare_raters(by_rater([(f.stem, read_ratings(f)) for f in files]), orderings=50)
    pair = found.pairs["a", "b"]
    assert (pair.items, pair.same) == (5, 0.6)
    # Of ten verdicts seven are for the earlier system, two for the later, one is a tie.
    by_chance = 0.7**2 + 0.2**2 + 0.1**2
    assert pair.kappa == pytest.approx((0.6 - by_chance) / (1 - by_chance))


def test_ranks_of_the_systems_are_compared(tmp_path):
    """a: w > x > y > z; b: the two best exchanged: one of six pairs of ranks is reversed."""
    names = "wxyz"
    pairs = [(q, i, j) for q in range(4) for k, i in enumerate(names) for j in names[k + 1 :]]
    best = {key: key[1] for key in pairs}
    swapped = best | {(q, "w", "x"): "x" for q in range(4)}
    files = [rater(tmp_path, "a", best), rater(tmp_path, "b", swapped)]
    found = compare_raters({f.stem: read_ratings(f) for f in files}, orderings=200)
    pair = found.pairs["a", "b"]
    assert pair.tau == pytest.approx((5 - 1) / 6)
    assert pair.rho == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_a_rater_with_itself_and_its_verdict_over_both_orders(tmp_path):
    records = [
        arena("x", "y", "model_a", "j", 1),
        arena("y", "x", "model_b", "j", 1),  # the same
        arena("x", "y", "model_a", "j", 2),
        arena("y", "x", "model_a", "j", 2),  # the other: a tie over both
        arena("x", "y", "tie", "j", 3),
        arena("y", "x", "tie", "j", 3),
    ]
    one = read_ratings(write(tmp_path / "j.jsonl", records))
    two = read_ratings(rater(tmp_path, "k", {(i, "x", "y"): "x" for i in (1, 2, 3)}))
    found = compare_raters({"j": one, "k": two}, orderings=20)
    by_chance = (3 / 6) ** 2 + (1 / 6) ** 2 + (2 / 6) ** 2
    expected = (2 / 3 - by_chance) / (1 - by_chance)
    assert found.alone["j"] == (6, 3, pytest.approx(expected))
    pair = found.pairs["j", "k"]
    assert (pair.items, pair.same) == (3, pytest.approx(1 / 3))
    assert pair.systems == 2 and math.isnan(pair.tau) and math.isnan(pair.rho)


def test_one_rater_alone_is_refused(tmp_path):
    one = read_ratings(rater(tmp_path, "a", WINS))
    with pytest.raises(DataError, match="needs a second rater"):
        compare_raters({"a": one})
    others = {(f"other {q}", a, b): best for (q, a, b), best in WINS.items()}
    two = read_ratings(rater(tmp_path, "b", others))
    with pytest.raises(DataError, match="a and b: no two ratings of the same answers"):
        compare_raters({"a": one, "b": two})


def test_judges_of_one_name_are_told_apart_by_their_files(tmp_path):
    one = read_ratings(rater(tmp_path, "human", WINS))
    assert list(by_rater([("ann", one), ("bob", one)])) == ["human (ann)", "human (bob)"]
    with pytest.raises(DataError, match="two sources of ratings are called 'ann'"):
        by_rater([("ann", one), ("ann", one)])


def test_votes_of_the_game_agree_with_a_judge(tmp_path):
    """A person votes on stored answers, a judge has rated the same ones in both orders."""
    stored = [
        StoredQuestion(str(i), f"question {i}", {"x": f"x{i}", "y": f"y{i}"}) for i in range(3)
    ]
    votes, judged = tmp_path / "votes.jsonl", []
    with running(votes=votes, stored=stored) as (url, _), client(url) as http:
        for _ in range(6):
            text = http.post("/game/rounds", json={"stored": True}).text
            events = [json.loads(line[6:]) for line in text.split("\n\n") if line[6:8] == '{"']
            shown = {e["side"]: e["text"] for e in events if "text" in e}
            winner = "a" if shown["a"].startswith("x") else "b"
            http.post("/game/votes", json={"round": events[0]["round"], "winner": winner})
    for i in range(3):
        judged += [arena("x", "y", "model_a", "m", i), arena("y", "x", "model_b", "m", i)]
    sources = [("votes", read_ratings(votes))]
    sources.append(("gpt", read_ratings(write(tmp_path / "gpt.jsonl", judged))))
    found = compare_raters(by_rater(sources), orderings=20)
    assert found.alone["human"].ratings == 6
    assert found.pairs["human", "m"].same == 1


@pytest.mark.skipif(not RATINGS.is_dir(), reason="needs shared/data/qlora_eval")
def test_gpt_4_in_one_order_and_in_the_other():
    """What the file of verdicts shows as position bias: 61.4 % of 2,227 pairs are the same."""
    found = compare_raters({"gpt-4": read_ratings(RATINGS)}, orderings=20)
    alone = found.alone["gpt-4"]
    assert (alone.ratings, alone.repeated) == (4467, 2227)
    assert alone.kappa == pytest.approx(0.362, abs=5e-4)  # docs/evaluation.md


@pytest.mark.slow
def test_the_script_prints_and_writes(tmp_path):
    files = [rater(tmp_path, "a", WINS), rater(tmp_path, "b", WINS)]
    command = [sys.executable, "scripts/evaluate.py", "--suite=agreement", "--orderings=50"]
    command += [f"--out={tmp_path / 'out'}", *(f"--ratings={file}" for file in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a / b" in done.stdout and "1.000" in done.stdout
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert written["pairs"][0]["raters"] == ["a", "b"] and written["pairs"][0]["kappa"] == 1
    assert written["raters"]["a"]["kappa"] is None
    done = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "needs a second rater" in done.stderr
