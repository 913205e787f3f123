"""MMLU while a model is trained: a tiny run, its interruptions, and what is refused beforehand."""

import importlib
import json
import shutil
import signal

import pytest
import t5_models
import tiny_run

from qlora_jax import phases, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import UserError
from qlora_jax.evaluation import mmlu
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.metrics import read_metrics
from qlora_jax.training import fitting
from qlora_jax.training import run as run_lib
from qlora_jax.training.building import describe_base
from qlora_jax.training.mmlu import read_training_questions, spread

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
NUMBERS = "one two three four".split()


def write_questions(path, subjects=("sums", "terms"), count=6):
    with path.open("w") as file:
        for subject in subjects:
            for i in range(count):
                row = {
                    "subject": subject,
                    "question": f"what is the sum of one and {NUMBERS[i % 4]}",
                }
                row |= {"choices": NUMBERS, "answer": i % 4}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer knows letters, data, questions and solved questions."""
    folder = tmp_path_factory.mktemp("mmlu")
    model = tiny_run.write_model(folder / "model", max_position_embeddings=256)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate([*"ABCD", ".", "Answer"])}
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_run.write_data(folder / "sums.jsonl")
    write_questions(folder / "questions.jsonl")
    write_questions(folder / "solved.jsonl", count=5)
    return folder


def make_config(folder):
    config = tiny_run.tiny_config(folder / "model", folder / "sums.jsonl")
    config.eval.mmlu, config.eval.mmlu_solved = (
        str(folder / f"{name}.jsonl") for name in ("questions", "solved")
    )
    config.train.steps, config.eval.every, config.checkpoint.every = 4, 2, 2
    config.lora.dropout, config.train.log_every, config.data.max_len = 0.5, 1, 64
    # Less to compile.
    config.lora.where, config.train.grad_accum = ".*/down_proj", 1
    return config


def run(config, workdir, **options):
    report, text = tiny_run.quiet_report()
    return training.train(config, workdir, report=report, **options), text.getvalue()


def measured(workdir):
    rows = read_metrics(workdir)
    return [(row["step"], row["mmlu_accuracy"]) for row in rows if "mmlu_accuracy" in row]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, *run(make_config(folder), workdir)


def test_it_is_measured_before_within_and_after_training(folder, trained):
    workdir, result, text = trained
    accuracies = dict(measured(workdir))
    assert list(accuracies) == [0, 2, 4] and all(0 <= value <= 1 for value in accuracies.values())
    assert (accuracies[0], accuracies[4]) == (result.mmlu_before, result.mmlu_after)
    assert json.loads((workdir / "result.json").read_text())["mmlu_after"] == result.mmlu_after
    assert f"MMLU {accuracies[2]:.2%}" in text
    card = (workdir / "README.md").read_text()
    for where in (text, card):
        assert f"{result.mmlu_after:.2%} ±" in where and f"{result.mmlu_before:.2%}" in where
    assert "behind five solved ones" in card and "12 questions" in card


def test_the_figure_is_that_of_the_trained_model_without_dropout(folder, trained):
    workdir, result, _ = trained
    model, tokenizer = training.load_trained(workdir)
    questions, solved = (
        mmlu.read_questions(folder / f"{name}.jsonl") for name in ("questions", "solved")
    )
    groups = list(mmlu.write_prompts(tokenizer, questions, solved, max_len=256))
    assert [prompt.shots for group in groups for prompt in group] == [5] * 12
    letters = mmlu.letter_ids(tokenizer)
    answers = [a for group in groups for a in mmlu.ask(Scorer(model), letters, group)]
    assert mmlu.summarize(answers)["micro"].value == result.mmlu_after


def test_a_signal_drops_it_saves_the_step_and_the_run_goes_on_as_if_nothing_was(
    folder, trained, tmp_path, monkeypatch
):
    begun = []

    def stop(name):
        begun.extend([name] if name == "evaluating" else [])
        if name == "evaluating" and len(begun) == 4:  # loss and MMLU before, the loss, and now
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(phases, "listeners", [stop])
    with pytest.raises(KeyboardInterrupt):
        run(make_config(folder), tmp_path)
    assert Checkpointer(tmp_path / "checkpoints").steps() == [2]
    assert [step for step, _ in measured(tmp_path)] == [0]
    assert not any(row.get("heldout_loss") for row in read_metrics(tmp_path) if row["step"] == 2)
    result, text = run(make_config(folder), tmp_path)
    assert measured(tmp_path) == measured(trained[0])
    assert (result.mmlu_before, result.mmlu_after) == (
        trained[1].mmlu_before,
        trained[1].mmlu_after,
    )
    assert "are others than when this run began" not in text


def test_other_questions_are_said_and_not_compared(folder, trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    config = make_config(folder)
    config.train.steps, config.eval.mmlu_max_questions = 5, 3
    result, text = run(config, workdir)
    assert "are others than when this run began" in text and "3 questions" in text
    assert result.mmlu_before is None and result.mmlu_after is not None


@pytest.mark.slow
def test_a_run_without_heldout_records_and_with_a_paged_optimizer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("qlora_jax.optim.paged"), "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(fitting, "_LEAST_ROOM", 1)
    config = make_config(folder)
    config.data.eval_fraction, config.lora.rank, config.train.steps = 0.0, 32, 3
    config.lora.where = "all-linear"
    run(config, tmp_path / "plain")
    row = read_metrics(tmp_path / "plain")[1]
    budget = row["step_device_bytes"] - row["optimizer_device_bytes"] // 2
    config.optimizer.device_budget_gb, config.optimizer.check_paging = budget / 1e9, False
    result, text = run(config, tmp_path / "paged")
    assert "of optimizer state, read and written once a step" in text
    assert [step for step, _ in measured(tmp_path / "paged")] == [0, 2, 3]
    assert measured(tmp_path / "paged") == measured(tmp_path / "plain")
    assert result.heldout_after is None and result.mmlu_after is not None


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("no file", "nowhere.jsonl does not exist"),
        ("no question", "questions.jsonl:1 is no question"),
        ("too long", "a question of sums has .* more than the 256"),
        ("no solved ones", "no solved questions for terms"),
        ("no letters", "this tokenizer has none for ' A'"),
        ("encoder-decoder", "MMLU is asked of decoders"),
        ("no questions", "eval.mmlu: got ''"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_base_is_loaded(
    folder, tmp_path, monkeypatch, problem, said
):
    config, path = make_config(folder), tmp_path / "questions.jsonl"
    config.eval.mmlu_solved = ""
    match problem:
        case "no file":
            path = tmp_path / "nowhere.jsonl"
        case "no question":
            path.write_text('{"text": "a"}\n')
        case "too long":
            write_questions(path).write_text(path.read_text().replace("what", "what " * 300))
        case "no solved ones":
            write_questions(path)
            config.eval.mmlu_solved = str(write_questions(tmp_path / "solved.jsonl", ["sums"]))
        case "no letters":
            config.model.path = str(tiny_run.write_model(tmp_path / "model"))
            write_questions(path)
        case "encoder-decoder":
            config.model.path = str(t5_models.write_folder(tmp_path / "t5"))
            write_questions(path)
    config.eval.mmlu = str(path)
    if problem == "no questions":
        config.eval.mmlu, config.eval.mmlu_solved = "", str(path)
    monkeypatch.setattr(run_lib, "build_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.json*"))


def test_questions_are_spread_over_the_subjects(folder):
    questions = mmlu.read_questions(folder / "questions.jsonl")
    config = make_config(folder)
    config.eval.mmlu_max_questions = 5
    chosen = read_training_questions(config, describe_base(config))
    assert len(chosen) == 5
    assert [q.subject for q in spread(questions)][:5] == ["sums", "terms", "sums", "terms", "sums"]
