"""The published sets of instructions: where each is, and how its authors' code reads it.

The QLoRA paper (arXiv 2305.14314, section 5.1 and appendix B) trains on eight sets. What its code
feeds the model for each is a *source* without loss and a *target* with loss, both literal text and
no chat template: `parse` gives exactly these. Two sets have an empty source, so the loss is on
everything, questions included: OASST1 and HH-RLHF (`train_on="all"`).

`chat_format` is how a question is asked of a model that was trained on the set, and what ends its
answer; see `qlora_jax.data.chat_formats`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from qlora_jax.data.formats import BadField, check_text, describe, pair, parse_pair, require
from qlora_jax.data.line_formats import (
    GUANACO_MARKERS,
    HH_MARKERS,
    LINE_FORMATS,
    Fields,
    Parse,
    parse_alpaca,
    parse_conversations,
    parse_dialogue,
    parse_dolly,
)

# GPT-3's end token, which Self-Instruct's completions end with; the model's own comes in its place.
_GPT3_END = "<|endoftext|>"
_FLAN_COLUMNS = ("question", "answer", "rationale")
_VERDICT = "The answer is "


@dataclasses.dataclass(frozen=True)
class InstructionSet:
    """A published set.

    Attributes:
        parse: reads one object.
        hub: its name on the Hugging Face hub, "" where it has none with files to read.
        files: patterns of the files to train on in there; empty: all.
        columns: of a TSV file without a header.
        train_on: what carries loss in the authors' code.
        chat_format: how to ask a model that was trained on it; "model": its own template.
        literal: whether the text is as the set's authors wrote it, which is then trained on rather
            than the conversation in a chat template.
    """

    parse: Parse
    hub: str = ""
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    train_on: Literal["assistant", "all"] = "assistant"
    chat_format: str = "plain"
    literal: bool = True


def parse_oasst1(record: Mapping[str, Any]) -> Fields:
    """Reads a dialogue of openassistant-guanaco, or a raw tree of OASST1.

    Of a tree the best-ranked reply is taken at every level (the first one where none has a rank),
    as far down as the assistant answers.

    >>> best, other = ({"role": "assistant", "text": t, "rank": r} for t, r in [("4", 0), ("5", 1)])
    >>> tree = {"role": "prompter", "text": "2+2?", "replies": [other, best]}
    >>> parse_oasst1({"prompt": tree})["text"]
    '### Human: 2+2?### Assistant: 4'
    """
    if "text" in record or "prompt" not in record:
        need = "a dialogue, or 'prompt' with a tree of replies"
        return parse_dialogue(require(record, "text", need), "text", GUANACO_MARKERS)
    turns, message, field = [], record["prompt"], "prompt"
    while message is not None:
        turns.append(_oasst_turn(message, field, len(turns)))
        replies = [
            (i, reply)
            for i, reply in enumerate(message.get("replies") or [])
            if isinstance(reply, dict) and not reply.get("deleted")
        ]
        best = min(replies, key=lambda item: _rank(item[1]), default=(0, None))
        field, message = f"{field}.replies[{best[0]}]", best[1]
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise BadField("prompt.replies", "no reply", "at least one answer of the assistant")
    names = GUANACO_MARKERS
    text = "".join(f"{names[i % 2]} {turn}" for i, turn in enumerate(turns))
    spans, position = [], 0
    for i, turn in enumerate(turns):
        start = position + len(names[i % 2])
        position = start + 1 + len(turn)
        if i % 2:
            last = i + 1 == len(turns)
            spans.append((start, position if last else position + len(names[0])))
    messages = tuple(
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    )
    return {"text": text, "spans": tuple(spans), "messages": messages}


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def _oasst_turn(message: Any, field: str, depth: int) -> str:
    if not isinstance(message, dict):
        raise BadField(field, describe(message), 'a message with "text", "role" and "replies"')
    role = ("prompter", "assistant")[depth % 2]
    if message.get("role") != role:
        raise BadField(f"{field}.role", describe(message.get("role")), repr(role))
    replies = message.get("replies")
    if replies is not None and not isinstance(replies, list):
        raise BadField(f"{field}.replies", describe(replies), "a list of messages")
    return check_text(message.get("text"), f"{field}.text", f"the {role}'s non-empty text")


def parse_hh_rlhf(record: Mapping[str, Any]) -> Fields:
    """Reads the chosen one of the two dialogues."""
    chosen = require(record, "chosen", "the better dialogue")
    return parse_dialogue(chosen, "chosen", HH_MARKERS)


def parse_chip2(record: Mapping[str, Any]) -> Fields:
    r"""Reads one question and one answer out of OIG's text.

    >>> parse_chip2({"text": "<human>: 2+2?\n<bot>: 4"})["text"]
    '2+2?4'
    """
    need = r"'<human>: question\n<bot>: answer'"
    text = check_text(require(record, "text", need), "text", need)
    parts = text.split("\n<bot>: ")
    if len(parts) < 2:
        raise BadField("text", f"no line '<bot>: ' in {describe(text)}", need)
    source = parts[0].replace("<human>: ", "")
    check_text(source, "text", "a question before '<bot>: '")
    return pair(source, check_text(parts[1], "text", "an answer after '<bot>: '"))


def parse_self_instruct(record: Mapping[str, Any]) -> Fields | list[Fields]:
    r"""Reads a prompt and completion of the fine-tuning set, or a task with its instances.

    A task (the seed tasks, the user-oriented ones) becomes one record an instance, with the prompt
    that the set's authors write.

    >>> task = {"instruction": "Add.", "instances": [{"input": "2, 2", "output": "4"}]}
    >>> parse_self_instruct(task)[0]["text"]
    'Add.\n\n2, 2\n\nOutput: 4'
    """
    if "instances" not in record:
        fields = parse_pair(record)
        question, answer = (message["content"] for message in fields["messages"])
        need = f"an answer before {_GPT3_END}"
        return pair(question, check_text(answer.removesuffix(_GPT3_END), "completion", need))
    instruction = check_text(record.get("instruction"), "instruction", "the task as non-empty text")
    found = []
    for field, instance in _instances(record, "instances"):
        context = check_text(instance.get("input"), f"{field}.input", "text", allow_empty=True)
        answer = check_text(instance.get("output"), f"{field}.output", "the answer")
        parts = [part.strip() for part in (instruction, context) if part.strip()]
        source = "\n\n".join([*parts, "Output:"])
        found.append(pair(source, f" {answer.strip()}", "\n\n".join(parts)))
    return found


def parse_unnatural(record: Mapping[str, Any], reformulations: bool) -> list[Fields]:
    """Reads the instances of a task, and those of its reformulations."""
    lists = ["instances"] + (["reformulations"] if record.get("reformulations") else [])
    need = "the answer as non-empty text"
    return [
        pair(
            check_text(
                instance.get("instruction_with_input"), f"{field}.instruction_with_input", "a task"
            ),
            check_text(instance.get("output"), f"{field}.output", need),
        )
        for name in (lists if reformulations else lists[:1])
        for field, instance in _instances(record, name)
    ]


def _instances(record: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    instances = require(record, key, "a list of objects")
    if not isinstance(instances, list) or not instances:
        found = "an empty list" if instances == [] else describe(instances)
        raise BadField(key, found, "a list of objects")
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise BadField(f"{key}[{i}]", describe(instance), "an object")
    return [(f"{key}[{i}]", instance) for i, instance in enumerate(instances)]


def parse_flan(record: Mapping[str, Any], rationale: bool) -> Fields:
    r"""Reads a question and its answer, or the way to it first.

    TSV files have the columns question, answer and rationale; JSON shards have `inputs` and
    `targets`, which hold the rationale already where there is one.

    >>> record = {"question": "2+2?", "answer": "4", "rationale": "Two and two."}
    >>> parse_flan(record, rationale=True)["messages"][1]["content"]
    'Two and two. The answer is 4.'
    """
    if "inputs" in record or "targets" in record:
        return parse_pair(record, "inputs", "targets")
    fields = parse_pair(record, "question", "answer")
    if not rationale:
        return fields
    question, answer = (message["content"] for message in fields["messages"])
    need = "the way to the answer as non-empty text"
    why = check_text(require(record, "rationale", need), "rationale", need)
    return pair(question, f"{why.strip()} {_VERDICT}{answer.strip()}.")


def parse_ultrachat(record: Mapping[str, Any]) -> Fields:
    """Reads UltraChat's `data`, a list of texts in turn, or `conversations`, or `messages`."""
    if "data" not in record:
        return (
            LINE_FORMATS["messages"].parse(record)
            if "messages" in record
            else parse_conversations(record)
        )
    texts = record["data"]
    if not isinstance(texts, list):
        raise BadField("data", describe(texts), "a list of texts, user and assistant in turn")
    turns = [{"from": ("user", "assistant")[i % 2], "value": text} for i, text in enumerate(texts)]
    return parse_conversations({"conversations": turns})


