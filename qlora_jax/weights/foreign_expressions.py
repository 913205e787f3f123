"""Regular expressions that came with an adapter, tried where they can be stopped.

PEFT's `target_modules`, `rank_pattern` and others are regular expressions, and people use them as
such. One of twenty characters can take years for one name, and Python's `re` has no limit. So
before they are used they are all tried, on all names, in a process that is ended after some
seconds; what ended in time there takes no longer here.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from qlora_jax.errors import WeightsError

SECONDS = 10.0
_PROGRAM = """
import json, re, resource, sys
try:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
except (OSError, ValueError):  # an operating system that does not limit this
    pass
expressions, names = json.load(sys.stdin)
for how, expression in expressions:
    for name in names:
        getattr(re, how)(expression, name)
"""


def try_expressions(
    expressions: Sequence[tuple[str, str]], names: Sequence[str], path: pathlib.Path
) -> None:
    """Makes sure that expressions can be compared with names in a short time.

    Args:
      expressions: "match" or "fullmatch", and an expression that compiles.
      names: all that they will be compared with.
      path: of the file they are in, for the message.

    Raises:
      WeightsError: they take longer than `SECONDS`, or all memory.

    Example:
      >>> try_expressions([("match", ".*[qv]_proj")], ["model.layers.0.q_proj"], pathlib.Path("x"))
    """
    if not expressions:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([list(expressions), list(names)]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        said = ", ".join(repr(expression[:80]) for _, expression in expressions[:3])
        raise WeightsError(
            f"{path} has regular expressions ({said}) that cannot be compared with the names of "
            f"the model's layers within {SECONDS:g} s. Write the names out."
        ) from None
