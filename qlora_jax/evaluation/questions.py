"""Questions of chat benchmarks, and what systems answered: both as JSON Lines of several kinds.

A question has an id and one or several turns, which are asked one after another:

    {"question_id": 1, "category": "generic", "text": "How can I …?"}          Vicuna
    {"question_id": 81, "category": "writing", "turns": ["Compose …", "Now …"]}  MT-bench
    {"question_id": "a38b…", "text": "### Human: …### Assistant: …### Human: …### Assistant:"}

The last is Open Assistant's as the QLoRA authors wrote it: earlier turns are given, and only the
answer to the last one is asked for. The same can be written as `messages`. `question` and `prompt`
are read as `text` is; without ids, questions are numbered.

An answer is a record of the question with `generation` (one turn) or `generations` beside it, and
belongs to its `model`. The authors' files of generations have this form, too (their
`generation_truncated` is what their judges saw, and is taken before `generation`). FastChat's
answers do not repeat the question, which is then looked up by its id.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.data.data_files import find_files, read_objects
from qlora_jax.data.formats import BadField
from qlora_jax.data.line_formats import GUANACO_MARKERS
from qlora_jax.errors import DataError

_ROLES = {"system", "user", "assistant"}
_TEXTS = ("text", "question", "prompt")
_MARKED = re.compile("|".join(map(re.escape, GUANACO_MARKERS)))
_NEED_QUESTION = 'need "turns" (a list of texts), "messages" (the last one the user\'s) or "text"'
_NEED_ANSWER = (
    'need "text" (or "turns") and "generation" (or "generations"), as --suite=chat writes them; or '
    'FastChat\'s "text" or "choices" with an "answer_id"'
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one or several turns.

    Attributes:
        question_id: of the file, as a text; else a number.
        text: the whole, as a judge sees it.
        turns: what the user says, one after another; at least one.
        history: messages before the first turn.
        category: empty where unknown.
        written_id: the id as the file has it, if that is a number.
    """

    question_id: str
    text: str
    turns: tuple[str, ...]
    history: tuple[Mapping[str, str], ...] = ()
    category: str = ""
    written_id: int | None = dataclasses.field(default=None, compare=False)

    def shown(self, turn: int) -> str:
        """What a judge sees of the question in one of its turns, from 0.

        >>> Question("1", "all of it", ("Why?", "Really?")).shown(0)
        'Why?'
        """
        if len(self.turns) == 1:
            return self.text
        return in_turns(self.turns[: turn + 1])

    def messages(self, replies: Sequence[str]) -> list[Mapping[str, str]]:
        """The conversation after some replies, up to the next turn of the user.

        >>> question = Question("1", "", ("Why?", "Really?"))
        >>> [message["content"] for message in question.messages(["Because."])]
        ['Why?', 'Because.', 'Really?']
        """
        found = list(self.history)
        for i, turn in enumerate(self.turns[: len(replies) + 1]):
            found.append({"role": "user", "content": turn})
            if i < len(replies):
                found.append({"role": "assistant", "content": replies[i]})
        return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a system answered to a question.

    Attributes:
        question: what was asked.
        system: who answered.
        replies: one to each turn.
    """

    question: Question
    system: str
    replies: tuple[str, ...]


def in_turns(texts: Sequence[str]) -> str:
    """One text of the turns of one side; a single one stays as it is.

    >>> in_turns(["Why?"]), in_turns(["Why?", "Really?"])
    ('Why?', '**Turn 1**\\n\\nWhy?\\n\\n**Turn 2**\\n\\nReally?')
    """
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"**Turn {i}**\n\n{text}" for i, text in enumerate(texts, 1))


def read_questions(spec: str | pathlib.Path) -> list[Question]:
    """Reads questions.

    Args:
        spec: a file or folder, see `find_files`.

    Returns:
        The questions in the order of the file.

    Raises:
        DataError: a record is not a question, or two have the same id.
    """
    found: dict[str, Question] = {}
    for where, record in _records(spec, _NEED_QUESTION):
        question = _question(record, str(len(found) + 1), where)
        if question.question_id in found:
            raise DataError(f"{where}: there is another question {question.question_id} before")
        found[question.question_id] = question
    if not found:
        raise DataError(f"{spec} holds no question; {_NEED_QUESTION}")
    return list(found.values())


def _records(spec: str | pathlib.Path, need: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in find_files(spec):
        for where, record in read_objects(file):
            if isinstance(record, BadField):
                raise DataError(f"{where}: {record}; {need}")
            if not isinstance(record, dict):
                raise DataError(f"{where}: not an object; {need}")
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # no tokenizer and no endpoint takes it
                raise DataError(f"{where}: half of a surrogate pair; write the character") from None
            yield where, record


def _question(record: Mapping[str, Any], number: str, where: str) -> Question:
    question_id = record.get("question_id", number)
    if not isinstance(question_id, str | int):
        raise DataError(f"{where}: question_id must be a text or a number, got {question_id!r}")
    written_id = question_id if isinstance(question_id, int) else None
    category = record.get("category")
    category = category if isinstance(category, str) else ""
    history: Sequence[Mapping[str, str]] = ()
    if "turns" in record:
        turns = record["turns"]
        text = in_turns(turns) if _are_texts(turns) else ""
    elif "messages" in record:
        messages = record["messages"]
        if not _is_conversation(messages):
            raise DataError(f"{where}: messages that do not end in the user's turn")
        *history, last = messages
        turns, text = [last["content"]], _transcript(messages)
    else:
        text = next((record[name] for name in _TEXTS if name in record), None)
        history, turns = _split_marked(text) if isinstance(text, str) else ((), [text])
    if not _are_texts(turns):
        raise DataError(f"{where}: not a question; {_NEED_QUESTION}")
    return Question(str(question_id), text, tuple(turns), tuple(history), category, written_id)


def _are_texts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(text, str) and text.strip() for text in value)
    )


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(one, dict)
            and one.get("role") in _ROLES
            and isinstance(one.get("content"), str)
            for one in messages
        )
        and messages[-1]["role"] == "user"
    )


def _transcript(messages: Sequence[Mapping[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in messages)


def _split_marked(text: str) -> tuple[list[dict[str, str]], list[str]]:
    """The messages before the last turn, and that, of a text with a marker before every turn.

    >>> _split_marked("### Human: a ### Assistant: b ### Human: c ### Assistant:")[1]
    ['c']
    >>> _split_marked("What does ### Human: mean?")
    ([], ['What does ### Human: mean?'])
    """
    marks = list(_MARKED.finditer(text))
    wanted = [GUANACO_MARKERS[i % 2] for i in range(len(marks))]
    begins = bool(marks) and not text[: marks[0].start()].strip()
    ends = bool(marks) and len(marks) % 2 == 0 and not text[marks[-1].end() :].strip()
    if not (begins and ends and [mark[0] for mark in marks] == wanted):
        return [], [text]
    pieces = [text[a.end() : b.start()].strip() for a, b in zip(marks, marks[1:], strict=False)]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": piece} for i, piece in enumerate(pieces)]
    return messages[:-1], [pieces[-1]]


def read_answers(spec: str, questions: Sequence[Question] = ()) -> list[Answer]:
    """Reads what systems answered.

    Args:
        spec: a file or folder, or `name=path`; a name is that of the system, else it is the
            record's `model` or `model_id`, else the name of the file.
        questions: for files that do not repeat them; where given, other questions are left out.

    Returns:
        The answers in the order of the files.

    Raises:
        DataError: a record is not an answer, its question is not known, or a system has answered
            a question twice.
    """
    name, path = _split_name(spec)
    known = {question.question_id: question for question in questions}
    found: dict[tuple[str, str], Answer] = {}
    for where, record in _records(path, _NEED_ANSWER):
        record = dict(record)
        system = name or record.get("model") or record.get("model_id") or pathlib.Path(path).stem
        replies = _take_replies(record)
        if not isinstance(system, str) or replies is None:
            raise DataError(f"{where}: not an answer; {_NEED_ANSWER}")
        question_id = str(record.get("question_id", record.get("text", "")))
        if questions:
            question = known.get(question_id)
            if question is None:
                continue
        elif any(key in record for key in ("turns", "messages", *_TEXTS)):
            question = _question(record, question_id, where)
        else:
            raise DataError(
                f"{where}: an answer without its question; give the questions, too: --data=FILE"
            )
        if len(replies) != len(question.turns):
            raise DataError(
                f"{where}: {len(replies)} replies to the {len(question.turns)} turns of question "
                f"{question_id}"
            )
        if (system, question_id) in found:
            raise DataError(f"{where}: {system} has answered question {question_id} before")
        found[system, question_id] = Answer(question, system, tuple(replies))
    if not found:
        raise DataError(f"{spec} holds no answer to these questions; {_NEED_ANSWER}")
    return list(found.values())


def _split_name(spec: str) -> tuple[str, str]:
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not pathlib.Path(spec).exists() else ("", spec)


def _take_replies(record: dict[str, Any]) -> list[str] | None:
    """Takes the replies out of a record, so that what is left is the question, if it is there."""
    replies = record.pop("generations", None)
    names = ("answer", "generation", "generation_truncated")
    # The authors' judges saw what was left when the turns that a model made up were taken off.
    single = [record.pop(name) for name in names if name in record][-1:]
    if replies is None and single:
        replies = single
    if replies is None and "answer_id" in record:
        choices = record.pop("choices", None)
        try:
            replies = [record.pop("text")] if choices is None else choices[0]["turns"]
        except (KeyError, IndexError, TypeError):
            return None
    # A system may have said nothing.
    whole = isinstance(replies, list) and all(isinstance(reply, str) for reply in replies)
    return replies if whole and replies else None
