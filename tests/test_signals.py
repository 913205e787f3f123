"""Signals: what they stop, and with which code a process ends."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import Interrupted
from qlora_jax.training.interrupts import (
    InterruptWatch,
    ending_for_sure,
    sigterm_raises,
    stop_requested,
)


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


def test_the_wakeup_file_stays_within_the_block_and_is_given_back(tmp_path):
    def current():
        signal.set_wakeup_fd(found := signal.set_wakeup_fd(-1))
        return found

    before = current()
    with ending_for_sure():
        ours = current()
        Checkpointer(tmp_path).save(1, {"x": np.ones(3)}, {})
        assert current() == ours != before  # Orbax's event loops have not taken it
    assert current() == before
