"""Real processes that train, without five seconds of imports for each.

One process imports everything and then forks a child for every run, before JAX has made a thread.
The child is `scripts/train.py` with its own flags: its exit code, its output and its end by a
signal are those of the script. What goes wrong in it happens at a named phase (`qlora_jax.phases`).

The parent of the children lives in a mount namespace of its own, if the system allows one: the file
systems it mounts are small, are nobody else's, and are gone when it is.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[2]


class Trainer:
    """Starts runs.

    Attributes:
        can_mount: whether it can have file systems of its own.
    """

    def __init__(self, cache: pathlib.Path):
        """Imports, in another process.

        Args:
            cache: of compiled programs, that all runs share.
        """
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, *sys.path))),
        }
        space = next((flag for flag in ("-m", "-rm") if _can_unshare(flag)), None)
        self.can_mount = space is not None
        command = [sys.executable, __file__]
        self._parent = subprocess.Popen(
            ["unshare", space, *command] if space else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, arguments: list[str], *, output: pathlib.Path, **fault: Any) -> int:
        """Starts a run; see `_child`.

        Returns:
            The number of its process.
        """
        return self._ask("start", arguments=arguments, output=str(output), fault=fault)

    def wait(self, process: int) -> int:
        """Waits for the end of a run; its exit code, or minus the signal that killed it."""
        return self._ask("wait", process=process)

    def mount(self, *options: str) -> None:
        """Runs `mount` where the runs see it."""
        self._ask("mount", options=options)

    def seen(self, path: pathlib.Path) -> pathlib.Path:
        """How this process reaches a path of the runs', also in a file system of theirs."""
        return pathlib.Path(f"/proc/{self._parent.pid}/root{path}")

    def close(self) -> None:
        """Ends the parent of the runs."""
        self._parent.stdin.close()
        self._parent.wait(30)

    def _ask(self, what: str, **arguments: Any) -> Any:
        self._parent.stdin.write(json.dumps([what, arguments]) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


def _can_unshare(flag: str) -> bool:
    try:
        return subprocess.run(["unshare", flag, "true"], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _serve() -> None:
    """The parent of the runs."""
    import qlora_jax.training  # noqa: F401  what takes long; JAX starts no thread by it
    import qlora_jax.training.run  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")  # what the children print must not get there
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        if what == "start":
            answer = os.fork()
            if answer == 0:
                _child(**arguments)
        elif what == "wait":
            status = os.waitpid(arguments["process"], 0)[1]
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = subprocess.run(["mount", *arguments["options"]], check=True).returncode
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _child(arguments: list[str], output: str, fault: dict[str, Any]) -> None:
    """A run.

    Args:
        arguments: of `scripts/train.py`.
        output: file that all it prints goes to.
        fault: `at`, the name of a phase, and `nth`, counted from 1, say when; `do` says what:
            "kill" and "stop" (signals), "fill" the file system of `path`, "remove" `path`.
            `events`: a file that grows by a byte with each phase.
    """
    import runpy

    from qlora_jax import phases

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    left = [fault.get("nth", 1)]
    events = os.open(fault["events"], os.O_WRONLY | os.O_CREAT) if "events" in fault else None

    def listen(name: str) -> None:
        if events is not None:
            os.write(events, b".")
        left[0] -= name == fault.get("at")
        if name == fault.get("at") and left[0] == 0:
            _do(**fault)

    phases.listeners.append(listen)
    sys.argv = ["scripts/train.py", *arguments]
    code = 70
    try:
        runpy.run_path(str(REPOSITORY / "scripts" / "train.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _do(do: str, path: str = "", **_: Any) -> None:
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif do == "remove":
        shutil.rmtree(path)
    elif do == "fill":
        with open(path, "wb", buffering=0) as file:
            for block in (b"x" * 65536, b"x"):
                try:
                    while file.write(block):
                        pass
                except OSError:
                    continue
    else:
        raise ValueError(do)


def wait_for(condition: Any, seconds: float = 120) -> None:
    """Waits until a function returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)


if __name__ == "__main__":
    _serve()
