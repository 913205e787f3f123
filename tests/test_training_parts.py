"""The parts of a run that need no compiled step: loop, interrupts, work directory, data, card."""

import io
import json
import math
import os
import pathlib
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from qlora_jax import config as config_lib
from qlora_jax.data.batches import BatchIterator
from qlora_jax.data.masking import Example
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError, TrainingError
from qlora_jax.report import ModelSize, Report, measure
from qlora_jax.training.bad_steps import BadSteps
from qlora_jax.training.card import CardFacts, model_card
from qlora_jax.training.data import load_training_data, question_text
from qlora_jax.training.interrupts import InterruptWatch
from qlora_jax.training.loop import Hooks, Intervals, run_steps
from qlora_jax.training.step import TrainState
from qlora_jax.training.workdir import Workdir


class Recorder:
    """Hooks that remember what they were called with, and a step that does nothing."""

    def __init__(self, bad_step=None, bad_grad=None, interrupt_at=None, workdir=None):
        self.workdir = workdir or pathlib.Path("/nowhere")  # nothing is written without a bad step
        self.saved, self.rows, self.positions, self.evaluated = [], [], {}, []
        self.bad_step, self.bad_grad, self.interrupt_at = bad_step, bad_grad, interrupt_at
        examples = [
            Example(np.arange(1, 5), np.array([0, 1, 1, 1]), f"a.jsonl:{i}") for i in range(8)
        ]
        self.batches = BatchIterator(examples, batch_size=1, seq_len=4, grad_accum=2, seed=0)

    def step_fn(self, state, frozen, arrays):
        step = int(state.step) + 1
        nats = np.array([2.0, math.nan if step == self.bad_step else 4.0], np.float32)
        metrics = {
            "loss": nats.sum() / 6,
            "grad_norm": np.float32(math.inf if step == self.bad_grad else 0.5),
            "loss_tokens": np.int32(6),
            "tokens": np.int32(8),
            "microbatch_nats": nats,
            "skipped": np.bool_(step in (self.bad_step, self.bad_grad)),
        }
        if step == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return TrainState(step, {}, (), None), metrics

    def save(self, step, state, position, loss):
        self.saved.append(step)
        self.positions[step] = position

    def evaluate(self, state):
        self.evaluated.append(int(state.step))
        return {"heldout_loss": 1.5, "mmlu_accuracy": 0.25}

    def run(self, start=0, total=6, log=2, save=4, evaluate=0):
        text = io.StringIO()
        report = Report(Console(file=text))
        try:
            run_steps(
                self.step_fn,
                TrainState(start, {}, (), None),
                None,
                self.batches,
                total=total,
                schedule=lambda step: 0.1 * step,
                intervals=Intervals(log, save, evaluate),
                hooks=Hooks(self.save, self.evaluate, lambda step, row: self.rows.append(row)),
                report=report,
                bad_steps=BadSteps(self.workdir, most_skipped=0, report=report),
            )
        finally:
            self.text = text.getvalue()


def test_the_loop_logs_saves_and_evaluates_when_it_should():
    loop = Recorder()
    loop.run(total=7, log=3, save=4, evaluate=2)
    assert [line.split()[1] for line in loop.text.splitlines()] == ["1/7", "3/7", "6/7", "7/7"]
    assert loop.saved == [4, 7]
    assert loop.evaluated == [2, 4, 6]
    assert [row.get("heldout_loss") for row in loop.rows] == [None, 1.5] * 3 + [None]
    assert [row["learning_rate"] for row in loop.rows] == pytest.approx([0.1 * i for i in range(7)])
    assert "loss 1.0000" in loop.text and "held-out loss 1.5000  MMLU 25.00%" in loop.text


def test_the_saved_position_is_that_of_the_step_and_not_of_the_batch_fetched_ahead():
    loop = Recorder()
    loop.run(total=4, save=2)
    fresh = Recorder().batches
    for _ in range(2):
        next(fresh)
    assert loop.positions[2] == fresh.state()


