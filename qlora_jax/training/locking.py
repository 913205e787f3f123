"""One writer for a work directory: a lock that says who has it, and ends with its process.

The lock is the kernel's (`flock`), so a process that is killed cannot leave it behind, and a copied
directory is not locked. The file's content, who and since when, is for the message, and for what
the kernel cannot know: over a network file system that keeps locks to one machine, a second machine
would get the lock, too. It then finds who was there and did not say goodbye, and says so.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

from qlora_jax.errors import TrainingError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[str | None]:
    """Keeps other processes from training in a directory.

    Yields:
        A sentence about a process on another machine that had the lock and did not give it back,
        or None.

    Raises:
        TrainingError: another process, or another call in this one, has the lock.
    """
    # Not "w": what another process wrote must outlast a try.
    with (directory / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{directory} is being trained in by another process{holder(directory)}; wait for "
                "it, stop it (Ctrl-C there saves its state), or choose another --workdir"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"{directory} is on a file system without locks ({error.strerror}), where two runs "
                "could destroy each other; choose a --workdir on another"
            ) from error
        left = _left_by_another_machine(file)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        _write(file, json.dumps(me) + "\n")
        try:
            # The file stays: one that is removed could be locked by two, before and after.
            yield left
        finally:
            with contextlib.suppress(OSError):  # the disk may be full
                _write(file, "")


def holder(directory: pathlib.Path) -> str:
    """Who has the lock or had it last, to put behind a sentence; empty where it does not say.

    >>> holder(pathlib.Path("/nowhere"))
    ''
    """
    try:
        who = json.loads((directory / LOCK_NAME).read_text(encoding="utf-8"))
        return f" (process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_locked(directory: pathlib.Path) -> bool:
    """Whether a process trains in a directory now. Nothing is made or changed."""
    try:
        with (directory / LOCK_NAME).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _left_by_another_machine(file: TextIO) -> str | None:
    file.seek(0)
    try:
        who = json.loads(file.read())
        if who["host"] == socket.gethostname():
            return None  # the kernel knows that it is gone
        return (
            f"The run here did not end by itself: process {who['pid']} on {who['host']} began "
            f"{who['since']}. If it is still alive there, stop one of the two."
        )
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: TextIO, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
