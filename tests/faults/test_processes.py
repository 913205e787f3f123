"""Processes that are killed, disks that fill up, directories that go: with real processes."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import tiny_run
from catalogue import Outcome, fault
from processes import Trainer, wait_for

from qlora_jax import phases
from qlora_jax.metrics import read_metrics

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("compiled"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run that saves every other step; its file."""
    folder = tmp_path_factory.mktemp("material")
    config = tiny_run.tiny_config(
        tiny_run.write_model(folder / "model"), tiny_run.write_data(folder / "sums.jsonl")
    )
    config.data.eval_fraction, config.train.steps, config.checkpoint.every = 0.0, STEPS, 2
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder / "config.json"


@pytest.fixture(scope="module")
def train(trainer, config):
    """Trains in a directory until the end, whatever that is."""

    def train(workdir, *flags, **options):
        output = workdir.with_name(workdir.name + ".txt")
        arguments = [f"--config={config}", f"--workdir={workdir}", *flags]
        process = trainer.start(arguments, output=output, **options)
        return Outcome(trainer.wait(process), output.read_text())

    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """What the run leaves when nothing happens to it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    outcome = train(workdir)
    assert outcome.code == 0, outcome.text
    return workdir


def steps_of(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def hashes(workdir, step):
    """Of every array of a checkpoint: adapters, moments, key."""
    manifest = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())
    found = {path: leaf["hash"] for path, leaf in manifest["leaves"].items()}
    assert len(found) > 20
    return found, manifest["metadata"]["batches"]


def losses(workdir):
    return [(row["step"], row["loss"]) for row in read_metrics(workdir) if "loss" in row]


def assert_same_run(workdir, whole, step=STEPS):
    """The same adapter, moments, position in the data and losses; nothing hidden is left."""
    assert hashes(workdir, step) == hashes(whole, step)
    assert losses(workdir) == losses(whole)
    hidden = [name for name in os.listdir(workdir / "checkpoints") if name.startswith(".")]
    assert not hidden
    assert (workdir / "result.json").exists()


BEGUN, LEAVES, MANIFEST, NAMED, DONE = phases.SAVING
# Where each start of a run is killed, and the steps that are there then: two are kept.
KILLS = [
    (BEGUN, []),
    (MANIFEST, []),
    (NAMED, [2]),
    (BEGUN, [2]),
    (LEAVES, [2]),
    (MANIFEST, [2]),
    (NAMED, [2, 4]),
    (DONE, [4, 6]),
]


@fault(
    "`kill -9` in each phase of a save, where nothing was saved before and where something was, "
    "and each time the same command again",
    exit=0,
    says=("continuing after step 6",),
    holds="Steps saved before are whole; the run ends in the bits of the run that nothing happened "
    "to; what the killed saves left is removed",
)
def test_killed_in_a_save(seen, train, whole, tmp_path):
    workdir, steps = tmp_path / "run", []
    for phase, expected in KILLS:
        killed = train(workdir, at=phase, do="kill")
        assert killed.code == -signal.SIGKILL, killed.text
        said = f"continuing after step {steps[-1]} of {STEPS}" if steps else "continuing"
        assert (said in killed.text) == bool(steps)
        steps = steps_of(workdir)
        assert steps == expected, phase
    seen(train(workdir))
    assert_same_run(workdir, whole)


@fault(
    "`kill -9` at 50 random moments of one run, then the same command again each time",
    exit=0,
    says=("continuing after step ",),
    holds="Every start goes on from the newest step that was saved; the last one ends in the bits "
    "of the run that nothing happened to, and its metrics have no gap and no repeat",
)
def test_killed_at_50_random_moments(seen, train, trainer, config, tmp_path):
    steps, moments = 150, random.Random(0)
    flags = [f"--config.train.steps={steps}", "--config.checkpoint.every=1"]
    expected, workdir = tmp_path / "expected", tmp_path / "run"
    begun = train(expected, flags[0], "--config.checkpoint.every=1000")
    assert begun.code == 0, begun.text
    newest = 0
    for kill in range(50):
        events, output = tmp_path / f"events-{kill}", tmp_path / f"run-{kill}.txt"
        arguments = [f"--config={config}", f"--workdir={workdir}", *flags]
        process = trainer.start(arguments, output=output, events=str(events))
        # tokenizing, loading, compiling, restoring, and about 6 phases a step
        wanted = moments.randrange(28)
        wait_for(lambda: events.exists() and events.stat().st_size >= wanted)  # noqa: B023
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        assert trainer.wait(process) == -signal.SIGKILL, output.read_text()
        text = output.read_text()
        assert "Traceback" not in text and "damaged" not in text, text
        if "continuing after step" in text:
            assert f"continuing after step {newest} of {steps}" in text
        newest = max(steps_of(workdir), default=0)
    assert 20 < newest < steps
    seen(train(workdir, *flags))
    assert_same_run(workdir, expected, steps)


@pytest.fixture
def disk(trainer, tmp_path):
    """A file system of 32 MiB; its path for the runs, and for this process."""
    if not trainer.can_mount:
        pytest.skip("this system allows no mount namespace (unshare -m or -rm)")
    path = tmp_path / "disk"
    path.mkdir()
    trainer.mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path))
    return path


def train_there(trainer, config, disk, tmp_path, **options):
    output = tmp_path / "out.txt"
    arguments = [f"--config={config}", f"--workdir={disk / 'run'}"]
    process = trainer.start(arguments, output=output, **options)
    return Outcome(trainer.wait(process), output.read_text())


@fault(
    "The disk is full before a save, or fills up within it: in the middle of a run and at its last "
    "step",
    exit=2,
    says=("error: ", "cannot be saved to", "saved steps: ["),
    holds="The steps saved before; with room again, the same command goes on each time, at last to "
    "the bits of the run that nothing happened to",
)
def test_disk_full(seen, trainer, config, whole, disk, tmp_path):
    ballast, workdir = disk / "ballast", trainer.seen(disk / "run")
    # the second save in this process, then the first of each that goes on
    for phase, nth, steps in [
        (BEGUN, 2, [2]),
        (LEAVES, 1, [2]),
        (BEGUN, 3, [4, 6]),
        (LEAVES, 1, [4, 6]),
    ]:
        options = dict(at=phase, nth=nth, do="fill", path=str(ballast))
        seen(train_there(trainer, config, disk, tmp_path, **options))
        assert steps_of(workdir) == steps
        assert not (workdir / "result.json").exists()
        trainer.seen(ballast).unlink()
    assert train_there(trainer, config, disk, tmp_path).code == 0
    assert_same_run(workdir, whole)


@fault(
    "The directory of a run has become read-only",
    exit=2,
    says=("error: ", "cannot be written: the file system is read-only"),
    holds="Not a byte of it changes, and nothing is loaded before it is said",
)
def test_read_only(seen, trainer, config, whole, disk, tmp_path):
    workdir = trainer.seen(disk / "run")
    shutil.copytree(whole, workdir)
    (workdir / "result.json").unlink()
    trainer.mount("-o", "remount,ro", str(disk))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    seen(train_there(trainer, config, disk, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@fault(
    "The directory of a run vanishes while it is trained in",
    exit=2,
    says=("error: ", "has vanished while it was trained in"),
    holds="The run ends at the next save, and makes no half of a directory in its place",
)
def test_vanished(seen, train, tmp_path):
    workdir = tmp_path / "run"
    seen(train(workdir, at=DONE, do="remove", path=str(workdir)))
    assert not workdir.exists()


@fault(
    "Two runs in one directory",
    exit=2,
    says=("error: ", "is being trained in by another process"),
    holds="The first goes on undisturbed to its end",
)
def test_two_runs(seen, train, trainer, config, whole, tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "first.txt"
    arguments = [f"--config={config}", f"--workdir={workdir}"]
    first = trainer.start(arguments, output=output, at=LEAVES, do="stop")
    wait_for(lambda: _is_stopped(first))
    seen(train(workdir))
    os.kill(first, signal.SIGCONT)
    assert trainer.wait(first) == 0, output.read_text()
    assert_same_run(workdir, whole)


def _is_stopped(process):
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


@fault(
    "A bit of the newest step's arrays flips on the disk",
    exit=0,
    says=("is damaged", "goes on from an older step, 6", "continuing after step 6"),
    holds="The damaged step is set aside under another name; the run ends in the bits of the run "
    "that nothing happened to",
)
def test_damaged_newest_step(seen, train, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "result.json").unlink()
    files = (workdir / "checkpoints" / str(STEPS) / "state").rglob("d/*")
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    seen(train(workdir))
    assert (workdir / "checkpoints" / f"{STEPS}.damaged").is_dir()
    assert_same_run(workdir, whole)
