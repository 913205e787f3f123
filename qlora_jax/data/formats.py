"""The record formats: from one JSON object of a file to a `Record`.

A format is a name, the keys that give it away, and a function. All formats end in one of two
shapes: a conversation (`messages`, to be rendered by the model's chat template) or plain `text`.
Whatever is wrong with an object is raised as a `BadField`, which says the field, what was found and
what is needed; the reader adds the file and line.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("system", "user", "assistant")


class BadField(Exception):
    """One thing wrong with one record; becomes a line of a `DataError` or of the report."""

    def __init__(self, field: str, found: str, need: str = ""):
        super().__init__(f"{field}: found {found}" + (f", need {need}" if need else ""))


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation or text of a data set.

    Attributes:
        record_id: where it stands, "train.jsonl:17".
        format: name of the format it was read from.
        messages: `{"role", "content"}` dictionaries: at most one system message, then user and
            assistant in turn, the last one by the assistant. Empty for plain text.
        text: the plain text; empty for a conversation.
    """

    record_id: str
    format: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages before the last answer, in the form `generate` takes.

        >>> parse_object({"prompt": "2+2?", "completion": "4"}, "prompt_completion", "a:1").prompt
        [{'role': 'user', 'content': '2+2?'}]
        """
        return [dict(message) for message in self.messages[:-1]]


def describe(value: Any) -> str:
    """Names a JSON value in a message: its kind, and its start if it has one worth showing.

    >>> describe("  "), describe([1]), describe(None), describe("x" * 90)[-12:]
    ("blank text '  '", 'a list', 'null', "...' (a text)")
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        if not value.strip():
            return f"blank text {value!r}" if value else "empty text"
        return f"{value!r} (a text)" if len(value) <= 40 else f"{value[:37] + '...'!r} (a text)"
    for kind, name in (
        (bool, "a boolean"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, kind):
            return name
    return type(value).__name__


def require(record: Mapping[str, Any], key: str, need: str) -> Any:
    """Looks a key up, or says which keys there are instead."""
    if key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise BadField(key, f"no such field (fields: {keys[:120]})", need)
    return record[key]


def check_text(value: Any, field: str, need: str, *, allow_empty: bool = False) -> str:
    """Accepts text that a tokenizer can encode.

    Args:
        value: what the file holds.
        field: its name in messages.
        need: what should stand there, for messages.
        allow_empty: whether empty or blank text is fine.

    Raises:
        BadField: if it is not text, is blank, or holds NUL or half a surrogate pair.
    """
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        raise BadField(field, describe(value), need)
    if "\0" in value:
        raise BadField(
            field, f"a NUL character at position {value.index(chr(0))}", "text without NUL"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair ({value[error.start]!a}) at position {error.start}"
        raise BadField(
            field, found, "valid Unicode; write the character itself or both halves"
        ) from None
    return value


def check_messages(messages: Any, field: str = "messages") -> tuple[dict[str, str], ...]:
    """Accepts a conversation that has something to learn.

    >>> question = {"role": "user", "content": "2+2?"}
    >>> check_messages([question, {"role": "assistant", "content": "4"}])[1]
    {'role': 'assistant', 'content': '4'}
    >>> check_messages([question, {"role": "bot", "content": "4"}])
    Traceback (most recent call last):
    qlora_jax.data.formats.BadField: messages[1].role: found 'bot' (a text), need one of system,
    user, assistant

    Raises:
        BadField: naming the message that has an unknown role, stands out of order, or is empty.
    """
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else describe(messages)
        raise BadField(field, found, 'a list of {"role", "content"} objects')
    checked = [_check_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    turns = checked[1:] if checked[0]["role"] == "system" else checked
    first = len(checked) - len(turns)
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            need = f"{expected!r}: an optional system message, then user and assistant in turn"
            raise BadField(f"{field}[{first + i}].role", repr(message["role"]), need)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadField(
            field,
            f"a conversation that ends with {checked[-1]['role']!r}",
            "an assistant's answer last",
        )
    return tuple(checked)


def _check_message(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadField(field, describe(message), 'an object with "role" and "content"')
    role = require(message, "role", f"one of {', '.join(ROLES)}") if "role" in message else None
    if role not in ROLES:
        found = describe(role) if "role" in message else "no such field"
        raise BadField(f"{field}.role", found, f"one of {', '.join(ROLES)}")
    if "content" not in message:
        raise BadField(f"{field}.content", "no such field", f"the text of the {role}'s message")
    content = check_text(
        message["content"],
        f"{field}.content",
        f"the {role}'s message as non-empty text",
        allow_empty=role == "system",
    )
    return {"role": role, "content": content}


def _parse_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": check_messages(require(record, "messages", "the list of messages"))}


def _parse_prompt_completion(record: Mapping[str, Any]) -> dict[str, Any]:
    prompt = check_text(require(record, "prompt", "the question"), "prompt", "non-empty text")
    need = "the answer as non-empty text"
    completion = check_text(require(record, "completion", need), "completion", need)
    return {
        "messages": (
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        )
    }


def _parse_text(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": check_text(require(record, "text", "non-empty text"), "text", "non-empty text")}


@dataclasses.dataclass(frozen=True)
class LineFormat:
    """A format with one record a line: the keys that give it away, and how to read an object."""

    keys: frozenset[str]
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]


LINE_FORMATS = {
    "messages": LineFormat(frozenset({"messages"}), _parse_messages),
    "prompt_completion": LineFormat(frozenset({"prompt", "completion"}), _parse_prompt_completion),
    "text": LineFormat(frozenset({"text"}), _parse_text),
}


def parse_object(record: Any, format: str, record_id: str) -> Record:
    """Turns one JSON object into a `Record`.

    >>> parse_object({"text": "Once upon a time"}, "text", "tales.jsonl:1").text
    'Once upon a time'

    Raises:
        BadField: if a field is missing, empty or of the wrong kind.
    """
    if not isinstance(record, dict):
        raise BadField("record", describe(record), "one JSON object a line")
    return Record(record_id, format, **LINE_FORMATS[format].parse(record))


def detect_format(record: Any) -> str | None:
    """Names the line format whose keys an object has, or None.

    >>> detect_format({"prompt": "2+2?", "completion": "4"}), detect_format({"question": "2+2?"})
    ('prompt_completion', None)
    """
    if isinstance(record, dict):
        for name, line_format in LINE_FORMATS.items():
            if line_format.keys <= record.keys():
                return name
    return None
