"""Answers from files, for the game: what other systems said to questions, days or years ago.

A file is JSON Lines in the form of the QLoRA authors' generations,

    {"question_id": 1, "text": "How can I improve …?", "generation": "Start with …"}

and belongs to one system, whose name is given with it; else it is the record's `model`, so that one
file can hold several systems, or the file's own name. `question` and `answer` are read as `text`
and `generation` are; the authors' `generation_truncated`, which their judges saw, comes before it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from qlora_jax.errors import DataError
from qlora_jax.files import resolve_path

_NEED = (
    'need JSON Lines with "text" (or "question"), "generation" (or "answer") and, if there is one, '
    '"question_id" and "model"'
)


@dataclasses.dataclass(frozen=True)
class StoredQuestion:
    """A question and what at least two systems answered.

    Attributes:
        question_id: of the file; the question itself where it has none.
        question: the text.
        answers: by the name of the system.
    """

    question_id: str
    question: str
    answers: dict[str, str]


def read_stored(specs: Sequence[str]) -> list[StoredQuestion]:
    """Reads files of answers.

    Args:
        specs: each a path, or `name=path`.

    Returns:
        The questions that at least two systems have answered, in the order of the files.

    Raises:
        DataError: a record is not an answer, or no question has two.
    """
    found: dict[str, StoredQuestion] = {}
    for spec in specs:
        name, path = _split(spec)
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                _add(found, line, name, path, number)
    questions = [question for question in found.values() if len(question.answers) > 1]
    if not questions:
        raise DataError(
            f"{', '.join(specs)}: no question has the answers of two systems. Give a file for each "
            "system, --answers=NAME=FILE twice, or one whose records name their model"
        )
    return questions


def _split(spec: str) -> tuple[str, pathlib.Path]:
    name, equals, path = spec.partition("=")
    if not equals or pathlib.Path(spec).exists():
        name, path = "", spec
    file = resolve_path(path)
    if not file.is_file():
        raise DataError(f"{file} is a folder; {_NEED}")
    return name, file


def _add(
    found: dict[str, StoredQuestion], line: str, name: str, file: pathlib.Path, number: int
) -> None:
    where = f"{file}, line {number}"
    try:
        record = json.loads(line)
        question = record.get("question", record.get("text"))
        generation = record.get("generation_truncated", record.get("generation"))
        answer = record.get("answer", generation)
        system = name or record.get("model", file.stem)
        question_id = str(record.get("question_id", question))
    except (ValueError, AttributeError):
        raise DataError(f"{where}: not a JSON object; {_NEED}") from None
    if not all(isinstance(text, str) for text in (question, answer, system)):
        raise DataError(f"{where}: not an answer to a question; {_NEED}")
    entry = found.setdefault(question_id, StoredQuestion(question_id, question, {}))
    if entry.question != question:
        raise DataError(
            f"{where}: question {question_id} is another one here than before; give files of one "
            "set of questions"
        )
    entry.answers.setdefault(system, answer.strip())
