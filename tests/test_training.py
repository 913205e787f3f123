import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from qlora_jax import hub, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.data.batches import BatchIterator
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import CheckpointError, ConfigError, TrainingError, UserError
from qlora_jax.generation import generate
from qlora_jax.metrics import read_metrics
from qlora_jax.training import building
from qlora_jax.training import run as run_lib
from qlora_jax.training.bad_steps import read_bad_steps
from qlora_jax.training.building import build_model, build_optimizer, split_model
from qlora_jax.training.data import load_training_data
from qlora_jax.training.step import init_state
from qlora_jax.training.stepping import Steps
from qlora_jax.training.workdir import Workdir

pytestmark = pytest.mark.usefixtures("compile_each_program_once")


@pytest.fixture
def config(tmp_path):
    model = tiny_run.write_model(tmp_path / "model")
    return tiny_run.tiny_config(model, tiny_run.write_data(tmp_path / "sums.jsonl"))


def load_tokenizer(config):
    return Tokenizer.from_file(config.model.path)


def run(config, workdir, **options):
    report, text = tiny_run.quiet_report()
    result = training.train(config, workdir, report=report, **options)
    return result, text.getvalue()


def interrupt_at(wanted):
    """Ctrl-C while a step is being done."""

    def on_step(step, row):
        if step == wanted:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def final_state(config, workdir, step):
    model, _, _ = build_model(config, dtype=np.dtype(np.float32))
    _, lora, _ = split_model(model)
    tx, _ = build_optimizer(config, 100)
    return Checkpointer(workdir / "checkpoints").restore(step, init_state(lora, tx, config.seed))


def assert_equal_to_the_bit(a, b):
    leaves_a, tree_a = jax.tree.flatten(dataclasses.replace(a, key=jax.random.key_data(a.key)))
    leaves_b, tree_b = jax.tree.flatten(dataclasses.replace(b, key=jax.random.key_data(b.key)))
    assert tree_a == tree_b and len(leaves_a) > 20
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def one_unit_up(x):
    return jnp.nextafter(x, jnp.inf) if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_a_run_from_beginning_to_end(config, tmp_path):
    config.train.steps, config.eval.every, config.sample.enabled = 20, 10, True
    workdir, rows = tmp_path / "runs" / "a", []
    result, text = run(config, workdir, on_step=lambda step, row: rows.append((step, row["loss"])))

    assert result.steps == 20
    assert result.heldout_after < result.heldout_before - 0.5
    assert result.question.startswith("what is the sum of")
    assert json.loads((workdir / "result.json").read_text()) == dataclasses.asdict(result)
    assert [step for step, _ in rows] == list(range(1, 21))

    # what a newcomer reads, in this order
    expected = ["QLoRA fine-tuning", "frozen", "trainable", "compute", "One training record"]
    expected += ["compiling (once)", "step  1/20", "step  2/20", "step 20/20", "Held-out loss"]
    expected += ["One held-out question", "  before:\n", "  after:\n", f"Written to {workdir}"]
    expected += [f"python scripts/generate.py --workdir={workdir}"]
    positions = [text.index(part) for part in expected]
    assert positions == sorted(positions)
    assert "«it is " in text.replace("«itis", "«it is ")
    assert "\x1b" not in text

    names = {"README.md", "config.json", "metrics.jsonl", "loss.png", "result.json", ".lock"}
    assert names | {"checkpoints", "tensorboard"} == {path.name for path in workdir.iterdir()}
    written = read_metrics(workdir)
    assert [row["loss"] for row in written if "loss" in row] == [loss for _, loss in rows]
    heldout = [(row["step"], row["heldout_loss"]) for row in written if "heldout_loss" in row]
    assert [step for step, _ in heldout] == [0, 10, 20]
    assert heldout[0][1] == result.heldout_before and heldout[-1][1] == result.heldout_after
    card = (workdir / "README.md").read_text()
    for part in (config.model.path, config.data.path, "nf4", f"{result.heldout_after:.4f}", "jax"):
        assert part in card

    model, tokenizer = training.load_trained(workdir)
    question = [{"role": "user", "content": result.question}]
    assert generate(model, tokenizer, [question], max_new_tokens=8) == [result.answer_after]
    modes = [node.deterministic for _, node in nnx.iter_graph(model) if hasattr(node, "lora_a")]
    assert modes and all(modes)
    state, metadata = final_state(config, workdir, 20)
    jax.tree.map(np.testing.assert_array_equal, split_model(model)[1], state.lora)
    assert metadata["base_fingerprint"] in card and metadata["data_fingerprint"] in card

    again, text = run(config, workdir)
    assert again == result and "finished" in text and "compiling" not in text


