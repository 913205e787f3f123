import json
import pathlib

import pytest

from qlora_jax.evaluation import parse_relative, parse_threeclass

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "evaluation.md"
RATINGS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "qlora_eval"
needs_ratings = pytest.mark.skipif(not RATINGS.is_dir(), reason="needs shared/data/qlora_eval")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Both are good.\n\n1", 1),
        ("2", 2),
        ("Equal.\r\n3 \n\n", 3),
        ("I choose 3.", None),
        ("Answer 1 is better.\n**1**", None),
        ("1\nbecause it is better", None),
        ("4", None),
        ("12", None),
        ("²", None),
        ("error", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_alone_or_unparsed(text, verdict):
    assert parse_threeclass(text) == verdict


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("9 8.5\nThe first is more detailed.", (9.0, 8.5)),
        ("10 1", (10.0, 1.0)),
        ("First, I solve it.\n\n(10, 9)", (10.0, 9.0)),
        ("The points are (10, 4) and (3, -7).\nAssistant 2 performed better.", None),
        ("Output: (10, 9)", None),
        ("9, 8", None),
        ("9 8 7", None),
        ("9/10 8/10", None),
        ("0 9", None),
        ("11 9", None),
        ("10.5 9", None),
        ("-1 9", None),
        ("nan 9", None),
        ("", None),
    ],
)
def test_two_scores_have_a_line_of_their_own_or_are_unparsed(text, points):
    assert parse_relative(text) == points


@needs_ratings
def test_all_stored_verdicts_are_read_as_they_are_stored():
    records = _records("vicuna_pairwise")
    assert len(records) == 4480
    differ = [r for _, r in records if (parse_threeclass(r["text"]) or -1) != r["score"]]
    assert not differ
    assert sum(r["score"] == -1 for _, r in records) == 13


@needs_ratings
def test_stored_scores_differ_only_where_they_were_written_by_hand():
    """The prompt for mathematics asks for a tuple somewhere; its three questions were mended."""
    records = _records("relative_subset")
    assert len(records) == 960
    by_hand, dropped = [], []
    for name, record in records:
        stored = tuple(record["score"])
        parsed = parse_relative(record["text"])
        if parsed is None and stored != (-1, -1):
            by_hand.append((name, record["question_id"], stored))
        elif parsed is not None and stored != parsed:
            dropped.append((name, record["question_id"], stored, parsed))
    assert len(by_hand) == 28 and sorted(by_hand) == sorted(_listed())
    assert dropped == [
        ("gpt-3.5-vs-gpt4-gpt4-reviewer.jsonl", 68, (-1, -1), (8.0, 10.0)),
        ("gpt-3.5-vs-gpt4-gpt4-reviewer.jsonl", 70, (-1, -1), (10.0, 10.0)),
        ("gpt4-vs-gpt-3.5-gpt4-reviewer.jsonl", 68, (-1, -1), (10.0, 9.0)),
        ("gpt4-vs-gpt-3.5-gpt4-reviewer.jsonl", 70, (-1, -1), (10.0, 10.0)),
    ]


def _listed() -> list[tuple[str, int, tuple[float, float]]]:
    """What docs/evaluation.md lists as written by hand: file, question, scores."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text().splitlines()]
    found = []
    for name, *cells in (row for row in rows if len(row) == 4 and "-vs-" in row[0]):
        for question, cell in zip((68, 69, 70), cells, strict=True):
            if cell.strip() != "(read)":
                file = name.strip("`").replace("…", "vicuna-generations-topp0.9-temp0.7")
                scores = tuple(float(score) for score in cell.split(","))
                found.append((f"{file}-gpt4-reviewer.jsonl", question, scores))
    return found


def _records(folder: str) -> list[tuple[str, dict]]:
    files = sorted((RATINGS / folder).glob("*.jsonl"))
    return [(file.name, json.loads(line)) for file in files for line in file.open()]
