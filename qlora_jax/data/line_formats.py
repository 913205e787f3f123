"""The formats of data files: from one object of a file to its records.

A format is a name, the keys that give it away, and a function. `LINE_FORMATS` has those that a file
of one's own may be in; `qlora_jax.data.sets` has the published sets of instructions, each with the
mapping of its authors, made of the same functions.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qlora_jax.data.formats import (
    BadField,
    Record,
    check_messages,
    check_text,
    describe,
    pair,
    parse_pair,
    require,
)

Fields = dict[str, Any]
Parse = Callable[[Mapping[str, Any]], Fields | list[Fields]]

# Stanford's template as QLoRA's authors write it: with a space at the end, unlike Stanford's own.
_ALPACA = (
    "Below is an instruction that describes a task{further}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response: "
)
_ALPACA_FURTHER = ", paired with an input that provides further context"
GUANACO_MARKERS = ("### Human:", "### Assistant:")
HH_MARKERS = ("\n\nHuman:", "\n\nAssistant:")
# Names that the tools of the last years gave to the three roles.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _parse_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": check_messages(require(record, "messages", "the list of messages"))}


def _parse_text(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": check_text(require(record, "text", "non-empty text"), "text", "non-empty text")}


def parse_conversations(record: Mapping[str, Any]) -> Fields:
    """Reads ShareGPT's `conversations`: a list of `{"from", "value"}`.

    >>> turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    >>> parse_conversations({"conversations": turns})["messages"][1]
    {'role': 'assistant', 'content': '4'}
    """
    turns = require(record, "conversations", 'a list of {"from", "value"} objects')
    if not isinstance(turns, list):
        raise BadField("conversations", describe(turns), 'a list of {"from", "value"} objects')
    messages = []
    for i, turn in enumerate(turns):
        field = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise BadField(field, describe(turn), 'an object with "from" and "value"')
        sender = turn.get("from", turn.get("role"))
        role = _ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            found = describe(sender) if {"from", "role"} & turn.keys() else "no such field"
            raise BadField(f"{field}.from", found, f"one of {', '.join(_ROLES)}")
        messages.append({"role": role, "content": turn.get("value", turn.get("content"))})
    return {"messages": check_messages(messages, "conversations")}


def parse_alpaca(record: Mapping[str, Any], answer: str = "output") -> Fields:
    r"""Reads an instruction with or without an input, in Stanford's template.

    As a conversation, the question is the instruction, an empty line and the input.

    >>> record = parse_alpaca({"instruction": "Add.", "input": "2, 2", "output": "4"})
    >>> record["text"][-55:]
    '### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response: 4'
    >>> record["messages"][0]["content"]
    'Add.\n\n2, 2'
    """
    need = "the instruction as non-empty text"
    instruction = check_text(require(record, "instruction", need), "instruction", need)
    context = record.get("input") or ""
    check_text(context, "input", "text, or nothing", allow_empty=True)
    need = "the answer as non-empty text"
    output = check_text(require(record, answer, need), answer, need)
    source = _ALPACA.format(
        further=_ALPACA_FURTHER if context else "",
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return pair(source, output, question)


def parse_dolly(record: Mapping[str, Any]) -> Fields:
    """Reads Dolly's instruction, context and response."""
    if "response" not in record:
        return parse_alpaca(record)
    return parse_alpaca({**record, "input": record.get("context") or ""}, answer="response")


def parse_dialogue(text: Any, field: str, markers: tuple[str, str]) -> Fields:
    """Reads a dialogue that is one text, with a marker before every turn.

    The assistant writes from behind its marker to the end of the user's next marker: what it has to
    learn is its answer, and to hand over, which is also where generation stops. There are
    `messages` only if the roles take turns; a last question without an answer is left out of them.

    Args:
        text: what the file holds.
        field: its name in messages.
        markers: before the user's turns and before the assistant's.

    >>> fields = parse_dialogue("### Human: Hi### Assistant: Oh", "text", GUANACO_MARKERS)
    >>> [fields["text"][start:end] for start, end in fields["spans"]]
    [' Oh']
    """
    need = f"a dialogue with {markers[0].strip()!r} and {markers[1].strip()!r}"
    check_text(text, field, need)
    turns = list(re.finditer("|".join(map(re.escape, markers)), text))
    ends = [match.start() for match in turns[1:]] + [len(text)]
    messages, spans = [], []
    for i, (match, end) in enumerate(zip(turns, ends, strict=True)):
        role = ("user", "assistant")[markers.index(match[0])]
        messages.append({"role": role, "content": text[match.end() : end].strip()})
        if role == "assistant" and messages[-1]["content"]:
            hands_over = i + 1 < len(turns) and turns[i + 1][0] == markers[0]
            spans.append((match.end(), turns[i + 1].end() if hands_over else end))
    if not spans:
        found = f"no answer behind {markers[1].strip()!r} in {describe(text)}"
        raise BadField(field, found, need)
    return {"text": text, "spans": tuple(spans), "messages": _in_turn(messages)}


def _in_turn(messages: list[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The messages if they are a conversation, else none."""
    if messages[-1]["role"] == "user":
        messages = messages[:-1]
    try:
        return check_messages(messages)
    except BadField:
        return ()


@dataclasses.dataclass(frozen=True)
class LineFormat:
    """A format with one object a line: the keys that give it away, and how to read an object.

    Attributes:
        keys: fields that an object of this format has.
        parse: gives the fields of a `Record`, or of several in a list.
    """

    keys: frozenset[str]
    parse: Parse


LINE_FORMATS = {
    "messages": LineFormat(frozenset({"messages"}), _parse_messages),
    "prompt_completion": LineFormat(frozenset({"prompt", "completion"}), parse_pair),
    "text": LineFormat(frozenset({"text"}), _parse_text),
    "conversations": LineFormat(frozenset({"conversations"}), parse_conversations),
    "alpaca": LineFormat(frozenset({"instruction", "output"}), parse_alpaca),
    "input_output": LineFormat(
        frozenset({"input", "output"}), partial(parse_pair, source="input", target="output")
    ),
}


def parse_object(record: Any, parse: Parse, format: str, record_id: str) -> list[Record]:
    """Turns one JSON object into its records, mostly one.

    >>> tale = {"text": "Once upon a time"}
    >>> parse_object(tale, LINE_FORMATS["text"].parse, "text", "tales.jsonl:1")[0].text
    'Once upon a time'

    Raises:
        BadField: if a field is missing, empty or of the wrong kind.
    """
    if not isinstance(record, dict):
        raise BadField("record", describe(record), "one JSON object a line")
    found = parse(record)
    if isinstance(found, dict):
        return [Record(record_id, format, **found)]
    return [Record(f"{record_id}#{i}", format, **fields) for i, fields in enumerate(found, 1)]


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
