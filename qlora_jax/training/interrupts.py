"""Ctrl-C that waits for the end of a training step."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class InterruptWatch:
    """Inside the `with` block, an interrupt is remembered instead of raised.

    Between two steps the loop looks at `requested`, saves, and stops. A second Ctrl-C does not
    wait: it raises `KeyboardInterrupt` at once. SIGTERM, by which clusters announce that they take
    a machine back, is treated like Ctrl-C. Outside the main thread Python allows no signal
    handlers, and the watch does nothing.

    >>> with InterruptWatch() as watch:
    ...     signal.raise_signal(signal.SIGINT)
    ...     watch.requested
    True
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptWatch:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in self._SIGNALS}
            for number in self._SIGNALS:
                signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
