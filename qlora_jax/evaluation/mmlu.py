"""MMLU: four choices a question, 57 subjects (arXiv 2009.03300), as the authors of it ask.

    The following are multiple choice questions (with answers) about  anatomy.

    <up to five solved questions of the subject>

    The pleura
    A. have no sensory innervation.
    B. are separated by a 2 mm space.
    C. extend into the neck.
    D. are composed of respiratory epithelium.
    Answer:

The answer is the likeliest of the four letters as the next token. (The two blanks in the first line
are theirs, and every published figure has them.) A prompt that is too long loses solved questions,
from the last one on, and never a part of the question.

The accuracy is given in two ways: "macro" is the mean over subjects, "micro" that over questions,
which is what papers print.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.data.data_files import find_files, read_objects
from qlora_jax.data.formats import BadField
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.generation import encode_prompt

LETTERS = "ABCD"
# Questions that are asked before what was found is handed on.
_GROUP = 512
_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
_OPTIONS = re.compile(r"(?s)(.*)\nA\. (.*?)\nB\. (.*?)\nC\. (.*?)\nD\. (.*?)\nAnswer:\s*\Z")
_SPLIT = re.compile(r"_(dev|test|val)\Z")
_NEED = (
    "question, choices and answer; subject, input and output; or the CSV files of the authors "
    "(question, four choices, answer)"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        subject: with underscores, as in "high_school_biology".
        text: the question.
        choices: four.
        answer: index of the right one.
    """

    subject: str
    text: str
    choices: tuple[str, str, str, str]
    answer: int

    def __str__(self) -> str:
        options = "".join(
            f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True)
        )
        return f"{self.text}{options}\nAnswer:"


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        key: subject and number of the question in its subject, "anatomy:3".
        logprobs: log-probabilities of the four letters as the next token.
        answer: index of the right one.
        shots: solved questions that had room in front of it.
    """

    key: str
    logprobs: tuple[float, float, float, float]
    answer: int
    shots: int

    @property
    def subject(self) -> str:
        """The subject."""
        return self.key.partition(":")[0]

    @property
    def is_right(self) -> bool:
        """Whether the likeliest letter is that of the answer."""
        return int(np.argmax(self.logprobs)) == self.answer


def read_questions(path: str | pathlib.Path) -> list[Question]:
    """Reads the questions of a file or folder.

    Args:
        path: JSON Lines, a JSON list, Parquet or CSV with the columns of `cais/mmlu` (question,
            subject, choices, answer as a number), those of the QLoRA authors (subject, input,
            output), or CSV files as MMLU's authors publish them, one a subject, with or without
            a header.

    Returns:
        In the order of the files.

    Raises:
        DataError: nothing is there, or a record cannot be understood; it is named.
    """
    found = []
    for file in find_files(path):
        records = _csv_rows(file) if file.name.endswith(".csv") else read_objects(file)
        for where, record in records:
            try:
                found.append(_question(record, _SPLIT.sub("", file.stem)))
            except (KeyError, ValueError, TypeError, AttributeError):
                what = record if isinstance(record, BadField) else f"{str(record)[:80]!r}"
                raise DataError(f"{where} is no question: {what}; needed: {_NEED}") from None
    if not found:
        raise DataError(f"{path} has no questions; needed: {_NEED}")
    return found


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    # Line ends inside of fields become those of Python.
    with path.open(encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[:1] == ["question"]:
                header = row
                break
            yield f"{path.name}:{number}", row
        else:
            return
        for row in csv.reader(file):
            number += 1
            yield f"{path.name}:{number}", dict(zip(header, row, strict=False))


def _question(record: Any, subject: str) -> Question:
    if isinstance(record, list):
        text, *choices, answer = record
    elif "input" in record:
        text, *choices = _OPTIONS.fullmatch(record["input"].partition("\n\n")[2]).groups()
        answer = record["output"].strip()
    else:
        text, answer = record["question"], record["answer"]
        choices = record.get("choices") or [record[f"choice{i}"] for i in range(4)]
    answer = LETTERS.index(answer) if str(answer) in tuple(LETTERS) else int(answer)
    if len(choices) != 4 or not 0 <= answer < 4 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{choices=}, {answer=}")
    subject = record.get("subject") or subject if isinstance(record, dict) else subject
    return Question(subject, text, tuple(choices), answer)


def prompt_text(question: Question, shots: Sequence[Question]) -> str:
    """The prompt, up to and without the answer.

    >>> q = Question("us_history", "Who?", ("w", "x", "y", "z"), 1)
    >>> print(prompt_text(q, [q]))
    The following are multiple choice questions (with answers) about  us history.
    <BLANKLINE>
    Who?
    A. w
    B. x
    C. y
    D. z
    Answer: B
    <BLANKLINE>
    Who?
    A. w
    B. x
    C. y
    D. z
    Answer:
    """
    header = _HEADER.format(subject="".join(f" {word}" for word in question.subject.split("_")))
    solved = "".join(f"{shot} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return f"{header}{solved}{question}"


def letter_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the four letters are behind "Answer:".

    Raises:
        DataError: a letter is no token of its own there.
    """
    asked = tokenizer.encode("Answer:")
    encoded = [tokenizer.encode(f"Answer: {letter}") for letter in LETTERS]
    found = [ids[-1] for ids in encoded]
    for letter, ids in zip(LETTERS, encoded, strict=True):
        # Where a letter is unknown it is the same token as the others.
        if ids[:-1] != asked or found.count(ids[-1]) > 1:
            raise DataError(
                f"MMLU is scored by the token behind 'Answer:', and this tokenizer has none for "
                f"' {letter}'"
            )
    return found


