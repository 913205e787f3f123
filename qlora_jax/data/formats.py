"""What a record is, and what must be true of it.

All formats end in one or both of two shapes: a conversation (`messages`, to be rendered by a chat
template) and a literal `text` with the `spans` of it that the assistant writes (none: all of it is
to be learned, as in plain text). A set of instructions such as Alpaca has both: the messages, and
the text as its authors wrote it.

Whatever is wrong with an object is raised as a `BadField`, which says the field, what was found and
what is needed; the reader adds the file and line.
"""

import dataclasses
from collections.abc import Mapping
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
        text: the literal text; empty where only a chat template can write the conversation.
        spans: start and end characters of the parts of `text` that the assistant writes; none if
            all of it is to be learned.
    """

    record_id: str
    format: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages before the last answer, in the form `generate` takes.

        >>> Record("a:1", "prompt_completion", **pair("2+2?", "4")).prompt
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
        if "\udc80" <= value[error.start] <= "\udcff":
            byte = ord(value[error.start]) - 0xDC00
            found = f"byte 0x{byte:02x} at position {error.start}, which is not UTF-8"
            need_utf8 = "UTF-8 (iconv -f LATIN1 -t UTF-8 converts old files)"
            raise BadField(field, found, need_utf8) from None
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


def parse_pair(
    record: Mapping[str, Any], source: str = "prompt", target: str = "completion"
) -> dict[str, Any]:
    """Reads a question and its answer: the text is one after the other, with nothing between.

    Args:
        record: one object.
        source: the key of the question.
        target: the key of the answer.

    Raises:
        BadField: if one of them is missing or blank.
    """
    need = "the answer as non-empty text"
    question = check_text(require(record, source, "the question"), source, "non-empty text")
    answer = check_text(require(record, target, need), target, need)
    return pair(question, answer)


def pair(source: str, target: str, question: str = "") -> dict[str, Any]:
    """The fields of a `Record` with one question and one answer.

    Args:
        source: the prompt, literally.
        target: the answer, literally.
        question: what the user's message is where it is not the whole prompt.

    >>> pair("Q: 2+2?\\nA: ", "4", question="2+2?")["spans"]
    ((11, 12),)
    """
    messages = ("user", question or source), ("assistant", target)
    return {
        "messages": tuple({"role": role, "content": content} for role, content in messages),
        "text": source + target,
        "spans": ((len(source), len(source) + len(target)),),
    }
