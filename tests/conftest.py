"""What every test shares: the CPU backend, in one process, with two devices for sharding."""

import os
import signal

from cuda_wheels import REASON

# Set before JAX starts its backends: a test must not take a GPU from a run, and two devices make
# NamedSharding and shard_map testable anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
# A shell that starts pytest in the background has it ignore Ctrl-C, which tests send themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    """Says once, and by name, what was not tested for want of a download."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if REASON in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests skipped: {REASON}", yellow=True)