class Prompt(NamedTuple):
    """A question as the model reads it.

    Attributes:
        key: see `Answer`; so `answer` and `shots`.
        ids: token ids.
        shots: solved questions that had room in front of it.
        answer: index of the right choice.
    """

    key: str
    ids: list[int]
    shots: int
    answer: int


def write_prompts(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    solved: Sequence[Question] = (),
    *,
    shots: int = 5,
    max_len: int,
    done: Iterable[str] = (),
) -> Iterator[list[Prompt]]:
    """Writes the prompts, subject by subject.

    Args:
        tokenizer: the model's.
        questions: to ask.
        solved: those that are shown with their answers; the first `shots` of the subject.
        shots: at most so many.
        max_len: tokens of the longest prompt.
        done: keys of answers that are known already.

    Yields:
        Up to 512 prompts: of one subject with as many solved questions, or without any of all.

    Raises:
        DataError: a subject has no solved questions, or a question alone is too long.
    """
    if shots:
        _check_subjects(questions, solved)
    done = set(done)
    left = {
        subject: [
            (f"{subject}:{i}", q) for i, q in enumerate(group) if f"{subject}:{i}" not in done
        ]
        for subject, group in by_subject(questions).items()
    }
    groups = left.values() if shots else [list(itertools.chain(*left.values()))]
    for part in itertools.chain(*(itertools.batched(group, _GROUP) for group in groups)):
        shown = [shot for shot in solved if shot.subject == part[0][1].subject][:shots]
        prompts = [
            Prompt(key, *_fit(tokenizer, question, shown, max_len), question.answer)
            for key, question in part
        ]
        for count in sorted({prompt.shots for prompt in prompts}, reverse=True):
            yield [prompt for prompt in prompts if prompt.shots == count]


def ask(
    scorer: Scorer,
    letters: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    progress: Callable[[int], object] = lambda questions: None,
) -> list[Answer]:
    """Asks.

    Args:
        scorer: has the model.
        letters: see `letter_ids`.
        prompts: from `write_prompts`.
        progress: called with the number of questions that were asked.
    """
    logprobs = scorer.choose_next([one.ids for one in prompts], letters, progress=progress)
    return [
        Answer(one.key, tuple(map(float, row)), one.answer, one.shots)
        for one, row in zip(prompts, logprobs, strict=True)
    ]


def _check_subjects(questions: Sequence[Question], solved: Sequence[Question]) -> None:
    missing = sorted({q.subject for q in questions} - {q.subject for q in solved})
    if missing:
        raise DataError(
            f"there are no solved questions for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; give MMLU's dev questions, or shots=0"
        )


def by_subject(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The questions of each subject, in their order."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return groups


def _fit(
    tokenizer: Tokenizer, question: Question, shots: Sequence[Question], max_len: int
) -> tuple[list[int], int]:
    """The prompt with as many shots as there is room for, and their number."""
    for count in range(len(shots), -1, -1):
        ids = encode_prompt(tokenizer, prompt_text(question, shots[:count]))
        if len(ids) <= max_len:
            return ids, count
    raise DataError(
        f"a question of {question.subject} has {len(ids)} tokens without any solved one, more than "
        f"the {max_len} that are allowed: {question.text[:60]!r}"
    )


class Accuracy(NamedTuple):
    """A share of right answers, and its standard error."""

    value: float
    error: float
    questions: int


def summarize(answers: Sequence[Answer]) -> Mapping[str, Accuracy]:
    """Accuracy of each subject, and "micro" and "macro", see the module.

    Example:
        >>> right = Answer("a:0", (0.0, -1.0, -1.0, -1.0), 0, 5)
        >>> wrong = Answer("b:0", (0.0, -1.0, -1.0, -1.0), 1, 5)
        >>> found = summarize([right, right, wrong])
        >>> round(found["micro"].value, 3), found["macro"].value
        (0.667, 0.5)
    """
    subjects: dict[str, list[bool]] = {}
    for answer in answers:
        subjects.setdefault(answer.subject, []).append(answer.is_right)
    found = {subject: _accuracy(right) for subject, right in sorted(subjects.items())}
    rows = list(found.values())
    macro = sum(row.value for row in rows) / len(rows)
    error = math.sqrt(sum(row.error**2 for row in rows)) / len(rows)
    found["micro"] = _accuracy([right for group in subjects.values() for right in group])
    found["macro"] = Accuracy(macro, error, len(answers))
    return found


def _accuracy(right: Sequence[bool]) -> Accuracy:
    share, count = sum(right) / len(right), len(right)
    # Of a sample's mean; of a single question nothing is known.
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.5
    return Accuracy(share, error, count)
