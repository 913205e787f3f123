"""Signals in every phase of a run: what they stop, what is saved, with which code it ends."""

import signal
import subprocess
import sys

import pytest
import tiny_run

from qlora_jax import errors, phases, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import Interrupted
from qlora_jax.metrics import read_metrics
from qlora_jax.training.interrupts import (
    InterruptWatch,
    ending_for_sure,
    sigterm_raises,
    stop_requested,
)

pytestmark = pytest.mark.usefixtures("compile_each_program_once")


@pytest.fixture
def files(tmp_path):
    return tiny_run.write_model(tmp_path / "model"), tiny_run.write_data(tmp_path / "sums.jsonl")


def run(files, workdir):
    config = tiny_run.tiny_config(*files)
    config.train.steps, config.eval.every, config.checkpoint.every = 4, 2, 2
    report, text = tiny_run.quiet_report()
    try:
        training.train(config, workdir, report=report)
    finally:
        run.text = text.getvalue()


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
    for row in read_metrics(workdir):
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
    ("saving: begun", 1, [15], [2, 4], None),  # the last step: nothing is left to stop
]


def test_signals_in_every_phase_lose_nothing_and_change_no_bit(files, tmp_path, at):
    workdir = tmp_path / "stopped"
    for phase, nth, numbers, saved, said in STOPS:
        at(phase, *numbers, nth=nth)
        if said is None:
            run(files, workdir)
        else:
            with pytest.raises(KeyboardInterrupt) as stop:
                run(files, workdir)
            assert getattr(stop.value, "number", signal.SIGINT) == numbers[-1]
            assert said in run.text and "The same command continues" in run.text
            assert not (workdir / "result.json").exists()
        assert Checkpointer(workdir / "checkpoints").steps() == saved
        assert not (workdir / "crash.json").exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not stop_requested()
    at("none")
    run(files, tmp_path / "straight")
    assert values(workdir) == values(tmp_path / "straight")
    assert state(workdir) == state(tmp_path / "straight")
    assert not list(workdir.rglob(".*partial*"))


def test_the_exit_codes(capsys):
    def end(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as ended:
            errors.run_main(main)
        return ended.value.code

    assert end(Interrupted(signal.SIGTERM)) == 143 and end(Interrupted(signal.SIGINT)) == 130
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped by SIGTERM\nstopped by SIGINT\ninterrupted\n"


def test_sigterm_raises_only_inside_its_block():
    with pytest.raises(Interrupted), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_watch_says_which_signal_came(capfd):
    with InterruptWatch() as watch:
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested() and watch.number == signal.SIGTERM
    assert "SIGTERM: saving after this step; once more leaves at once" in capfd.readouterr().err


_DEAF = """
import contextlib, hashlib, signal, sys
from qlora_jax.training import interrupts
interrupts._GRACE_SECONDS = 0.5
waits = interrupts.InterruptWatch() if sys.argv[1] == "step" else contextlib.nullcontext()
with interrupts.ending_for_sure(), interrupts.sigterm_raises(), waits:
    print("deaf", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in which Python runs nothing
"""


@pytest.mark.parametrize(
    ("where", "signals"), [pytest.param("compiling", 1, marks=pytest.mark.slow), ("step", 2)]
)
def test_a_process_that_is_deaf_to_python_ends_all_the_same(where, signals):
    command = [sys.executable, "-c", _DEAF, where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "deaf\n"
        process.send_signal(signal.SIGTERM)
        if signals == 2:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)  # the first waits for the step
            process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 143
        finally:
            process.kill()
        assert "SIGTERM: left at once; what was saved before is as it was" in process.stderr.read()


def test_leaving_the_block_gives_the_wakeup_file_back():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with ending_for_sure():
        assert signal.set_wakeup_fd(-1) != before
    assert signal.set_wakeup_fd(before) == before
