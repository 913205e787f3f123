"""The processes that the benchmark measures: how they are started, asked, and survived.

Ours and the rival's run in processes of their own. `run_lines` reads what one reports until it
ends. `Worker` keeps one for many questions, a line of JSON each way, so that measurements take
turns; every answer has a time limit, and a process that crashed or hangs (an illegal address ends a
CUDA process for good) costs that one answer: the next question starts a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.files import resolve_path

ROOT = pathlib.Path(__file__).resolve().parents[1]
RIVAL_VENV = ROOT / "benchmarks" / ".venv-rival"
RIVAL_PACKAGES = (
    "torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 "
    "gguf==0.19.0"
).split()
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def find_rival(python: str | None) -> pathlib.Path:
    """The rival's Python; without one given, of an environment that is made here once.

    Raises:
        UserError: the Python does not exist or lacks a package, or the environment cannot be made.
    """
    if python is None:
        return _rival_venv()
    return find_python(python, "torch, transformers, peft, bitsandbytes, accelerate, gguf")


def find_python(python: str, packages: str) -> pathlib.Path:
    """A Python that was given by its path, once it has shown that it can import all packages.

    Args:
        python: its path.
        packages: names with commas between them.

    Raises:
        UserError: it does not exist, or a package cannot be imported.
    """
    path = resolve_path(python)
    check = subprocess.run([path, "-c", f"import {packages}"], capture_output=True, text=True)
    if check.returncode:
        raise UserError(
            f"--rival_python={python} cannot run the rival: {last_line(check.stderr)}; "
            f"install there: {' '.join(RIVAL_PACKAGES)}"
        )
    return path


def _rival_venv() -> pathlib.Path:
    python, stamp = RIVAL_VENV / "bin" / "python", RIVAL_VENV / "installed"
    wanted = "\n".join(RIVAL_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the rival's environment in {RIVAL_VENV} (once) …", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", *RIVAL_PACKAGES]
    for command in (["python3.11", "-m", "venv", "--clear", RIVAL_VENV], pip):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"the rival's environment cannot be made: {error}; it needs python3.11 and "
                "packages from PyPI, or --rival_python=PATH with them installed"
            ) from None
    stamp.write_text(wanted)
    return python


def run_lines(command: list[Any]) -> Iterator[dict[str, Any]]:
    """Runs a worker and yields its lines of JSON as they come.

    Raises:
        UserError: it ended with an error; the message holds the last line of what it said.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | _QUIET,
        )
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        except BaseException:  # also Ctrl-C, and a reader that stops early
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            log.seek(0)
            name = pathlib.Path(command[1]).name
            raise UserError(f"{name} ended with code {code}: {last_line(log.read())}")


def last_line(text: str) -> str:
    """The last line that is not empty, or that there is none.

    >>> last_line("Traceback\\nValueError: no\\n")
    'ValueError: no'
    """
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


class WorkerError(Exception):
    """A worker did not answer; the message says why."""


class Worker:
    """A process that answers questions, each a JSON object on one line, one after the other.

    Use it in a `with` statement: at its end the process and all its children are gone.
    """

    def __init__(self, command: Sequence[Any], env: Mapping[str, str] | None = None):
        """Starts nothing yet.

        Args:
            command: of the process.
            env: environment variables besides this process's own.
        """
        self._command = [str(part) for part in command]
        self._env = os.environ | _QUIET | dict(env or {})
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log: Any = None

    def __enter__(self) -> Worker:
        """Returns itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the process."""
        self.stop()

    def ask(self, question: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """One answer. Lines that are no JSON objects are skipped.

        Args:
            question: what is written to the worker.
            timeout_s: how long the answer may take, the process's start included.

        Raises:
            WorkerError: the process ended or took too long. It is gone then, and the next question
                starts a new one.
        """
        if self._process is None:
            self._start()
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except OSError:  # it ended; the reader says so below
            pass
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            self.stop()
            raise WorkerError(f"no answer within {timeout_s:.0f} s") from None
        if line is None:
            code = self._process.wait()
            self._log.seek(0)
            said = last_line(self._log.read())
            self.stop()
            raise WorkerError(f"the process ended with code {code}: {said}")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process, if there is one, and what it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._log.close()
        self._process = None

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._env,
            start_new_session=True,  # so that stop() reaches its children too
        )
        reader = threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._lines), daemon=True
        )
        reader.start()


def _read_lines(stream: Any, lines: queue.Queue) -> None:
    with stream:
        for line in stream:
            if line.startswith("{"):
                lines.put(line)
    lines.put(None)
