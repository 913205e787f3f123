"""Prints versions, devices, memory, disk and what is missing, to paste into a bug report.

python scripts/doctor.py
"""

from qlora_jax import command_line, doctor


def main() -> None:
    """Prints the report."""
    print(doctor.report())


if __name__ == "__main__":
    command_line.run(main)
