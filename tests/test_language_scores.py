"""Perplexity, CrowS-Pairs, the journal, and the whole of a benchmark on a tiny model."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

from qlora_jax.errors import ConfigError, DataError, EvaluationError
from qlora_jax.evaluation import crows_pairs, suites
from qlora_jax.evaluation.crows_pairs import Pair, PairScore
from qlora_jax.evaluation.journal import Journal
from qlora_jax.evaluation.perplexity import measure_perplexity, windows
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.loading import load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny_run.write_model(tmp_path_factory.mktemp("model"))
    return folder, *load_model(folder, quant_type="nf4", block_size=32)


def test_every_token_but_the_first_is_predicted_once_from_enough_context():
    for length in range(12):
        for window in range(2, 7):
            for stride in range(1, window + 1):
                row = list(range(length))
                pairs = windows(row, window, stride)
                assert [t for _, new in pairs for t in new] == row[1:]
                for i, (context, new) in enumerate(pairs):
                    assert context + new == list(range(context[0], new[-1] + 1))
                    assert len(context) + len(new) - 1 <= window
                    assert i == 0 or len(context) >= window - stride + 1


def test_perplexity_is_that_of_the_whole_text_and_of_each_window(loaded):
    _, model, tokenizer = loaded
    text = "what is the sum of one and two and three and four"
    ids = tokenizer.encode(text)
    whole = measure_perplexity(Scorer(model), tokenizer, [text])
    assert (whole.tokens, whole.bytes) == (len(ids) - 1, len(text))
    logprobs = Scorer(model).log_likelihoods([(ids[:1], ids[1:])])[0]
    assert whole.loss == pytest.approx(-logprobs.tokens.mean(), rel=1e-5)
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2) / len(text))
    # Two texts are two texts, and windows predict every token once.
    both = measure_perplexity(Scorer(model), tokenizer, [text, text])
    assert (both.nats, both.tokens) == (pytest.approx(2 * whole.nats), 2 * whole.tokens)
    cut = measure_perplexity(Scorer(model, max_len=4), tokenizer, [text], stride=1)
    assert cut.tokens == whole.tokens and cut.nats != pytest.approx(whole.nats, rel=1e-6)
    with pytest.raises(ConfigError, match="from 1 to the window of 4"):
        measure_perplexity(Scorer(model, max_len=4), tokenizer, [text], stride=5)
    with pytest.raises(DataError, match="no text"):
        measure_perplexity(Scorer(model), tokenizer, ["", "one"])


def test_pairs_are_scored_in_both_conventions(loaded):
    _, model, tokenizer = loaded
    pair = Pair("what is the sum", "what is one the sum", "stereo", "age")
    scorer, start = Scorer(model), tokenizer.eos_token_ids[0]
    more, less = (tokenizer.encode(text) for text in pair[:2])
    (with_start,) = crows_pairs.score_pairs(scorer, tokenizer, [pair])
    a, b = scorer.log_likelihoods([([start], more), ([start], less)])
    assert with_start.all == pytest.approx(a.total - b.total)
    shared = np.delete(b.tokens, less.index(tokenizer.encode("one")[0]))
    assert with_start.shared == pytest.approx(a.total - float(shared.sum()), abs=1e-5)
    (without,) = crows_pairs.score_pairs(scorer, tokenizer, [pair], start_token=False)
    a, b = scorer.log_likelihoods([(row[:1], row[1:]) for row in (more, less)])
    assert without.all == pytest.approx(a.total - b.total)


def test_preferences_count_ties_as_half():
    scores = [PairScore("age", 1, -1), PairScore("age", 0, -1), PairScore("nationality", -2, 1)]
    found = crows_pairs.preferences(scores)
    assert {n: (round(p.percent, 2), p.pairs) for n, p in found.items()} == {
        "age": (75.0, 2),
        "nationality": (0.0, 1),
        "overall": (50.0, 3),
    }
    assert crows_pairs.preferences(scores, "shared")["overall"].percent == pytest.approx(100 / 3)


def test_a_journal_is_continued_only_by_its_own_evaluation(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with Journal(path, {"model": "a", "shots": 5}) as journal:
        journal.write([("1", [0.5, "ä"]), ("2", None)])
    with path.open("a") as file:  # a kill in the middle of a line
        file.write('{"key": "3", "rec')
    with Journal(path, {"model": "a", "shots": 5}) as journal:
        assert journal.records == {"1": [0.5, "ä"], "2": None}
        journal.write([("3", 1)])
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"another evaluation \(shots: 5 -> 0\)"):
        Journal(path, {"model": "a", "shots": 0})
    (tmp_path / "text.txt").write_text("hello\n")
    with pytest.raises(EvaluationError, match="something else than answers"):
        Journal(tmp_path / "text.txt", {})
    assert path.read_bytes() == before
    with Journal(path, {"model": "a", "shots": 5}) as journal:
        assert journal.records["3"] == 1


def test_a_benchmark_that_was_stopped_is_continued_with_the_same_figures(loaded, tmp_path):
    _, model, tokenizer = loaded
    file = tmp_path / "pairs.csv"
    sentences = [("what is one", "what is two"), ("three and four", "four and three")] * 40
    rows = "".join(f"{a},{b},stereo,age\n" for a, b in sentences)
    file.write_text("sent_more,sent_less,stereo_antistereo,bias_type\n" + rows)
    candidate = suites.Candidate(model, tokenizer, "tiny", tmp_path / "out")
    found = suites.run_crows_pairs(candidate, str(file))
    assert found["all"]["overall"].pairs == 80
    assert sorted(found) == ["all", "all, no start token", "shared", "shared, no start token"]
    report = json.loads((tmp_path / "out" / "crows_pairs.json").read_text())
    journal = tmp_path / "out" / "crows_pairs.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 161
    journal.write_text("".join(lines[:70]))
    assert suites.run_crows_pairs(candidate, str(file)) == found
    assert json.loads((tmp_path / "out" / "crows_pairs.json").read_text()) == report
    assert sorted(journal.read_text().splitlines(True)) == sorted(lines)
    file.write_text(file.read_text() + "one,two,stereo,age\n")
    with pytest.raises(EvaluationError, match="pairs: "):
        suites.run_crows_pairs(candidate, str(file))


@pytest.mark.slow
def test_the_script_prints_figures_and_refuses_with_code_2(loaded, tmp_path):
    folder = loaded[0]
    (tmp_path / "text.txt").write_text("what is the sum of one and two " * 30)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "scripts/evaluate.py", f"--out={tmp_path / 'out'}", *arguments]
        return subprocess.run(
            command, cwd=tiny_run.REPOSITORY, capture_output=True, text=True, timeout=300
        )

    done = run("--suite=perplexity", f"--model={folder}", f"--data={tmp_path / 'text.txt'}")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "perplexity.json").read_text())["figures"]
    assert f"{figures['perplexity']:.3f}" in done.stdout
    done = run("--suite=mmlu", f"--model={folder}", f"--data={tmp_path / 'text.txt'}")
    assert done.returncode == 2 and "--solved" in done.stderr and "Traceback" not in done.stderr
    done = run("--suite=perplexity", f"--data={tmp_path / 'text.txt'}")
    assert done.returncode == 2 and "--workdir" in done.stderr
