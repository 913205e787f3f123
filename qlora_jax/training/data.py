"""The data of a run: what is trained on, what is held out, and one question to ask.

Every source is tokenized as a whole, or found in the cache of tokens. What is decided after that
takes no time: duplicates, what is held out, and how often an epoch shows a source.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64
from ml_collections import config_dict

from qlora_jax import hub
from qlora_jax.data import records, row_order
from qlora_jax.data.batches import BatchIterator, BuildBatch
from qlora_jax.data.example_arrays import Examples, Question, Table
from qlora_jax.data.masking import tokenize_each
from qlora_jax.data.mixture import Source, parse_mixture, repeat
from qlora_jax.data.overlap import digest, first_of_equal
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import SETS, set_files
from qlora_jax.data.token_cache import Tokenize, default_cache_dir, load_tokenized
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Tokenized examples and where they come from.

    Attributes:
        train: examples to train on.
        heldout: examples that are only measured, maybe none.
        question: a held-out record's prompt, in the form `generate` takes; None without one.
        fingerprint: content hash of the data file, and of the held-out file if there is one.
        report: what was left out, and why.
        cached: whether all of it had been tokenized before.
    """

    train: Examples
    heldout: Examples
    question: Question | None
    fingerprint: str
    report: DataReport
    cached: bool = False

    def batches(self, config: config_dict.ConfigDict, build: BuildBatch) -> BatchIterator:
        """Batches of what is trained on, as a whole configuration orders and packs them."""
        return BatchIterator(
            self.train,
            batch_size=config.train.batch_size,
            seq_len=config.data.max_len,
            grad_accum=config.train.grad_accum,
            packing=config.data.packing,
            group_by_length=config.data.group_by_length,
            seed=config.seed,
            build=build,
        )


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
    config: config_dict.ConfigDict,
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    tokenize: Tokenize = tokenize_each,
) -> TrainingData:
    """Reads, tokenizes and divides what the configuration names.

    Args:
        config: a whole configuration.
        tokenizer: the model's, with the chat format of the configuration.
        vocab_size: rows of the model's embedding.
        tokenize: of the model's family.

    Raises:
        DataError: a record is bad (with `on_bad_record="error"`), nothing is left to train on, or a
            token has no row in the embedding.
    """
    sources = reading_order(config)
    found = [
        load_tokenized(
            source.path,
            source.name,
            tokenizer,
            tokenize=tokenize,
            cache_dir=cache_dir(config),
            on_bad_record=config.data.on_bad_record,
            max_records=0 if only_heldout else config.data.max_records,
            **token_options(config, source.name),
        )
        for source, only_heldout in sources
    ]
    report = DataReport()
    for one in found:
        report.merge(one.report)
    tables = [one.table for one in found]
    divided = divide(config, [table.records["digest"] for table in tables], report)
    chosen: dict[str, list[int]] = {"train": [], "heldout": []}
    start = 0
    for (source, _), table, (train, heldout) in zip(sources, tables, divided, strict=True):
        made = table.records["tokens"] > 0
        train = repeat([i for i in train if made[i]], source.weight, config.seed)
        chosen["train"] += [start + i for i in train]
        chosen["heldout"] += [start + i for i in heldout if made[i]]
        start += len(table)
    if not chosen["train"]:
        where = data_path(config)
        raise DataError("\n".join([f"{where}: no record is left to train on", *report.lines()]))
    data = TrainingData(
        train=Examples(tables, np.array(chosen["train"], np.int64)),
        heldout=Examples(tables, np.array(chosen["heldout"], np.int64)),
        question=choose_question(tables, [heldout for _, heldout in divided]),
        # The held-out file, which is read first, comes last.
        fingerprint="+".join(
            one.fingerprint
            for wanted in (False, True)
            for (_, only_heldout), one in zip(sources, found, strict=True)
            if only_heldout == wanted
        ),
        report=report,
        cached=all(one.cached for one in found),
    )
    for examples in (data.train, data.heldout):
        if vocab_size is not None:
            _check_vocabulary(examples, tokenizer, vocab_size)
    return data


def cache_dir(config: config_dict.ConfigDict) -> pathlib.Path | None:
    """Where the tokens of a run are kept, or None.

    >>> cache_dir(config_dict.ConfigDict({"data": {"cache_dir": "none"}}))
    """
    name = config.data.cache_dir
    if name in ("auto", "none"):
        return default_cache_dir() if name == "auto" else None
    return pathlib.Path(name).expanduser()


