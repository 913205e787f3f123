"""Reading verdicts, and the report that a command makes of them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from qlora_jax.errors import DataError, UserError
from qlora_jax.evaluation import elo_report, read_ratings

ROOT = pathlib.Path(__file__).parents[1]
PAIRWISE = "{}-vs-{}-gpt-4-reviewer-threeclass.jsonl"
RELATIVE = "{}-vs-{}-gpt4-reviewer.jsonl"
GUANACO = "7b-guanaco-vicuna-generations-topp0.9-temp0.7"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def matches(ratings):
    columns = (ratings.first, ratings.second, ratings.score.tolist())
    return [
        (ratings.systems[i], ratings.systems[j], score)
        for i, j, score in zip(*columns, strict=True)
    ]


def arena(a, b, winner, judge="human", question=1):
    return {"model_a": a, "model_b": b, "winner": winner, "judge": judge, "question_id": question}


def test_verdicts_of_the_authors(tmp_path):
    name = PAIRWISE.format("answer-gpt4", GUANACO)
    write(tmp_path / name, [{"score": score, "question_id": 1} for score in (1, 2, 3, -1)])
    ratings = read_ratings(tmp_path)
    assert ratings.unparsed == 1 and set(ratings.judge) == {"gpt-4"}
    pair = ("GPT-4", "Guanaco 7B")
    assert matches(ratings) == [(*pair, 1.0), (*pair, 0.0), (*pair, 0.5)]


def test_names_as_the_authors_script_writes_them(tmp_path):
    write(tmp_path / "a_b_vs_c-d_gpt-4_reviewer_threeclass.jsonl", [{"score": 1}])
    ratings = read_ratings(tmp_path)
    assert matches(ratings) == [("a_b", "c-d", 1.0)] and ratings.judge == ["gpt-4"]


def test_ids_of_answers_overrule_the_name_of_a_file(tmp_path):
    """The answer "c" is in both files: it is ChatGPT's, so the second file is reversed."""
    plain = {"question_id": 1, "answer1_id": "b", "answer2_id": "c", "score": [9, 0]}
    write(tmp_path / RELATIVE.format("bard", "gpt-3.5"), [plain])
    reverse = {"question_id": 1, "answer1_id": "g", "answer2_id": "c", "score": [7, 8.5]}
    write(tmp_path / RELATIVE.format("gpt-3.5", GUANACO), [reverse])
    ratings = read_ratings(tmp_path)
    assert matches(ratings) == [("Bard", "ChatGPT", 1.0), ("Guanaco 7B", "ChatGPT", 0.0)]
    assert ratings.points.tolist() == [[9.0, 0.0], [7.0, 8.5]]


def test_verdicts_of_an_arena(tmp_path):
    records = [arena("x", "y", "model_b"), arena("y", "x", "tie (bothbad)"), arena("x", "y", None)]
    ratings = read_ratings(write(tmp_path / "votes.jsonl", records))
    assert matches(ratings) == [("x", "y", 0.0), ("y", "x", 0.5)]
    assert (ratings.unparsed, ratings.judge[0], ratings.question[0]) == (1, "human", "1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("votes.jsonl", '{"score": 1}\n', "votes.jsonl, line 1: not a verdict; need records with"),
        ("votes.jsonl", '\n{"winner": "tie"}\n', "line 2: not a verdict"),
        ("votes.jsonl", "[1]\n", "not a verdict"),
        ("votes.jsonl", "{\n", "not JSON Lines"),
        ("votes.jsonl", "", "0 records, none with a verdict"),
        (PAIRWISE.format("a", "b"), '{"score": 4}\n', "not a verdict"),
        (PAIRWISE.format("a", "b"), '{"score": 1, "answer1_id": [1]}\n', "not a verdict"),
        (PAIRWISE.format("a", "a"), '{"score": 1}\n', "a is compared with itself"),
        ("votes.txt", "", "holds no .jsonl files"),
    ],
)
def test_what_is_no_verdict_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_ratings(tmp_path)
    assert message in str(error.value)


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/evaluate.py", "--suite=elo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_one_command_makes_the_report(tmp_path):
    winners = ["model_a", "model_b", "tie", "model_a"]
    pairs = [
        ("tiny 7B", "big 70B"),
        ("big 70B", "tiny 7B"),
        ("<b>|", "tiny 7B"),
        ("big 70B", "<b>|"),
    ]
    records = [
        arena(a, b, winners[(question + i) % 4], judge, question)
        for judge in ("human", "machine")
        for question in range(12)
        for i, (a, b) in enumerate(pairs)
        if judge == "human" or "<b>|" not in (a, b)
    ]
    votes = write(tmp_path / "votes.jsonl", records)
    done = run_script(f"--ratings={votes}", f"--out={tmp_path}/report", "--orderings=50")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "report"
    plots = {"elo.png", "head_to_head.png", "size.png"}
    assert {path.name for path in out.iterdir()} == plots | {"report.md", "report.html", "elo.json"}
    results = json.loads((out / "elo.json").read_text())
    assert results["settings"]["matches"] == len(records)
    assert results["settings"]["orderings"] == 50
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<b>|" not in page and "&lt;b&gt;|" in page and "<b>\\|" in markdown
    assert page.count("data:image/png;base64,") == 3
    assert all(f"]({plot})" in markdown for plot in plots)
    rated = results["ratings"]["tiny 7B"]
    assert f"| tiny 7B | 60 | {rated['elo']:.0f} | {rated['elo_mean_interval']:.1f} |" in markdown
    by_judge = markdown.split("## By judge")[1].split("##")[0]
    assert "| system | human | machine |" in by_judge
    assert next(line for line in by_judge.splitlines() if "<b>" in line).endswith("| – |")


def test_sizes_are_in_names_or_given(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(elo_report, "_draw_sizes", lambda *arguments: drawn.append(arguments[-1]))
    pairs = [("tiny-135M", "7b-guanaco"), ("7b-guanaco", "mine"), ("mine", "tiny-135M")]
    records = [arena(*pair, "model_a", question=i) for i, pair in enumerate(pairs)]
    ratings = read_ratings(write(tmp_path / "votes.jsonl", records))
    names = {name: i for i, name in enumerate(ratings.systems)}
    for given, expected in [({}, {}), ({"mine": 2.5}, {"mine": 2.5}), ({"tiny-135M": 1}, {})]:
        elo_report.write(ratings, tmp_path / "out", orderings=2, sizes=given)
        expected = {"tiny-135M": 0.135, "7b-guanaco": 7.0} | expected | given
        assert drawn.pop() == {names[name]: pytest.approx(size) for name, size in expected.items()}
    for given, message in [({"x": 1}, "a size of 'x'"), ({"mine": "7B"}, "got '7B'")]:
        with pytest.raises(UserError, match=message):
            elo_report.write(ratings, tmp_path / "other", sizes=given)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratings=nowhere", "--out=x"], "nowhere does not exist"),
        (["--ratings=tests", "--orderings=1", "--out=x"], "--orderings"),
        (["--ratings=tests"], "--out is needed"),
    ],
)
def test_a_mistake_is_explained_and_exits_2(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "x").exists()