SETS = {
    "oasst1": InstructionSet(
        parse_oasst1,
        "timdettmers/openassistant-guanaco",
        ("*train*", "*ready.trees*"),
        train_on="all",
        chat_format="guanaco",
    ),
    "alpaca": InstructionSet(parse_alpaca, "tatsu-lab/alpaca", chat_format="alpaca"),
    "alpaca-clean": InstructionSet(parse_alpaca, "yahma/alpaca-cleaned", chat_format="alpaca"),
    "flan_v2": InstructionSet(partial(parse_flan, rationale=False), columns=_FLAN_COLUMNS),
    "flan_v2_cot": InstructionSet(partial(parse_flan, rationale=True), columns=_FLAN_COLUMNS),
    "self-instruct": InstructionSet(parse_self_instruct, "yizhongw/self_instruct"),
    "unnatural-instructions": InstructionSet(partial(parse_unnatural, reformulations=True)),
    "unnatural-instructions-core": InstructionSet(partial(parse_unnatural, reformulations=False)),
    "hh-rlhf": InstructionSet(
        parse_hh_rlhf,
        "Anthropic/hh-rlhf",
        ("*/train.jsonl.gz",),
        train_on="all",
        chat_format="hh",
    ),
    "chip2": InstructionSet(parse_chip2, "laion/OIG", ("unified_chip2.jsonl*",)),
    "longform": InstructionSet(LINE_FORMATS["input_output"].parse, "akoksal/LongForm"),
    "dolly": InstructionSet(
        parse_dolly, "databricks/databricks-dolly-15k", chat_format="model", literal=False
    ),
    "sharegpt": InstructionSet(parse_conversations, chat_format="model", literal=False),
    "ultrachat": InstructionSet(parse_ultrachat, chat_format="model", literal=False),
}


def set_files(name: str) -> tuple[str, ...]:
    """The patterns of a set's files to train on; none for what is no set.

    >>> set_files("oasst1"), set_files("auto")
    (('*train*', '*ready.trees*'), ())
    """
    return SETS[name].files if name in SETS else ()