@pytest.mark.slow
def test_grouped_by_length_a_run_is_continued_to_the_bit(config, tmp_path):
    config.data.packing, config.data.group_by_length = False, True
    config.data.max_len = 64
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    _, text = run(config, straight)
    assert "compiling (once for each of 2 lengths of rows)" in text
    with pytest.raises(KeyboardInterrupt):
        run(config, stopped, on_step=interrupt_at(2))
    result, _ = run(config, stopped)
    states = [final_state(config, folder, result.steps)[0] for folder in (straight, stopped)]
    assert_equal_to_the_bit(*states)


def test_interrupted_and_continued_is_the_same_to_the_bit(config, tmp_path):
    """Dropout, packing and accumulation on; stopped once by Ctrl-C and once by a shorter run."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(config, straight)

    with pytest.raises(KeyboardInterrupt):
        run(config, stopped, on_step=interrupt_at(2))
    assert Checkpointer(stopped / "checkpoints").latest_step() == 2
    assert not (stopped / "result.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    config.train.steps = 4
    result, text = run(config, stopped)
    assert result.steps == 4 and "continuing after step 2 of 4" in text
    config.train.steps = 6
    result, text = run(config, stopped)
    assert result.steps == 6 and "continuing after step 4 of 6" in text

    (a, meta_a), (b, meta_b) = (final_state(config, path, 6) for path in (straight, stopped))
    assert_equal_to_the_bit(a, b)
    with pytest.raises(AssertionError):  # one unit in the last place is seen
        assert_equal_to_the_bit(a, jax.tree.map(one_unit_up, b))
    assert meta_a["batches"] == meta_b["batches"]
    assert meta_a["before"] == meta_b["before"]
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(path) if "loss" in row]
        for path in (straight, stopped)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_run_is_continued_only_as_itself(config, tmp_path):
    workdir = tmp_path / "run"
    config.train.steps = 1
    run(config, workdir)
    config.lora.rank, config.optimizer.learning_rate = 8, 0.5
    with pytest.raises(ConfigError, match=r"(?s)lora.rank: was 4, is 8.*learning_rate: was 0.01"):
        run(config, workdir)
    config.lora.rank, config.optimizer.learning_rate = 4, 1e-2
    # how long, and what is printed and kept, may change
    config.train.steps, config.train.log_every, config.checkpoint.every = 2, 1, 1
    model = pathlib.Path(config.model.path)
    tiny_run.write_model(model, seed=1)
    with pytest.raises(TrainingError, match="other content than .*model has now"):
        run(config, workdir)
    moved = tiny_run.write_model(tmp_path / "moved")
    config.model.path = str(moved)
    tiny_run.write_data(pathlib.Path(config.data.path), records=20)
    with pytest.raises(TrainingError, match="other content than .*sums.jsonl has now"):
        run(config, workdir)
    tiny_run.write_data(pathlib.Path(config.data.path))
    result, _ = run(config, workdir)
    assert result.steps == 2
    tiny_run.write_model(moved, seed=1)
    with pytest.raises(TrainingError, match="other content"):
        training.load_trained(workdir)


def test_a_loss_that_is_not_a_number_stops_the_run(config, tmp_path, monkeypatch):
    def poisoned(self, state, frozen, batch, step_fn=Steps.__call__):
        bad = int(state.step) == 2
        state, metrics = step_fn(self, state, frozen, batch)
        if bad:
            nats = metrics["microbatch_nats"].at[1].set(math.nan)
            bad = {"loss": math.nan, "microbatch_nats": nats, "skipped": jnp.bool_(True)}
            metrics = {**metrics, **bad}
        return state, metrics

    workdir, config.checkpoint.every = tmp_path / "run", 2
    config.train.max_skipped_steps = 0
    monkeypatch.setattr(Steps, "__call__", poisoned)
    with pytest.raises(TrainingError, match=r"step 3: .*loss nan.*sums\.jsonl:\d+, .*") as stop:
        run(config, workdir)
    assert Checkpointer(workdir / "checkpoints").steps() == [2]
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == [1, 2]
    assert not (workdir / "result.json").exists()
    # the records of the bad microbatch, and only those
    batches = BatchIterator(
        load_training_data(config, load_tokenizer(config)).train,
        batch_size=2,
        seq_len=config.data.max_len,
        grad_accum=2,
        seed=config.seed,
    )
    third = [next(batches) for _ in range(3)][2].record_ids
    named = re.search(r"records: (.*?)\. ", str(stop.value))[1].split(", ")
    assert named == third[1] and not set(named) & set(third[0])

    assert [row["step"] for row in read_bad_steps(workdir)] == [3]

    # the newest good checkpoint is where it goes on
    monkeypatch.undo()
    result, text = run(config, workdir)
    assert "continuing after step 2 of 6" in text and result.steps == 6
    assert read_bad_steps(workdir) == []


def test_without_heldout_records(config, tmp_path):
    config.data.eval_fraction, config.train.steps, config.sample.enabled = 0.0, 1, True
    result, text = run(config, tmp_path / "run")
    assert result.heldout_before is result.heldout_after is result.question is None
    assert "Held-out" not in text and math.isfinite(result.train_loss)


def test_steps_come_from_epochs(config, tmp_path):
    config.train.steps, config.train.epochs = 0, 1.0
    result, text = run(config, tmp_path / "run")
    assert 1 <= result.steps <= 6
    assert f"step {result.steps}/{result.steps}" in text


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_loaded(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lib, "build_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/run cannot be written: .*not a directory"):
        run(config, tmp_path / "file" / "run")


def test_a_directory_that_is_trained_in_is_refused_before_anything_is_loaded(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_lib, "build_model", lambda *a, **k: pytest.fail("loaded"))
    code = "import sys; from qlora_jax.training.workdir import Workdir\n"
    code += "with Workdir(sys.argv[1]).lock(): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(
            TrainingError, match=f"another process .process {other.pid} on .*; wait for it, stop it"
        ):
            run(config, tmp_path / "run")
        other.kill()
    with Workdir(tmp_path / "run").lock():
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [(None, "does not exist"), ('{"input": 1}', "sums.jsonl:3"), ("{", "sums.jsonl:3")],
)
def test_what_is_wrong_with_the_data_shows_before_the_base_is_loaded(
    config, tmp_path, monkeypatch, line, said
):
    path = tmp_path / "sums.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line or "", *lines[2:]]))
    config.data.on_bad_record = "error"
    if line is None:
        config.data.path = str(tmp_path / "elsewhere.jsonl")
    monkeypatch.setattr(run_lib, "build_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        run(config, tmp_path / "run")


def test_of_a_name_on_the_hub_the_weights_are_fetched_last(config, tmp_path, monkeypatch):
    folder, kinds = pathlib.Path(config.model.path), []

    def fetch(name, kind, patterns):
        kinds.append(kind)
        return folder

    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.unlink()
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "describe", lambda *_: "a name")
    config.model.path, path = "owner/name", config.data.path
    config.data.path = str(tmp_path / "elsewhere.jsonl")
    with pytest.raises(UserError, match="elsewhere.jsonl does not exist"):
        run(config, tmp_path / "run")
    assert {*kinds} == {"tokenizer"}
    config.data.path, config.train.steps = path, 1
    weights.write_bytes(content)
    run(config, tmp_path / "run")
    assert {*kinds} == {"tokenizer", "model"}


def test_a_disk_without_room_is_refused_before_training(config, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("qlora_jax.training.workdir.shutil.disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="need 16 MiB, and 0 MiB are free"):
        run(config, tmp_path / "run")


def test_a_disk_that_fills_up_ends_in_a_message(config, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lib.MetricsWriter, "write", full)
    with pytest.raises(TrainingError, match="run cannot be written: the disk is full"):
        run(config, tmp_path / "run")


def test_load_trained_says_what_is_missing(config, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        training.load_trained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        training.load_trained(tmp_path)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_compute_dtype_follows_the_device(platform, capability, expected):
    device = type("Device", (), {"platform": platform, "compute_capability": capability})
    assert training.choose_compute_dtype("auto", device)[0].name == expected
    assert training.choose_compute_dtype("float16", device)[0].name == "float16"


def test_a_dtype_that_the_device_has_not_is_refused():
    old = type("Device", (), {"platform": "gpu", "compute_capability": "7.5"})
    with pytest.raises(ConfigError, match="sm_75.*'float16'"):
        building.choose_compute_dtype("bfloat16", old)
    assert building.choose_compute_dtype("float32", old)[0] == "float32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_compute_dtype_on_a_cpu_follows_its_instructions(monkeypatch, native, expected):
    monkeypatch.setattr(building, "cpu_multiplies_bfloat16", lambda: native)
    assert building.choose_compute_dtype("auto", jax.devices("cpu")[0])[0].name == expected


def test_the_script_ends_with_code_2_and_one_message(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "taken").write_text("")
    script = tiny_run.REPOSITORY / "scripts" / "train.py"
    arguments = [f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'taken'}"]
    ended = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "it is a file" in ended.stderr
    assert "Traceback" not in ended.stderr
