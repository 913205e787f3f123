"""The faults that this suite does to a run, each declared once, and the table of them.

A test says what is done, with which code the command ends, what its user reads and what holds:

    @fault("A bit flips", exit=2, says=("is damaged",), holds="older steps are as they were")
    def test_...(seen, ...):
        seen(outcome)

`seen` compares code and words with what really happened, so the table cannot say anything else.
`python tests/faults/catalogue.py` writes the table into docs/reliability.md.
"""

import contextlib
import dataclasses
import importlib
import io
import pathlib
import sys
from collections.abc import Callable

FOLDER = pathlib.Path(__file__).parent
DOCUMENT = FOLDER.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
# The files with faults, in the order of the table, and what their part of it is called.
PARTS = {
    "test_bad_steps": "Numbers and memory",
    "test_processes": "Processes, disks and directories",
    "test_checkpoint_damage": "Damaged checkpoints",
    "test_packed_damage": "Damaged and unfinished base models",
    "test_identity": "Something else than the run began with",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done, and what has to come of it.

    Attributes:
        title: what is done.
        exit: code of the command.
        says: parts of what it prints, in their order; empty: nothing about it.
        holds: what the test finds afterwards.
    """

    title: str
    exit: int | str
    says: tuple[str, ...]
    holds: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: its code, and all that it printed."""

    code: int | str
    text: str


def fault(title: str, *, exit: int | str, says: tuple[str, ...], holds: str) -> Callable:
    """Declares what the test below does."""

    def declare(test: Callable) -> Callable:
        test.fault = Fault(title, exit, says, holds)
        return test

    return declare


def check(declared: Fault, outcome: Outcome) -> None:
    """Compares what happened with what was declared."""
    assert outcome.code == declared.exit, outcome.text
    at = 0
    for part in declared.says:
        found = outcome.text.find(part, at)
        assert found >= 0, f"{part!r} is not said, or not in its place:\n{outcome.text}"
        at = found + len(part)
    assert "Traceback" not in outcome.text, outcome.text


def attempt(main: Callable[[], object]) -> Outcome:
    """Ends a function as a script ends (`run_main`), without a process of its own."""
    from qlora_jax import errors  # the table is made without JAX

    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            errors.run_main(main)
        except SystemExit as end:
            return Outcome(end.code or 0, text.getvalue())


def table() -> str:
    """All faults, as Markdown."""
    lines = []
    for name, title in PARTS.items():
        module = importlib.import_module(name)
        tests = [value for key, value in vars(module).items() if key.startswith("test_")]
        found = [test.fault for test in tests if hasattr(test, "fault")]
        lines += [f"### {title}", "", "| fault | exit | what is said | what holds |"]
        lines += ["| --- | --- | --- | --- |"]
        for one in found:
            said = " … ".join(one.says) or "–"
            lines.append(f"| {one.title} | {one.exit} | {said} | {one.holds} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def document(text: str) -> str:
    """A document with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
