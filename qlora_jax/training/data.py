"""The data of a run: what is trained on, what is held out, and one question to ask."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import config_dict

from qlora_jax import hub
from qlora_jax.data import masking, records, row_order
from qlora_jax.data.data_files import find_files
from qlora_jax.data.mixture import Source, parse_mixture, repeat
from qlora_jax.data.overlap import drop_duplicates
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


@dataclasses.dataclass(frozen=True)
class Portion:
    """The records of one set of a run.

    Attributes:
        source: which set, where it is, and how often an epoch shows it.
        train: records to train on.
        heldout: records that are only measured.
    """

    source: Source
    train: list[records.Record]
    heldout: list[records.Record]


def load_training_data(
    config: config_dict.ConfigDict, tokenizer: Tokenizer, vocab_size: int | None = None
) -> TrainingData:
    """Reads, splits and tokenizes what the configuration names.

    Args:
        config: a whole configuration.
        tokenizer: the model's, with the chat format of the configuration.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: a record is bad (with `on_bad_record="error"`), nothing is left to train on, or a
            token has no row in the embedding.
    """
    report = DataReport()
    portions = load_portions(config, report)

    def tokenize(chosen: list[records.Record], name: str) -> list[masking.Example]:
        return masking.tokenize_records(
            chosen,
            tokenizer,
            report=report,
            on_bad_record=config.data.on_bad_record,
            **token_options(config, name),
        )

    train, heldout = [], []
    for portion in portions:
        name, weight = portion.source.name, portion.source.weight
        train += repeat(tokenize(portion.train, name), weight, config.seed)
        heldout += tokenize(portion.heldout, name) if portion.heldout else []
    if not train:
        where = data_path(config)
        raise DataError("\n".join([f"{where}: no record is left to train on", *report.lines()]))
    if vocab_size is not None:
        _check_vocabulary([*train, *heldout], tokenizer, vocab_size)
    question = choose_question([record for portion in portions for record in portion.heldout])
    hashes = [_fingerprint(source.path, source.name) for source in data_sources(config)]
    if config.data.eval_path:
        hashes.append(_fingerprint(config.data.eval_path, config.data.name or config.data.format))
    return TrainingData(train, heldout, question, "+".join(hashes), report)


def load_portions(config: config_dict.ConfigDict, report: DataReport) -> list[Portion]:
    """Reads the records of every set of a run, and holds some out.

    The split is made over records, before anything is tokenized or packed, so no held-out record
    shares a row with a trained one; and after duplicates are left out, so that none stands on both
    sides.

    Args:
        config: a whole configuration.
        report: takes the counts.

    Raises:
        DataError: a record is bad (with `on_bad_record="error"`), or a split leaves nothing.
    """
    data, seen, portions = config.data, set(), []

    def load(path: str, format: str, max_records: int = 0) -> list[records.Record]:
        found = records.load_records(path, format, data.on_bad_record, max_records, report)
        unique = drop_duplicates(found, seen)
        report.duplicates += len(found) - len(unique)
        return unique if data.deduplicate else found

    # First, so that it is the copy among the training records that is left out.
    evaluation = load(data.eval_path, data.name or data.format) if data.eval_path else []
    report.duplicates_dropped = data.deduplicate
    for source in data_sources(config):
        train, heldout = load(source.path, source.name, data.max_records), []
        if not data.eval_path:
            train, heldout = row_order.split(train, data.eval_fraction, config.seed)
        portions.append(Portion(source, train, heldout))
    if evaluation:
        source = Source(data.name or data.format, data.eval_path)
        portions.append(Portion(source, [], evaluation))
    return portions


def data_sources(config: config_dict.ConfigDict) -> list[Source]:
    """The sets of a run: those of `data.mixture`, or the one of `data.name` and `data.path`.

    >>> data = {"mixture": "", "name": "oasst1", "path": "", "format": "auto"}
    >>> data_sources(config_dict.ConfigDict({"data": data}))[0].path
    'timdettmers/openassistant-guanaco'
    """
    data = config.data
    if data.mixture:
        return parse_mixture(data.mixture)
    return [Source(data.name or data.format, data.path or SETS[data.name].hub)]


def data_path(config: config_dict.ConfigDict) -> str:
    """Where the records are, in messages."""
    return ", ".join(source.path for source in data_sources(config))


def describe_data(config: config_dict.ConfigDict) -> str:
    """`data_path`, for a set on the hub with the commit that was read."""
    return ", ".join(
        hub.describe(source.path, "dataset", set_files(source.name))
        + (f" ({source.weight:g} times)" if source.weight != 1 else "")
        for source in data_sources(config)
    )


def _fingerprint(path: str, format: str) -> str:
    """A hash of what `load_records` reads: beside it, a directory on the hub may get more files."""
    patterns = set_files(format)
    found = resolve_path(path, kind="dataset", patterns=patterns)
    return fingerprint(found, find_files(found, patterns))


def _check_vocabulary(
    examples: list[masking.Example], tokenizer: Tokenizer, vocab_size: int
) -> None:
    for example in examples:
        largest = int(example.tokens.max())
        if largest >= vocab_size:
            token = tokenizer.decode([largest], skip_special_tokens=False)
            raise DataError(
                f"{example.record_id}: token {largest} ({token!r}) has no row in the model's "
                f"embedding, which has {vocab_size}; tokenizer and model do not belong together, "
                "or tokens were added to the tokenizer alone"
            )


def token_options(config: config_dict.ConfigDict, name: str = "") -> dict[str, Any]:
    """What `tokenize_records` is told of a configuration.

    Args:
        config: a whole configuration.
        name: of the set or format; that of the configuration where there is only one.
    """
    data = config.data
    name = name or data.name
    train_on, literal = data.train_on, False
    if name in SETS and (data.name or data.mixture):
        train_on = SETS[name].train_on if train_on == "auto" else train_on
        literal = SETS[name].literal and data.chat_format == "auto"
    return {
        "max_len": data.max_len,
        "source_max_len": data.source_max_len,
        "target_max_len": data.target_max_len,
        "train_on": "assistant" if train_on == "auto" else train_on,
        "literal": literal,
        "paper_exact": data.paper_exact,
    }


def with_chat_format(tokenizer: Tokenizer, config: config_dict.ConfigDict) -> Tokenizer:
    """The tokenizer with the chat format of a configuration: for training, and for asking later.

    A mixture has the format of its first set.
    """
    name = config.data.chat_format
    if name == "auto":
        first = parse_mixture(config.data.mixture)[0].name if config.data.mixture else ""
        chosen = config.data.name or first
        name = SETS[chosen].chat_format if chosen in SETS else "model"
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
