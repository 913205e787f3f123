"""What Orbax raises and prints, as one sentence."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

from qlora_jax.errors import CheckpointError, DamagedCheckpointError


@contextlib.contextmanager
def without_logging() -> Iterator[None]:
    """Silences Orbax, whose threads print the traceback of an error that is raised as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def damage_explained(path: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises for a step that it cannot read into one sentence."""
    try:
        with without_logging():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax raises Exception itself where an array cannot be read.
        raise DamagedCheckpointError(f"{path} is damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error comes from.

    >>> first_line(OSError("no space\\n  at …"))
    'OSError: no space'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}"