def test_a_bad_loss_names_the_records_of_its_microbatch(tmp_path):
    loop = Recorder(bad_step=3, workdir=tmp_path)
    fresh = Recorder().batches
    expected = [next(fresh) for _ in range(3)][2].record_ids
    with pytest.raises(TrainingError, match="step 3: the loss is not a finite number") as error:
        loop.run(save=1)
    assert expected[1][0] in str(error.value) and expected[0][0] not in str(error.value)
    assert loop.saved == [1, 2] and len(loop.rows) == 2


def test_a_bad_gradient_names_all_records_of_the_step(tmp_path):
    loop = Recorder(bad_grad=1, workdir=tmp_path)
    first = next(Recorder().batches).record_ids
    with pytest.raises(TrainingError, match="step 1: the gradient is not .*gradient norm inf") as e:
        loop.run()
    assert all(ids[0] in str(e.value) for ids in first)
    assert not loop.saved


def test_an_interrupt_waits_for_the_step_and_saves_it():
    loop = Recorder(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        loop.run(save=100)
    assert loop.saved == [3]
    assert "stopped after step 3 of 6" in loop.text and "continues" in loop.text
    last = Recorder(interrupt_at=6)
    with pytest.raises(KeyboardInterrupt):  # what would come after training does not come
        last.run(save=100)
    assert last.saved == [6]


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), InterruptWatch():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_an_interrupt_and_other_threads_are_left_alone():
    with InterruptWatch() as watch:
        signal.raise_signal(signal.SIGTERM)
        assert watch.requested
    seen = []

    def elsewhere():
        with InterruptWatch() as watch:
            seen.append(watch.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_workdir_writes_files_whole_and_readable(tmp_path):
    workdir = Workdir(tmp_path / "deep" / "run")
    workdir.write_text("README.md", "new «text»")
    workdir.write_text("README.md", "newer")
    assert (workdir / "README.md").read_text() == "newer"
    assert [path.name for path in workdir.path.iterdir()] == ["README.md"]
    assert (workdir / "README.md").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"steps": 3')
    with pytest.raises(TrainingError, match="result.json is no JSON"):
        Workdir(tmp_path).read_json("result.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TrainingError, match="permission denied"):
        Workdir(tmp_path / "run")


def test_which_fields_may_change_between_two_parts_of_a_run(tmp_path):
    config = config_lib.get_config()
    workdir = Workdir(tmp_path)
    workdir.check_config(config.to_dict())  # nothing there: nothing to compare
    workdir.write_text("config.json", config_lib.to_json(config))
    config.train.steps, config.train.log_every, config.eval.every = 9, 1, 3
    config.sample.enabled, config.checkpoint.keep, config.data.path = False, 9, "elsewhere"
    config.model.remat = "none"
    workdir.check_config(config.to_dict())
    config.data.max_len, config.model.quant_type = 8, "fp4"
    with pytest.raises(ConfigError) as error:
        workdir.check_config(config.to_dict())
    assert "data.max_len: was 512, is 8" in str(error.value)
    assert "model.quant_type: was 'nf4', is 'fp4'" in str(error.value)
    assert "steps" not in str(error.value)


def test_a_field_that_a_run_of_an_older_version_lacks_had_the_bases_value(tmp_path):
    old, config = config_lib.get_config().to_dict(), config_lib.get_config()
    del old["lora"]["use_rslora"]
    workdir = Workdir(tmp_path)
    workdir.write_json("config.json", old)
    workdir.check_config(config.to_dict())
    config.lora.use_rslora = True
    with pytest.raises(ConfigError, match="lora.use_rslora: was False, is True"):
        workdir.check_config(config.to_dict())


@pytest.fixture
def small(tmp_path):
    model = tiny_run.write_model(tmp_path / "model")
    config = tiny_run.tiny_config(model, tiny_run.write_data(tmp_path / "sums.jsonl"))
    return config, Tokenizer.from_file(model)


def test_data_is_split_by_record_and_the_question_is_held_out(small):
    config, tokenizer = small
    data = load_training_data(config, tokenizer)
    trained, heldout = ({e.record_id for e in part} for part in (data.train, data.heldout))
    assert len(trained) == 22 and len(heldout) == 2 and not trained & heldout
    asked = question_text(data.question)
    lines = pathlib.Path(config.data.path).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if json.loads(line)["prompt"] == asked]
    assert any(f"sums.jsonl:{i}" in heldout for i in found)


def test_a_held_out_file_of_its_own(small, tmp_path):
    config, tokenizer = small
    before = load_training_data(config, tokenizer)
    config.data.eval_path = str(tiny_run.write_data(tmp_path / "other.jsonl", records=5))
    data = load_training_data(config, tokenizer)
    assert len(data.train) == 24 and len(data.heldout) == 5
    assert data.fingerprint.startswith(before.fingerprint + "+")


def test_data_that_leaves_nothing_is_refused(small):
    config, tokenizer = small
    config.data.max_len = 8
    with pytest.raises(DataError, match="sums.jsonl"):
        load_training_data(config, tokenizer)


def test_text_is_asked_by_its_beginning(small, tmp_path):
    config, tokenizer = small
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "one two " * 20}) + "\n" for _ in range(4)))
    config.data.path, config.data.train_on = str(path), "all"
    assert load_training_data(config, tokenizer).question == "one two " * 7 + "one two"


