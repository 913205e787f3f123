"""What this process is doing, by name: crash reports say it, and fault tests stop a process there.

`enter` remembers the name, calls the listeners, and returns. There is no listener in the product: a
test starts a child process whose driver script adds one before it trains, and so kills, stops or
starves the process at exactly that point, without a line in the product that only tests need:

    import os, signal, sys
    from qlora_jax import phases

    def die(name):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    phases.listeners.append(die)

A name says what has just begun or, in `SAVING`, what has just been reached. Phases of `train` in
their order: "tokenizing", "loading", "compiling", "restoring" (only where there is a checkpoint),
"evaluating" (before, within and after training), "training", those of `SAVING`, "stopped" (by a
signal, saved), "finishing".
"""

from collections.abc import Callable

# Of every save, in this order; see `Checkpointer.save`.
SAVING = (
    "saving: begun",  # the arrays are hashed, nothing is written
    "saving: leaves written",  # into a hidden directory
    "saving: manifest written",  # there, and all of it is on the disk
    "saving: named",  # the new step has its name; those that are too old are still there
    "saving: done",  # what was too old is gone
)

listeners: list[Callable[[str], None]] = []
_current = "starting"


def enter(name: str) -> None:
    """Says what begins now.

    >>> enter("compiling")
    >>> current()
    'compiling'
    """
    global _current
    _current = name
    for listener in listeners:
        listener(name)


def current() -> str:
    """What began last."""
    return _current