def load_portions(config: config_dict.ConfigDict, report: DataReport) -> list[Portion]:
    """Reads the records of every set of a run, and holds some out, to look at them.

    Args:
        config: a whole configuration.
        report: takes the counts.

    Raises:
        DataError: a record is bad (with `on_bad_record="error"`), or a split leaves nothing.
    """
    data, sources = config.data, reading_order(config)
    found = [
        records.load_records(
            source.path,
            source.name,
            data.on_bad_record,
            0 if only_heldout else data.max_records,
            report,
        )
        for source, only_heldout in sources
    ]
    digests = [np.array([digest(record) for record in part], np.uint64) for part in found]
    divided = divide(config, digests, report)
    portions = [
        Portion(source, [part[i] for i in train], [part[i] for i in heldout])
        for (source, _), part, (train, heldout) in zip(sources, found, divided, strict=True)
    ]
    return portions[1:] + portions[:1] if data.eval_path else portions


def reading_order(config: config_dict.ConfigDict) -> list[tuple[Source, bool]]:
    """The sources of a run, and whether one is only held out.

    The held-out file comes first, so that of a record that is in both, the copy among the training
    records is the duplicate.
    """
    data = config.data
    heldout = [(Source(data.name or data.format, data.eval_path), True)] if data.eval_path else []
    return heldout + [(source, False) for source in data_sources(config)]


def divide(
    config: config_dict.ConfigDict, digests: Sequence[UInt64[np.ndarray, " N"]], report: DataReport
) -> list[tuple[list[int], list[int]]]:
    """Chooses which records of each source are trained on, and which are held out.

    The split is made over records, not over rows, so no held-out record shares a row with a trained
    one; and after duplicates are left out, so that none stands on both sides.

    Args:
        config: a whole configuration.
        digests: of the records of each source of `reading_order`.
        report: takes the number of duplicates.

    Returns:
        For each source the indices of its training and of its held-out records.

    Raises:
        DataError: a split leaves nothing to train on.
    """
    data, divided = config.data, []
    new = first_of_equal(np.concatenate(digests))
    report.duplicates, report.duplicates_dropped = int((~new).sum()), data.deduplicate
    ends = np.cumsum([len(part) for part in digests])
    for (_, only_heldout), is_new in zip(reading_order(config), np.split(new, ends), strict=False):
        kept = (np.flatnonzero(is_new) if data.deduplicate else np.arange(len(is_new))).tolist()
        if only_heldout:
            divided.append(([], kept))
        elif data.eval_path:
            divided.append((kept, []))
        else:
            divided.append(row_order.split(kept, data.eval_fraction, config.seed))
    return divided


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


def _check_vocabulary(examples: Examples, tokenizer: Tokenizer, vocab_size: int) -> None:
    for index in np.flatnonzero(examples.largest_tokens >= vocab_size)[:1]:
        largest = int(examples.largest_tokens[index])
        token = tokenizer.decode([largest], skip_special_tokens=False)
        raise DataError(
            f"{examples[index].record_id}: token {largest} ({token!r}) has no row in the model's "
            f"embedding, which has {vocab_size}; tokenizer and model do not belong together, or "
            "tokens were added to the tokenizer alone"
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


def choose_question(tables: Sequence[Table], heldout: Sequence[Sequence[int]]) -> Question | None:
    """The held-out prompt that is quickest to read: the shortest, or the start of the first text.

    Args:
        tables: of the sources.
        heldout: of each, the held-out records.
    """
    found = [
        (int(chars) if chars >= 0 else sys.maxsize, table, index)
        for table, indices in zip(tables, heldout, strict=True)
        for chars, index in zip(table.records["question_chars"][indices], indices, strict=True)
    ]
    if not found:
        return None
    _, table, index = min(found, key=lambda one: one[0])
    return table.question(index)


def question_text(question: Question) -> str:
    """A prompt as a person reads it.

    >>> question_text([{"role": "user", "content": "2 + 2?"}])
    '2 + 2?'
    """
    if isinstance(question, str):
        return question
    if len(question) == 1:
        return question[0]["content"]
    return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in question)
