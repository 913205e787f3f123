"""Chat benchmarks: what is read as a question or an answer, and a tiny model that answers."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_run
from flax import nnx

from qlora_jax import apply_qlora
from qlora_jax.errors import DataError, EvaluationError
from qlora_jax.evaluation import suites
from qlora_jax.evaluation.chat_answers import PAPER_SAMPLING, converse, run_chat
from qlora_jax.evaluation.questions import Question, read_answers, read_questions
from qlora_jax.generation import Engine, Sampling, generate
from qlora_jax.loading import load_model
from qlora_jax.serving import read_stored

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@needs_shared
@pytest.mark.parametrize(
    ("path", "count", "turns", "history"),
    [
        ("qlora_eval/prompts/vicuna_questions.jsonl", 80, {1}, {0}),
        ("qlora_eval/prompts/oa_questions.jsonl", 953, {1}, {0, 2, 4}),
        ("benchmarks/fastchat/mt_bench_question.jsonl", 80, {2}, {0}),
        ("benchmarks/fastchat/vicuna_bench_question.jsonl", 80, {1}, {0}),
    ],
)
def test_the_papers_questions_are_read_as_they_are(path, count, turns, history):
    questions = read_questions(SHARED / path)
    assert len(questions) == count
    assert {len(one.turns) for one in questions} == turns
    assert {len(one.history) for one in questions} == history
    assert all(one.category for one in questions)
    assert not any("### Human" in turn for one in questions for turn in one.turns)


@needs_shared
def test_the_papers_answers_are_read_with_their_questions():
    folder = SHARED / "qlora_eval"
    questions = read_questions(folder / "prompts" / "vicuna_questions.jsonl")
    for file in sorted((folder / "vicuna_generations").glob("*.jsonl")):
        answers = read_answers(f"x={file}", questions)
        assert [a.question.question_id for a in answers] == [q.question_id for q in questions]
        if "answer_" not in file.name:
            assert read_answers(f"x={file}")[7].question == questions[7]
    with pytest.raises(DataError, match="--data=FILE|not an answer|without its question"):
        # FastChat's "text" is the answer, and must not be taken for the question.
        read_answers(str(folder / "vicuna_generations" / "answer_gpt4.jsonl"))


def test_kinds_of_questions(tmp_path):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    records = [
        {"question_id": 7, "text": "Why?", "category": "generic"},
        {"question": "How?"},
        {"turns": ["one", "two"]},
        {"messages": conversation},
        {"text": "### Human: a ### Assistant: b ### Human: c ### Assistant:"},
        {"text": "What is ### Human: for?"},
    ]
    found = read_questions(write(tmp_path / "q.jsonl", records))
    assert [one.question_id for one in found] == ["7", "2", "3", "4", "5", "6"]
    assert found[0] == Question("7", "Why?", ("Why?",), (), "generic")
    assert found[2].messages(["x"])[1:] == [
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "two"},
    ]
    assert found[3].messages([]) == conversation
    assert found[4].messages([]) == conversation[1:]
    assert found[5].turns == ("What is ### Human: for?",)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": ""}], "q.jsonl:1: not a question"),
        ([{"turns": []}], "not a question"),
        ([{"turns": ["a", 1]}], "not a question"),
        ([{"answer": "x"}], "not a question"),
        (["text"], "q.jsonl:1"),
        ([{"text": "\ud83d"}], "half of a surrogate pair"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "end in the user's turn"),
        ([{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}], "question 1 before"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path, records, message):
    with pytest.raises(DataError) as error:
        read_questions(write(tmp_path / "q.jsonl", records))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a"}], "a.jsonl:1: not an answer"),
        ([{"text": "a", "generation": 3}], "not an answer"),
        ([{"text": "a", "generation": "x", "question_id": [1]}], "a text or a number"),
        ([{"answer_id": "x", "text": "the answer"}], "without its question"),
        ([{"turns": ["a", "b"], "generation": "x"}], "1 replies to the 2 turns"),
        ([{"text": "a", "generation": "x"}] * 2, "a has answered question a before"),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, records, message):
    with pytest.raises(DataError) as error:
        read_answers(write(tmp_path / "a.jsonl", records))
    assert message in str(error.value)


def test_fastchats_answers_need_the_questions(tmp_path):
    questions = [Question("1", "Why?", ("Why?", "Really?"))]
    choices = [{"index": 0, "turns": ["Because.", "Yes."]}]
    record = {"question_id": 1, "answer_id": "x", "model_id": "m", "choices": choices}
    (answer,) = read_answers(write(tmp_path / "a.jsonl", [record]), questions)
    assert (answer.system, answer.replies) == ("m", ("Because.", "Yes."))
    path = write(tmp_path / "b.jsonl", [{**record, "question_id": 2}])
    with pytest.raises(DataError, match="no answer to these questions"):
        read_answers(path, questions)


def test_the_authors_judges_saw_what_was_left_of_an_answer(tmp_path):
    record = {"text": "q", "generation": "a ### Human: b", "generation_truncated": "a"}
    (answer,) = read_answers(write(tmp_path / "a.jsonl", [record]))
    assert answer.replies == ("a",)
    paths = [f"{name}={tmp_path / 'a.jsonl'}" for name in "xy"]
    assert read_stored(paths)[0].answers == {"x": "a", "y": "a"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny_run.write_model(tmp_path_factory.mktemp("model"))
    return folder, *load_model(folder, quant_type=None)


QUESTIONS = [
    {"question_id": 1, "text": "what is the sum of one and two", "category": "math"},
    {"question_id": 2, "turns": ["what is one", "and two"], "category": "generic"},
    {"question_id": 3, "text": "what " * 100},
    {"question_id": 4, "turns": ["what " * 50, "and " * 60]},
    {"question_id": 5, "text": "three and four"},
]


def test_a_following_turn_is_asked_behind_the_models_own_answer(loaded):
    _, model, tokenizer = loaded
    greedy = Sampling()
    engine = Engine(model, tokenizer, slots=3, max_len=96)
    question = Question("1", "", ("what is one", "and two"))
    ((_, replies),) = converse(engine, [question], sampling=greedy, max_new_tokens=6)
    first, second = (reply.text for reply in replies)
    assert generate(model, tokenizer, [question.messages([])], max_new_tokens=6) == [first]
    assert generate(model, tokenizer, [question.messages([first])], max_new_tokens=6) == [second]
    assert engine.cached_tokens > 6  # of the first turn


def test_a_benchmark_goes_on_and_names_what_is_too_long(loaded, tmp_path):
    _, model, tokenizer = loaded
    data = write(tmp_path / "questions.jsonl", QUESTIONS)
    candidate = suites.Candidate(model, tokenizer, "tiny 1M", tmp_path / "out", 96)
    options = {"max_new_tokens": 8, "slots": 3}
    result = run_chat(candidate, data, **options)
    assert (result.answers, result.too_long) == (3, ("3", "4"))
    written = result.path.read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert [one["question_id"] for one in records] == [1, 2, 5]  # numbers, as they were
    assert list(result.cut) == [
        str(one["question_id"]) for one in records if "length" in one["finish_reason"]
    ]
    assert result.tokens >= sum(sum(one["tokens"]) for one in records)
    # The same file for judges, and for the game.
    answers = read_answers(str(result.path))
    assert [len(one.replies) for one in answers] == [1, 2, 1]
    assert {one.system for one in answers} == {"tiny 1M"}
    other = tmp_path / "other.jsonl"
    other.write_text(written.replace("tiny 1M", "other"))
    stored = read_stored([f"mine={result.path}", str(other)])
    assert [one.question_id for one in stored] == ["1", "2", "5"]
    assert all(sorted(one.answers) == ["mine", "other"] for one in stored)
    # Stopped after two questions, and continued in other company.
    journal = tmp_path / "out" / "chat.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))
    result.path.unlink()
    assert run_chat(candidate, data, **options) == result
    assert result.path.read_text() == written
    with pytest.raises(EvaluationError, match="seed: 0 -> 1"):
        run_chat(candidate, data, **options, seed=1)
    figures = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert figures["figures"]["too_long"] == ["3", "4"]
    assert figures["settings"]["top_p"] == PAPER_SAMPLING.top_p == 0.9


@pytest.mark.slow
def test_the_adapter_answers_where_there_is_one(loaded):
    _, model, tokenizer = loaded
    adapted = apply_qlora(model, rank=2, alpha=4, quant_type=None, rngs=nnx.Rngs(0))
    noise = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape, a.dtype),
        nnx.state(adapted, nnx.LoRAParam),
    )
    nnx.update(adapted, noise)
    question, said = Question("1", "", ("what is one",)), []
    for one in (model, adapted):
        engine = Engine(one, tokenizer, slots=1, max_len=96)
        ((_, (reply,)),) = converse(engine, [question], sampling=Sampling(), max_new_tokens=8)
        assert generate(one, tokenizer, [question.messages([])], max_new_tokens=8) == [reply.text]
        said.append(reply.text)
    assert said[0] != said[1]


@pytest.mark.slow
def test_the_script_answers(loaded, tmp_path):
    data = write(tmp_path / "questions.jsonl", QUESTIONS)
    command = [sys.executable, "scripts/evaluate.py", "--suite=chat", f"--out={tmp_path / 'out'}"]
    command += [f"--model={loaded[0]}", f"--data={data}", "--max_len=96", "--max_new_tokens=8"]
    done = subprocess.run(
        command, cwd=tiny_run.REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "3 answers" in done.stdout and "too long for the model: 2 (3, 4)" in done.stdout
