"""The chain-of-thought questions: the real file, and files that are not quite like it."""

import collections
import importlib.util
import json
import re

import pytest

from qlora_jax.data.records import load_records
from qlora_jax.errors import DataError

FILE = "package:lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
HEAD = "The following are multiple choice questions (with answers) about anatomy.\n\n"
GOOD = "Q: Which?\n(A) x (B) y\nA: Let's think step by step. It is y. The answer is (B).\n\n"


@pytest.fixture(scope="module")
def records():
    return load_records(FILE)


@needs_lm_eval
def test_every_question_of_the_real_file_is_read(records):
    subjects = collections.Counter(record.record_id.split(":")[1] for record in records)
    assert len(records) == 282 and len(subjects) == 57
    assert {s: n for s, n in subjects.items() if n != 5} == {
        "college_chemistry": 4,
        "formal_logic": 4,
        "human_aging": 4,
    }
    options = collections.Counter(
        sum(line.startswith(f"({letter}) ") for line in lines for letter in "ABCDE")
        for lines in (record.messages[0]["content"].splitlines() for record in records)
    )
    assert options == {4: 281, 5: 1}
    for record in records:
        question, answer = (message["content"] for message in record.messages)
        assert question.startswith("The following is a multiple choice question about ")
        assert answer.startswith("Let's think step by step. ")
        assert re.search(r"The answer is \([A-E]\)\.$", answer)
        assert "\nQ:" not in answer and "\nA:" not in question


@needs_lm_eval
def test_a_question_with_options_on_several_lines(records):
    (record,) = (r for r in records if r.record_id.endswith(":college_computer_science:1"))
    assert record.messages[0]["content"] == (
        "The following is a multiple choice question about college computer science.\n\n"
        "Which of the following regular expressions is equivalent to (describes the same set of "
        "strings as) (a* + b)*(c + d)?\n"
        "(A) a*(c + d)+ b(c + d)\n(B) a*(c + d)* + b(c + d)*\n"
        "(C) a*(c + d)+ b*(c + d)\n(D) (a + b)*c +(a + b)*d"
    )


def write(tmp_path, document):
    path = tmp_path / "questions.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_the_format_is_recognised(tmp_path, indent):
    path = write(tmp_path, json.dumps({"high_school_anatomy": HEAD + GOOD * 2}, indent=indent))
    records = load_records(path)
    assert [r.record_id for r in records] == [
        "questions.json:high_school_anatomy:1",
        "questions.json:high_school_anatomy:2",
    ]
    assert records[0].messages == (
        {
            "role": "user",
            "content": "The following is a multiple choice question about high school anatomy.\n\n"
            "Which?\n(A) x\n(B) y",
        },
        {
            "role": "assistant",
            "content": "Let's think step by step. It is y. The answer is (B).",
        },
    )


@pytest.mark.parametrize(
    "body, message",
    [
        ("Q: Which?\n(A) x (B) y\n", "A: found no line that starts with 'A:', need a question"),
        ("Q: Which?\nA: The answer is (A).", "Q: found 0 options"),
        ("Q: Which?\n(A) x (B) y\nA: It is y.", "A: found an answer that ends with 'It is y.'"),
        (
            "Q: Which?\n(A) x (B) y\nA: The answer is (C).",
            r"need 'The answer is \(X\).' with X in AB",
        ),
        ("Q: \n(A) x (B) y\nA: The answer is (A).", "Q: found empty text, need the question"),
    ],
)
def test_a_bad_question_is_named_and_can_be_skipped(tmp_path, body, message):
    path = write(tmp_path, {"anatomy": HEAD + GOOD + body})
    with pytest.raises(DataError, match=rf"^questions.json:anatomy:2: .*{message}"):
        load_records(path)
    assert len(load_records(path, on_bad_record="skip")) == 1


@pytest.mark.parametrize(
    "document, message",
    [
        ([], "file: found a list, need an object of subjects"),
        ({"anatomy": 3}, "anatomy: found a number, need text with lines"),
        ({"anatomy": HEAD}, "anatomy: found .*need text with lines"),
        ("not json", "json: found broken JSON at line 1, column 1 near 'not json'"),
    ],
)
def test_other_documents_are_refused(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        load_records(write(tmp_path, document), "mmlu_cot")
