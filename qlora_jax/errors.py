"""The errors that a user can cause, and how a script ends when one of them happens.

Each message says what was given, what was expected and what to do. A script that ends with one of
them prints that message alone, without a traceback, and exits with code 2; every other exception is
a defect of this project and keeps its traceback.
"""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2
SIGNAL_EXIT_CODE = 128  # plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM


class UserError(Exception):
    """Something the user can put right; the message says how."""


class ConfigError(UserError):
    """A flag or a field of the configuration is unknown, mistyped or out of range."""


class DataError(UserError):
    """A data file, or a record in it, cannot be used."""


class WeightsError(UserError):
    """A model file is missing, refused, or does not fit the model."""


class ExportError(UserError):
    """A merged model is worse than the one it was made from."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or does not fit what it is restored into."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was saved; an older one may be."""


class EvaluationError(UserError):
    """An evaluation cannot be continued, or its answers cannot be kept."""


class TrainingError(UserError):
    """A run cannot go on, for example because its loss is not a number any more."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped what was running; `number` says which.

    >>> str(Interrupted(signal.SIGTERM))
    'stopped by SIGTERM'
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = int(number)


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the candidate that `name` was most likely meant to be, or None.

    Args:
        name: what was written.
        candidates: what could have been meant.
        cutoff: similarity in [0, 1] below which nothing is suggested.

    Example:
        >>> nearest("rnak", ["rank", "alpha"])
        'rank'
    """
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Runs a script's `main` and ends the process with its exit code.

    Args:
        main: a function without arguments; what it returns goes to `sys.exit` (None means success).

    Raises:
        SystemExit: always. Code 2 after a `UserError`, 130 after Ctrl-C, 143 after SIGTERM.

    Example:
        >>> def main():
        ...     raise ConfigError("lora.rank: got -1, need an integer of at least 1")
        >>> run_main(main)
        Traceback (most recent call last):
        SystemExit: 2
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        code = SIGNAL_EXIT_CODE + getattr(interrupt, "number", signal.SIGINT)
    sys.exit(code)
