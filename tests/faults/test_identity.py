"""A run that is continued on something else than it began with."""

import json
import pathlib

import pytest
import tiny_run
from catalogue import attempt, fault

from qlora_jax import training
from qlora_jax.checkpoint import Checkpointer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_each_program_once")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, compile_each_program_once):
    """A run after two of four steps: its folder, and how it is continued."""
    folder = tmp_path_factory.mktemp("begun")
    config = tiny_run.tiny_config(
        tiny_run.write_model(folder / "model"), tiny_run.write_data(folder / "sums.jsonl")
    )
    config.data.eval_fraction, config.train.steps = 0.0, 2

    def go_on():
        def main():
            report, text = tiny_run.quiet_report()
            try:
                training.train(config, folder / "run", report=report)
            finally:
                print(text.getvalue())

        outcome = attempt(main)
        assert Checkpointer(folder / "run" / "checkpoints").steps() == [2]
        return outcome

    assert go_on().code == 0
    config.train.steps = 4
    return folder, go_on


@pytest.fixture
def changed(begun):
    """Changes a file until the test is over."""
    before = {}

    def change(name, edit):
        path = begun[0] / name
        before[path] = path.read_bytes()
        path.write_text(edit(path.read_text()))

    yield change
    for path, content in before.items():
        path.write_bytes(content)


@fault(
    "The data is not what the run began with: one word of one record was changed",
    exit=2,
    says=("error: ", "was trained with other content than", "sums.jsonl has now"),
    holds="The run is as it was; with the old file it goes on",
)
def test_other_data(seen, begun, changed):
    changed("sums.jsonl", lambda text: text.replace("two", "three", 1))
    seen(begun[1]())


@fault(
    "The tokenizer is another one: two words have changed places",
    exit=2,
    says=("error: ", "was trained with other content than", "has now"),
    holds="The run is as it was",
)
def test_another_tokenizer(seen, begun, changed):
    def swap(text):
        said = json.loads(text)
        vocabulary = said["model"]["vocab"]
        vocabulary["seven"], vocabulary["eight"] = vocabulary["eight"], vocabulary["seven"]
        return json.dumps(said)

    changed("model/tokenizer.json", swap)  # no record has these words
    seen(begun[1]())


@fault(
    "The chat template is another one, if only by a comment",
    exit=2,
    says=("error: ", "was trained with other content than", "has now"),
    holds="The run is as it was",
)
def test_another_template(seen, begun, changed):
    def edit(text):
        said = json.loads(text)
        said["chat_template"] += "{# the same conversations, written the same #}"
        return json.dumps(said)

    changed("model/tokenizer_config.json", edit)
    seen(begun[1]())


@fault(
    "Another base lies where the run's base was; it is continued, or its adapter is asked for",
    exit=2,
    says=("error: ", "was trained with other content than", "model has now"),
    holds="No adapter is put on a base that it was not trained on; the run is as it was",
)
def test_another_base(seen, begun):
    folder, go_on = begun
    path = pathlib.Path(folder / "model" / "model.safetensors")
    content = path.read_bytes()
    try:
        tiny_run.write_model(folder / "model", seed=1)
        seen(go_on())
        seen(attempt(lambda: training.load_trained(folder / "run")))
    finally:
        path.write_bytes(content)
