"""What a run leaves in its directory, and what the next run and the doctor make of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from qlora_jax import metrics, phases, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import CheckpointError, ConfigError, TrainingError
from qlora_jax.training.crash import Progress, crash_reported
from qlora_jax.training.diagnosis import diagnose
from qlora_jax.training.interrupts import stop_requested
from qlora_jax.training.saving import RunCheckpoints, check_resume
from qlora_jax.training.workdir import Workdir

pytestmark = pytest.mark.usefixtures("compile_each_program_once")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.write_model(folder / "model"), tiny_run.write_data(folder / "sums.jsonl")


def make_config(files, **fields):
    config = tiny_run.tiny_config(*files)
    config.train.steps, config.checkpoint.every, config.eval.every = 4, 1, 1
    config.update_from_flattened_dict(fields)
    return config


def train(files, workdir, resume="auto", on_step=None, **fields):
    """Returns what is printed; after an error it is in `train.text`."""
    report, text = tiny_run.quiet_report()
    try:
        config = make_config(files, **fields)
        training.train(config, workdir, resume=resume, on_step=on_step, report=report)
    finally:
        train.text = text.getvalue()
    return train.text


@pytest.fixture(scope="module")
def crashed(files, tmp_path_factory, compile_each_program_once):
    """A run that a defect ended in its third step; not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "crashed"

    def on_step(step, row):
        if step == 3:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect") as error:
        train(files, workdir, on_step=on_step)
    assert "crash.json" in error.value.__notes__[0] and "doctor.py" in error.value.__notes__[0]
    return workdir


@pytest.fixture
def copy(crashed, tmp_path):
    return shutil.copytree(crashed, tmp_path / "run")


