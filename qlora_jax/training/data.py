"""The data of a run: what is trained on, what is held out, and one question to ask."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import config_dict

from qlora_jax import hub
from qlora_jax.data import batches, masking, records
from qlora_jax.data.data_files import find_files
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import SETS, set_files
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError
from qlora_jax.files import fingerprint, resolve_path

_TEXT_PROMPT_WORDS = 16


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Tokenized examples and where they come from.

    Attributes:
        train: examples to train on.
        heldout: examples that are only measured, maybe none.
        question: a held-out record's prompt, in the form `generate` takes; None without one.
        fingerprint: content hash of the data file, and of the held-out file if there is one.
        report: what was left out, and why.
    """

    train: list[masking.Example]
    heldout: list[masking.Example]
    question: str | list[dict[str, str]] | None
    fingerprint: str
    report: DataReport


def load_training_data(config: config_dict.ConfigDict, tokenizer: Tokenizer) -> TrainingData:
    """Reads, splits and tokenizes what the configuration names.

    The split is made over records, before anything is tokenized or packed, so no held-out record
    shares a row with a trained one.

    Raises:
        DataError: a record is bad (with `on_bad_record="error"`), or nothing is left to train on.
    """
    data, report = config.data, DataReport()
    path, options = data_path(config), record_options(config)
    trained = records.load_records(path, max_records=data.max_records, report=report, **options)
    hashes = [_fingerprint(path, options["format"])]
    if data.eval_path:
        heldout = records.load_records(data.eval_path, report=report, **options)
        hashes.append(_fingerprint(data.eval_path, options["format"]))
    else:
        trained, heldout = batches.split(trained, data.eval_fraction, config.seed)

    def tokenize(chosen: list[records.Record]) -> list[masking.Example]:
        return masking.tokenize_records(
            chosen,
            tokenizer,
            report=report,
            on_bad_record=data.on_bad_record,
            **token_options(config),
        )

    examples, heldout_examples = tokenize(trained), tokenize(heldout) if heldout else []
    if not examples:
        raise DataError("\n".join([f"{path}: no record is left to train on", *report.lines()]))
    return TrainingData(
        examples, heldout_examples, choose_question(heldout), "+".join(hashes), report
    )


def data_path(config: config_dict.ConfigDict) -> str:
    """Where the records are: `data.path`, or else the named set's place on the hub.

    >>> data_path(config_dict.ConfigDict({"data": {"path": "", "name": "oasst1"}}))
    'timdettmers/openassistant-guanaco'
    """
    return config.data.path or SETS[config.data.name].hub


def describe_data(config: config_dict.ConfigDict) -> str:
    """`data_path`, for a set on the hub with the commit that was read."""
    return hub.describe(data_path(config), "dataset", set_files(config.data.name))


def _fingerprint(path: str, format: str) -> str:
    """A hash of what `load_records` reads: beside it, a directory on the hub may get more files."""
    patterns = set_files(format)
    found = resolve_path(path, kind="dataset", patterns=patterns)
    return fingerprint(found, find_files(found, patterns))


def record_options(config: config_dict.ConfigDict) -> dict[str, Any]:
    """What `load_records` is told of a configuration."""
    data = config.data
    return {"format": data.name or data.format, "on_bad_record": data.on_bad_record}


def token_options(config: config_dict.ConfigDict) -> dict[str, Any]:
    """What `tokenize_records` is told of a configuration."""
    data = config.data
    train_on, literal = data.train_on, False
    if data.name:
        train_on = SETS[data.name].train_on if train_on == "auto" else train_on
        literal = SETS[data.name].literal and data.chat_format == "auto"
    return {
        "max_len": data.max_len,
        "source_max_len": data.source_max_len,
        "target_max_len": data.target_max_len,
        "train_on": "assistant" if train_on == "auto" else train_on,
        "literal": literal,
        "paper_exact": data.paper_exact,
    }


def with_chat_format(tokenizer: Tokenizer, config: config_dict.ConfigDict) -> Tokenizer:
    """The tokenizer with the chat format of a configuration: for training, and for asking later."""
    name = config.data.chat_format
    if name == "auto":
        name = SETS[config.data.name].chat_format if config.data.name else "model"
    return tokenizer.with_chat_format(name)


def choose_question(heldout: list[records.Record]) -> str | list[dict[str, str]] | None:
    """The held-out prompt that is quickest to read: the shortest, or the start of the first text.

    >>> texts = [records.Record("a:1", "text", text="Once upon a time")]
    >>> choose_question(texts), choose_question([])
    ('Once upon a time', None)
    """
    prompts = [record.prompt for record in heldout if record.prompt]
    if prompts:
        return min(prompts, key=lambda prompt: sum(len(turn["content"]) for turn in prompt))
    if heldout:
        return " ".join(heldout[0].text.split()[:_TEXT_PROMPT_WORDS])
    return None


def question_text(question: str | list[dict[str, str]]) -> str:
    """A prompt as a person reads it.

    >>> question_text([{"role": "user", "content": "2 + 2?"}])
    '2 + 2?'
    """
    if isinstance(question, str):
        return question
    if len(question) == 1:
        return question[0]["content"]
    return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in question)
