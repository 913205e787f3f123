"""MMLU: files of all kinds, prompts, and the letters of the real SmolLM2 against transformers."""

import hashlib
import itertools
import json
import pathlib

import numpy as np
import pytest
from llama_models import GOLDEN, smollm2, smollm2_path

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError
from qlora_jax.evaluation import mmlu
from qlora_jax.evaluation.mmlu import Answer, Question
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.loading import open_checkpoint

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
needs_questions = pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data/benchmarks")
ONE = Question("anatomy", "Which, and why?", ("w", "x, y", 'z "q"', "4"), 2)
TEXT = 'Which, and why?\nA. w\nB. x, y\nC. z "q"\nD. 4\nAnswer:'
HEADER = "The following are multiple choice questions (with answers) about  anatomy.\n\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("anatomy_test.csv", '"Which, and why?",w,"x, y","z ""q""",4,C\n'),
        (
            "anatomy_dev.csv",
            "question,choice0,choice1,choice2,choice3,answer\n"
            '"Which, and why?",w,"x, y","z ""q""",4,2\n',
        ),
        ("x.jsonl", json.dumps({"subject": "anatomy", "input": HEADER + TEXT, "output": "C"})),
        (
            "x.json",
            json.dumps(
                [
                    {
                        "question": ONE.text,
                        "subject": "anatomy",
                        "choices": list(ONE.choices),
                        "answer": 2,
                    }
                ]
            ),
        ),
    ],
)
def test_questions_of_every_kind_of_file_are_the_same(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert mmlu.read_questions(tmp_path / name) == [ONE]
    assert str(ONE) == TEXT


def test_questions_of_parquet_are_read_as_the_hub_has_them(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = {"question": arrow.string(), "subject": arrow.string()}
    kinds |= {"choices": arrow.list_(arrow.string()), "answer": arrow.int64()}
    rows = {"question": [ONE.text], "subject": ["anatomy"], "choices": [ONE.choices], "answer": [2]}
    table = arrow.table(rows, schema=arrow.schema(list(kinds.items())))
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert mmlu.read_questions(tmp_path) == [ONE]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("anatomy_test.csv", "Which?,w,x,y,C\n"),
        ("anatomy_test.csv", "Which?,w,x,y,z,E\n"),
        ("x.jsonl", '{"prompt": "a", "completion": "b"}'),
        ("x.jsonl", '{"question": "Which?", "choices": ["a", "b"], "answer": 1}'),
        ("x.jsonl", "not JSON"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}:1 is no question"):
        mmlu.read_questions(tmp_path / name)


class Words:
    """A tokenizer whose tokens are words."""

    add_bos_token, bos_token_id = True, -1

    def encode(self, text: str) -> list[str]:
        return text.replace("\n", " \n ").split(" ")


def test_a_long_prompt_loses_shots_and_never_the_question():
    whole = len(Words().encode(mmlu.prompt_text(ONE, [ONE] * 3))) + 1
    for max_len, shots in [(whole, 3), (whole - 1, 2), (40, 0)]:
        ((prompt,),) = mmlu.write_prompts(Words(), [ONE], [ONE] * 9, shots=3, max_len=max_len)
        assert (prompt.shots, prompt.answer) == (shots, 2)
        assert len(prompt.ids) <= max_len
        assert prompt.ids[0] == -1 and prompt.ids[-1] == "Answer:"
    with pytest.raises(DataError, match="without any solved one"):
        list(mmlu.write_prompts(Words(), [ONE], [ONE], shots=1, max_len=20))


def keys(*args, **options) -> list[list[str]]:
    groups = mmlu.write_prompts(Words(), *args, max_len=10_000, **options)
    return [[prompt.key for prompt in group] for group in groups]


def test_what_is_done_is_not_asked_again_and_a_subject_without_shots_is_named():
    other = Question("virology", *list(vars(ONE).values())[1:])
    questions = [ONE, other, ONE]
    assert keys(questions, shots=0) == [["anatomy:0", "anatomy:1", "virology:0"]]
    assert keys(questions, [other, ONE], shots=1) == [["anatomy:0", "anatomy:1"], ["virology:0"]]
    assert keys(questions, shots=0, done=["anatomy:0", "virology:0"]) == [["anatomy:1"]]
    with pytest.raises(DataError, match="no solved questions for virology"):
        keys(questions, [ONE], shots=1)


def test_averages_and_their_errors():
    def answer(key: str, right: bool) -> Answer:
        return Answer(key, (0.0, -1.0, -1.0, -1.0), 0 if right else 3, 5)

    rights = [("a", True), ("a", True), ("a", False), ("a", False), ("b", True), ("b", True)]
    found = mmlu.summarize([answer(f"{s}:{i}", r) for i, (s, r) in enumerate(rights)])
    assert {name: round(one.value, 4) for name, one in found.items()} == {
        "a": 0.5,
        "b": 1.0,
        "micro": 0.6667,
        "macro": 0.75,
    }
    # The error of a mean: the sample's deviation over the root of its size.
    deviation = np.std([right for _, right in rights], ddof=1)
    assert found["micro"].error == pytest.approx(deviation / 6**0.5)
    assert found["macro"].error == pytest.approx((0.5 * 0.5 / 3) ** 0.5 / 2)


@needs_questions
def test_all_questions_of_the_real_files_are_read():
    questions = mmlu.read_questions(SHARED / "zero_shot_mmlu_val.json")
    dev = mmlu.read_questions(SHARED / "mmlu_dev")
    assert (len(questions), len(dev)) == (1531, 285)
    assert len({q.subject for q in questions}) == 57 == len({q.subject for q in dev})
    lines = (SHARED / "zero_shot_mmlu_val.json").read_text().splitlines()
    for question, line in zip(questions, lines, strict=True):
        assert mmlu.prompt_text(question, []) == json.loads(line)["input"]


@needs_questions
@pytest.mark.parametrize("shots", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_the_letters_of_smollm2_are_those_of_transformers(shots):
    golden = json.loads((GOLDEN / "mmlu.json").read_text())
    questions = mmlu.read_questions(SHARED / "zero_shot_mmlu_val.json")
    dev = mmlu.read_questions(SHARED / "mmlu_dev")
    first = {q.subject: q for q in reversed(questions)}
    assert len(golden) == 57
    for subject, row in golden.items():
        shown = [q for q in dev if q.subject == subject]
        prompt = mmlu.prompt_text(first[subject], shown)
        assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == row["prompt"], subject
    if not shots:
        # The shortest third, which is enough for every change of the arithmetic to show.
        golden = dict(sorted(golden.items(), key=lambda item: item[1]["tokens"])[:19])
    tokenizer = Tokenizer.from_gguf(open_checkpoint(smollm2_path()).config)
    # Behind solved questions another one of the subject makes that they are read once for both.
    groups = mmlu.by_subject(questions)
    asked = [q for subject in golden for q in groups[subject][: 2 if shots else 1]]
    groups = mmlu.write_prompts(tokenizer, asked, dev, shots=shots, max_len=2048)
    scorer, letters = Scorer(smollm2()), mmlu.letter_ids(tokenizer)
    for answer in itertools.chain(*(mmlu.ask(scorer, letters, group) for group in groups)):
        row = golden[answer.subject]
        if not answer.key.endswith(":0"):
            continue
        if row["tokens"] > 2048:  # these lost a shot here, and their beginning there
            assert shots == 0 or answer.shots < 5
            continue
        wanted = row[f"shots{shots}"]
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-3, err_msg=answer.key)