def damage(workdir, step):
    (data,) = (workdir / f"checkpoints/{step}/state/d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)


def test_a_crash_leaves_a_report(crashed):
    found = json.loads((crashed / "crash.json").read_text())
    assert (found["schema"], found["version"]) == ("qlora_jax/crash", 1)
    assert (found["step"], found["phase"]) == (3, "training")
    assert found["exception"]["type"] == "RuntimeError"
    assert found["exception"]["message"] == "a defect"
    assert "on_step" in "".join(found["exception"]["traceback"])
    assert found["memory"]["host_peak_bytes"] > 2**20 and "jax" in found["versions"]
    # the batch of the step, and not the one that had been fetched ahead
    saved = Checkpointer(crashed / "checkpoints").verify(2).metadata["batches"]
    assert found["batch"]["position"] == saved
    assert len(found["batch"]["record_ids"]) == 2  # microbatches
    assert found["batch"]["record_ids"][0][0].startswith("sums.jsonl:")


def test_every_number_of_a_run_is_in_the_schema(crashed):
    rows = metrics.read_metrics(crashed)
    assert len(rows) == 4 and all(row.keys() <= metrics.FIELDS.keys() for row in rows)
    header = json.loads((crashed / "metrics.jsonl").read_text().splitlines()[0])
    assert header == {"schema": "qlora_jax/metrics", "version": metrics.SCHEMA_VERSION}


@pytest.mark.parametrize(("phase", "is_crash"), [("loading", False), ("saving: begun", True)])
def test_a_mistake_in_the_flags_is_no_crash(tmp_path, phase, is_crash):
    with pytest.raises(TrainingError), crash_reported(Workdir(tmp_path), Progress()):
        phases.enter(phase)
        raise TrainingError("said in one sentence")
    assert (tmp_path / "crash.json").exists() == is_crash


def test_the_newest_step_is_damaged_and_the_run_goes_on_from_the_one_before(files, copy):
    damage(copy, 2)
    text = train(files, copy)
    assert "checkpoints/2 is damaged: state/d/" in text and "renamed to 2.damaged" in text
    assert "continuing after step 1 of 4" in text
    steps = [row["step"] for row in metrics.read_metrics(copy) if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert {"2.damaged", "3", "4"} <= set(os.listdir(copy / "checkpoints"))
    found = diagnose(copy)
    assert found.healthy and "2.damaged: set aside" in found.text
    assert "the run is finished" in found.text


def test_load_trained_takes_the_newest_good_step_and_says_so(copy):
    damage(copy, 2)
    with pytest.warns(UserWarning, match="2 is damaged.*step 1 is used instead"):
        training.load_trained(copy)
    assert (copy / "checkpoints/2").exists()  # who only reads changes nothing


def test_the_doctor_on_a_run_that_crashed(crashed):
    before = sorted(path.name for path in crashed.rglob("*"))
    found = diagnose(crashed)
    assert found.healthy
    for part in [
        "step 1: good, ",
        "step 2: good, ",
        "held-out loss",
        "(the best)",
        "metrics.jsonl: good, 3 steps",
        "training after step 3: RuntimeError: a defect",
        "continue after step 2 of 4: ",
        f"scripts/train.py --config={crashed}/config.json --workdir={crashed}",
    ]:
        assert part in found.text, found.text
    assert sorted(path.name for path in crashed.rglob("*")) == before


def test_the_doctor_on_damage(copy):
    damage(copy, 2)
    (copy / "checkpoints/.3.partial-1").mkdir()
    found = diagnose(copy)
    assert not found.healthy and "step 2: DAMAGED. " in found.text
    assert "continue after step 1 of 4 (what came after it, up to step 2, is computed" in found.text
    assert ".3.partial-1" in found.text
    damage(copy, 1)
    (copy / "config.json").write_text("{")
    assert "no step can be used: put a copy of one back into" in diagnose(copy).text
    shutil.rmtree(copy / "checkpoints")
    found = diagnose(copy)
    assert "config.json: DAMAGED" in found.text and "config.json cannot be used" in found.text
    with pytest.raises(CheckpointError, match="holds no run"):
        diagnose(copy / "elsewhere")


def test_the_doctor_while_a_run_is_going_on(copy):
    with Workdir(copy).lock():
        assert f"a run is going on here (process {os.getpid()} on " in diagnose(copy).text


@pytest.mark.slow
def test_the_doctors_script_says_by_its_code_whether_something_is_damaged(copy):
    script = tiny_run.REPOSITORY / "scripts" / "doctor.py"
    for code in (0, 1):
        command = [sys.executable, script, f"--workdir={copy}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == code and ended.stdout.startswith(f"## {copy}")
        damage(copy, 1)


def test_resume_refuses_before_anything_is_read_or_made(crashed, files, tmp_path):
    for resume, workdir, said in [
        ("must", tmp_path / "new", "new holds no checkpoint, and --resume=must asks for one"),
        ("never", crashed, r"holds a run already \(steps \[1, 2\]\), and --resume=never"),
    ]:
        with pytest.raises(TrainingError, match=said):
            train(files, workdir, resume=resume)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="resume='maybe': needs one of auto, must, never"):
        check_resume("maybe", crashed)
    check_resume("must", crashed)
    check_resume("never", tmp_path / "new")


@pytest.fixture
def at(monkeypatch):
    """Sends signals when a phase begins for the n-th time; only once."""

    def send(phase, *numbers, nth=1):
        seen = []

        def listen(name):
            seen.extend([name] if name == phase else [])
            if name == phase and len(seen) == nth:
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(phases, "listeners", [listen])

    return send


def values(workdir):
    """What a run wrote, whatever rows it stands in, without times."""
    found = {}
    for row in metrics.read_metrics(workdir):
        for name in ("loss", "heldout_loss", "grad_norm"):
            if name in row:
                assert (row["step"], name) not in found
                found[row["step"], name] = row[name]
    return found


def state(workdir, step=4):
    path = workdir / "checkpoints"
    manifest = Checkpointer(path).verify(step)
    return {name: leaf.hash for name, leaf in manifest.leaves.items()}


# Of one run that is stopped again and again: phase, how often it has begun, signals, the steps that
# are saved then, what is said.
STOPS = [
    ("compiling", 1, [15], [], "stopped while compiling"),
    ("evaluating", 1, [2], [], "stopped while evaluating"),
    ("evaluating", 2, [15], [2], "stopped after step 2 of 4; everything is saved"),
    ("saving: leaves written", 1, [15, 2], [2], "stopped while saving"),
    ("saving: begun", 1, [15], [2, 4], "stopped after step 4 of 4; everything is saved"),
    ("finishing", 1, [2], [2, 4], "stopped while finishing"),
]


def test_signals_in_every_phase_lose_nothing_and_change_no_bit(files, tmp_path, at):
    every = {"eval.every": 2, "checkpoint.every": 2}
    workdir = tmp_path / "stopped"
    for phase, nth, numbers, saved, said in STOPS:
        at(phase, *numbers, nth=nth)
        with pytest.raises(KeyboardInterrupt) as stop:
            train(files, workdir, **every)
        assert getattr(stop.value, "number", signal.SIGINT) == numbers[-1]
        assert said in train.text and "The same command continues" in train.text
        assert not (workdir / "result.json").exists()
        assert Checkpointer(workdir / "checkpoints").steps() == saved
        assert not (workdir / "crash.json").exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not stop_requested()
    at("none")
    train(files, workdir, **every)
    train(files, tmp_path / "straight", **every)
    assert values(workdir) == values(tmp_path / "straight")
    assert state(workdir) == state(tmp_path / "straight")
    assert not list(workdir.rglob(".*partial*"))


def restore(files, workdir, tokenizer=None, **other):
    """As a run restores, with something that is not what it was."""
    report, text = tiny_run.quiet_report()
    config = make_config(files)
    checkpoints = RunCheckpoints(config, Workdir(workdir), report)
    manifest = Checkpointer(workdir / "checkpoints").verify(2)
    tokenizer = tokenizer or Tokenizer.from_file(files[0])
    same = {
        "base": manifest.metadata["base_fingerprint"],
        "data": manifest.metadata["data_fingerprint"],
        "dtype": jnp.dtype(manifest.metadata["compute_dtype"]),
    }
    checkpoints.describe(**{**same, **other}, tokenizer=tokenizer)
    like = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in manifest.leaves.items()}
    assert checkpoints.restore(like).step == 2
    return text.getvalue()


@pytest.mark.parametrize(
    ("other", "named"), [({"base": "f00"}, "/model"), ({"data": "f00"}, "/sums.jsonl")]
)
def test_another_base_or_data_is_refused(files, copy, other, named):
    with pytest.raises(TrainingError, match=f"other content than .*{named} has now.*here f00"):
        restore(files, copy, **other)


def test_another_tokenizer_or_template_is_refused(files, copy, tmp_path):
    changed = shutil.copytree(files[0], tmp_path / "changed")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    settings["chat_template"] += " "
    (changed / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainingError, match="other content than the chat template of"):
        restore(files, copy, Tokenizer.from_file(changed))
    shutil.copy(files[0] / "tokenizer_config.json", changed)
    content = (changed / "tokenizer.json").read_text()
    (changed / "tokenizer.json").write_text(content.replace('"eight"', '"acht"'))
    with pytest.raises(TrainingError, match="other content than the tokenizer of"):
        restore(files, copy, Tokenizer.from_file(changed))


def test_another_compute_dtype_is_said_and_not_refused(files, copy):
    assert "Since that step" not in restore(files, copy)
    text = restore(files, copy, dtype=jnp.dtype("float16"))
    assert "now float16. What follows may differ in its last bits" in text


def test_a_configuration_that_lost_its_file_is_known_from_the_manifest(files, copy):
    (copy / "config.json").unlink()
    other = make_config(files)
    other.lora.rank = 8
    with pytest.raises(ConfigError, match="lora.rank: was 4, is 8"):
        RunCheckpoints(other, Workdir(copy), tiny_run.quiet_report()[0])


def test_the_lock_says_who_has_it(tmp_path):
    with Workdir(tmp_path).lock() as warning:
        assert warning is None
        who = rf"\(process {os.getpid()} on {socket.gethostname()}, since 20.*\); wait for it"
        with pytest.raises(TrainingError, match=who), Workdir(tmp_path).lock():
            pass
    assert (tmp_path / ".lock").read_text() == ""


def test_a_lock_that_another_machine_did_not_give_back_is_told(tmp_path):
    left = {"pid": 7, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00"}
    for text, told in [(json.dumps(left), True), ("", False), ("{", False)]:
        (tmp_path / ".lock").write_text(text)
        with Workdir(tmp_path).lock() as warning:
            assert (warning is not None and "process 7 on elsewhere" in warning) == told


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".a.json.partial-{dead.pid}", f".adapter.partial-{os.getpid()}"]
    (tmp_path / gone[0]).write_text("")
    (tmp_path / gone[1]).mkdir()
    stay = [f".b.json.partial-{os.getppid()}", ".partial-", "notes.partial-1", "mine"]
    for name in stay:
        (tmp_path / name).write_text("")
    Workdir(tmp_path).clean()
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
