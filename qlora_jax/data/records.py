"""Reading records: from a data file, or a directory of them, to `Record`s.

Every object that cannot be used is named as `file:line: field: what was found, what is needed`;
with `on_bad_record="skip"` it is left out, counted and reported instead.
"""

import pathlib
from collections.abc import Iterator
from typing import Literal

from qlora_jax.data.data_files import NEED_KEYS, find_files, read_document, read_objects
from qlora_jax.data.formats import BadField, Record
from qlora_jax.data.line_formats import LINE_FORMATS, detect_format, parse_object
from qlora_jax.data.mmlu_cot import looks_like_mmlu_cot, read_mmlu_cot
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import SETS, set_files
from qlora_jax.errors import DataError, nearest

OnBadRecord = Literal["error", "skip"]
FORMATS = ("auto", *LINE_FORMATS, "mmlu_cot")
_SHOWN = 3


def load_records(
    path: str | pathlib.Path,
    format: str = "auto",
    on_bad_record: OnBadRecord = "error",
    max_records: int = 0,
    report: DataReport | None = None,
) -> list[Record]:
    """Reads the records of a file or of a directory of files, all at once.

    Args:
        path: see `read_records`.
        format: see `read_records`.
        on_bad_record: see `read_records`.
        max_records: see `read_records`.
        report: takes the counts; without one, skipped records are reported in the log.

    Returns:
        The records in the order of the files, at least one.

    Raises:
        DataError: see `read_records`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     print('{"prompt": "2+2?", "completion": "4"}', file=file, flush=True)
    ...     records = load_records(file.name)
    >>> records[0].messages[1]["content"]
    '4'
    """
    counts = report or DataReport()
    records = list(read_records(path, format, on_bad_record, max_records, counts))
    if report is None:
        counts.log()
    return records


def read_records(
    path: str | pathlib.Path,
    format: str,
    on_bad_record: OnBadRecord,
    max_records: int,
    report: DataReport,
) -> Iterator[Record]:
    """Reads records one by one, so that a file may be larger than memory.

    Only a `.json` file, one list or object, is parsed as a whole.

    Args:
        path: a file or directory, or whatever else `resolve_path` takes.
        format: a name of `LINE_FORMATS`, "mmlu_cot", the name of a set of `SETS`, or "auto":
            decided once for each file by the keys of its first readable object.
        on_bad_record: "error" stops at the first bad record; "skip" leaves bad ones out.
        max_records: stop after this many good records; 0 reads all.
        report: takes the counts.

    Yields:
        The records in the order of the files, at least one.

    Raises:
        DataError: for a bad record (or for every record, when skipping), an unknown format, or a
            file that is missing, empty, or not of a kind that is read.
    """
    _check_choice("format", format, tuple(dict.fromkeys((*FORMATS, *SETS))))
    _check_choice("on_bad_record", on_bad_record, ("error", "skip"))
    files = find_files(path, set_files(format))
    count, problems = 0, []
    for where, item in (found for file in files for found in _read(file, format)):
        if isinstance(item, Record):
            count += 1
            report.records += 1
            yield item
        elif on_bad_record == "error":
            raise DataError(
                f"{where}: {item}\n(correct it; data.on_bad_record=skip leaves such records out)"
            )
        else:
            report.skip(f"{where}: {item}")
            if len(problems) < _SHOWN:
                problems.append(f"{where}: {item}")
        if max_records and count >= max_records:
            break
    if not count:
        raise DataError(_no_record(path, report.skipped, problems))


def _no_record(path: str | pathlib.Path, count: int, problems: list[str]) -> str:
    if not problems:
        return f"{path} holds nothing but blank lines, need JSON Lines with {NEED_KEYS}"
    head = f"{path}: all {count} records are bad; the first of them:"
    return "\n".join([head, *(f"  {problem}" for problem in problems)])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        guess = nearest(str(value), choices)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise DataError(f"{name}={value!r} is not one of {', '.join(choices)}{hint}")


def _read(path: pathlib.Path, format: str) -> Iterator[tuple[str, Record | BadField]]:
    """Chooses the format and yields (place, record or what is wrong with it)."""
    if format == "mmlu_cot" or (format == "auto" and path.suffix == ".json"):
        document = read_document(path)
        if format == "mmlu_cot" or looks_like_mmlu_cot(document):
            yield from read_mmlu_cot(document, path.name)
            return
    if format == "auto":
        format = _detect(path)
    parse = SETS[format].parse if format in SETS else LINE_FORMATS[format].parse
    columns = SETS[format].columns if format in SETS else ()
    for where, value in read_objects(path, columns):
        if isinstance(value, BadField):
            yield where, value
            continue
        try:
            found = parse_object(value, parse, format, where)
        except BadField as problem:
            yield where, problem
            continue
        for record in found:
            yield record.record_id, record


def _detect(path: pathlib.Path) -> str:
    """Finds the first object that tells the format; those that tell nothing are judged later."""
    first_keys = None
    for _, value in read_objects(path):
        if name := detect_format(value):
            return name
        if first_keys is None and isinstance(value, dict):
            first_keys = ", ".join(sorted(map(str, value))) or "none"
    if first_keys is not None:
        raise DataError(
            f"{path}: no line has the fields of a known format; found the fields "
            f"{first_keys[:200]}, need {NEED_KEYS}, or data.name to say which set it is"
        )
    # No line is a readable object: any format will do to say what is wrong with the first line.
    return "messages"
