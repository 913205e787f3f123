"""Ctrl-C and SIGTERM: what they stop, what is saved, and with which code the process ends.

SIGTERM is how clusters announce that they take a machine back; it is treated like Ctrl-C.

    while                    the first signal                          exit code
    loading, compiling, …    ends the run: there is nothing to save    130 or 143
    training                 the step is finished and saved            130 or 143
    evaluating in training   the evaluation is dropped, the step       130 or 143
                             saved; continuing measures it again
    saving                   the save is finished                      130 or 143
    anything                 the second: the process is gone at once   130 or 143

The codes are 128 plus the signal's number, as shells count. Python runs a handler only between two
of its own instructions, so a signal would wait for the end of a compilation, or of a step that
hangs. In a script, where ending the process is right, `ending_for_sure` has a thread that does not
wait for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from qlora_jax.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# To run what stands in `finally`, after a signal that ends the run.
_GRACE_SECONDS = 5.0


class InterruptWatch:
    """Inside the `with` block, an interrupt is remembered instead of raised.

    Between two steps the loop looks at `requested`, saves, and stops. A second interrupt does not
    wait: it raises `Interrupted` at once. Outside the main thread Python allows no signal handlers,
    and the watch does nothing.

    >>> with InterruptWatch() as watch:
    ...     signal.raise_signal(signal.SIGINT)
    ...     watch.requested, stop_requested()
    (True, True)
    >>> stop_requested()
    False
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def __enter__(self) -> InterruptWatch:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._remember)
            _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _active:
            _active.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted(number)
        self.number = number
        _say(f"{signal.Signals(number).name}: saving after this step; once more leaves at once")


_active: list[InterruptWatch] = []


def stop_requested() -> bool:
    """Whether a watch has remembered a signal: then what may be left out is not begun."""
    return any(watch.requested for watch in _active)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ending_for_sure() -> Iterator[None]:
    """For scripts: inside the block a signal ends the process also while it is deaf to Python.

    The second signal ends it at once; so does the first, some seconds later, where no
    `InterruptWatch` waits for a step. Not for notebooks, whose process holds more than this run.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _end(reader: socket.socket) -> None:
    """Reads a byte for each signal, as soon as it comes; an empty read is the end of the block."""
    first = None
    while True:
        try:
            received = reader.recv(1)
        except TimeoutError:
            if not _active:
                _leave(first)
            reader.settimeout(None)  # the signal came as the loop began, which knows of it
            continue
        if not received:
            return
        number = received[0]
        if number not in SIGNALS:
            continue
        if first is not None:
            _leave(number)
        first = number
        if not _active:
            reader.settimeout(_GRACE_SECONDS)


def _leave(number: int) -> None:
    _say(f"{signal.Signals(number).name}: left at once; what was saved before is as it was")
    os._exit(128 + number)


def _say(text: str) -> None:
    # Not `print`: a handler may run in the middle of one.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
