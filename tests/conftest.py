"""What every test shares: the CPU backend, in one process, with two devices for sharding."""

import os
import signal

import pytest
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


@pytest.fixture(scope="module")
def compile_each_program_once(tmp_path_factory):
    """Most tests of a file compile the same step; a cache on disk keeps the file fast."""
    import jax  # not before the variables above are set

    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