def test_a_question_with_more_than_one_turn_shows_who_speaks():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert question_text(turns) == "[system] Be brief.\n[user] 2 + 2?"


def test_measure_counts_no_random_streams():
    frozen = {"w": jnp.ones((3, 2)), "count": jnp.zeros((), jnp.uint32)}
    size = measure({"lora_a": jnp.ones(4, jnp.bfloat16)}, frozen)
    assert size == ModelSize(4, 8, 0, 0, 6, 24)
    assert size.bits_per_frozen == 32


def test_the_report_is_plain_in_a_file_and_coloured_in_a_terminal(small):
    config, tokenizer = small
    example = load_training_data(config, tokenizer).train[0]
    plain, coloured = io.StringIO(), io.StringIO()
    Report(Console(file=plain)).sample(example, tokenizer)
    terminal = Console(file=coloured, force_terminal=True, color_system="truecolor")
    Report(terminal).sample(example, tokenizer)
    assert "\x1b" not in plain.getvalue() and "«" in plain.getvalue()
    assert "\x1b[1;32m" in coloured.getvalue() and "«" not in coloured.getvalue()


def test_long_lines_and_markup_are_printed_as_they_are():
    text = io.StringIO()
    report = Report(Console(file=text, width=40))
    report.facts("Title", [("path", "a/[bold]/" + "x" * 80)])
    report.answers("q [red]", "", "\x1b[31mred")
    assert "a/[bold]/" + "x" * 80 + "\n" in text.getvalue()
    assert "q [red]" in text.getvalue() and "(nothing)" in text.getvalue()
    assert "\x1b" not in text.getvalue()


def test_waiting_is_announced_before_it_begins_and_ends_its_line_on_an_error():
    text = io.StringIO()
    report = Report(Console(file=text))
    with report.busy("compiling (once)") as notes:
        assert text.getvalue() == "compiling (once) … "
        notes.append("a step needs 1 GiB")
    assert text.getvalue().endswith(" s, a step needs 1 GiB\n")
    with pytest.raises(ValueError), report.busy("thinking"):
        raise ValueError
    assert text.getvalue().endswith("thinking … \n")


def test_the_card_leaves_out_what_was_not_measured(tmp_path):
    facts = dict(
        workdir=tmp_path,
        config=config_lib.get_config().to_dict(),
        size=ModelSize(10, 40, 100, 52, 8, 32),
        base_fingerprint="b" * 32,
        data_fingerprint="d" * 32,
        records=(9, 1),
        compute_dtype="bfloat16",
        steps=3,
    )
    card = model_card(
        CardFacts(**facts, train_loss=1.5, heldout=(3.0, 2.0), answers=("q", "a\nb", "c"))
    )
    for part in ("b" * 32, "d" * 32, "3.0000", "2.0000", "> a\n> b", "bfloat16", "rank 64"):
        assert part in card
    card = model_card(CardFacts(**facts, train_loss=None, heldout=None, answers=None))
    assert "held out, before" not in card and "held-out question" not in card
    assert "loss.png" not in card
