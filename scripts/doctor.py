"""Prints versions, devices, memory, disk and what is missing, to paste into a bug report.

    python scripts/doctor.py
    python scripts/doctor.py --workdir=runs/quickstart

With `--workdir` it reads all of a run instead: which checkpoints are good, what is damaged, and how
to go on. It changes nothing. Exit code 0: nothing is damaged. 1: something is. 2: there is no run.
"""

from absl import flags

from qlora_jax import command_line, doctor
from qlora_jax.training.diagnosis import diagnose

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run to look at")


def main() -> int | None:
    """Prints the report."""
    if _WORKDIR.value is None:
        print(doctor.report())
        return None
    found = diagnose(_WORKDIR.value)
    print(found.text)
    return None if found.healthy else 1


if __name__ == "__main__":
    command_line.run(main)
