"""Reading data files: JSON Lines, one record a line, and the question file of `mmlu_cot`.

The reader trusts nothing. Every line that cannot be used is named as `file:line: field: what was
found, what is needed`; with `on_bad_record="skip"` it is left out, counted and reported instead.
Two habits of editors are harmless and accepted as they are: a UTF-8 byte order mark at the start of
the file, and Windows line ends. Blank lines are ignored.
"""

import codecs
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from qlora_jax.data.formats import (
    LINE_FORMATS,
    BadField,
    Record,
    describe,
    detect_format,
    parse_object,
)
from qlora_jax.data.mmlu_cot import load_document, looks_like_mmlu_cot, read_mmlu_cot
from qlora_jax.data.report import DataReport
from qlora_jax.errors import DataError, UserError, nearest
from qlora_jax.files import resolve_path

OnBadRecord = Literal["error", "skip"]
FORMATS = ("auto", *LINE_FORMATS, "mmlu_cot")
_OTHER_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
}
_NEED_KEYS = 'one of "messages", "prompt" with "completion", "text"'


def load_records(
    path: str | pathlib.Path,
    format: str = "auto",
    on_bad_record: OnBadRecord = "error",
    max_records: int = 0,
    report: DataReport | None = None,
) -> list[Record]:
    """Reads the records of one file.

    Args:
        path: a file, or `package:<package>/<file>`.
        format: "messages", "prompt_completion" or "text" (JSON Lines), "mmlu_cot", or "auto":
            decided once for the whole file by the keys of its first readable object.
        on_bad_record: "error" stops at the first bad record; "skip" leaves bad ones out.
        max_records: stop after this many good records; 0 reads all.
        report: takes the counts; without one, skipped records are reported in the log.

    Returns:
        The records in the order of the file, at least one.

    Raises:
        DataError: for a bad record (or for every record, when skipping), an unknown format, or a
            file that is missing, empty, a directory, or not text.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     print('{"prompt": "2+2?", "completion": "4"}', file=file, flush=True)
    ...     records = load_records(file.name)
    >>> records[0].messages[1]["content"]
    '4'
    """
    _check_choice("format", format, FORMATS)
    _check_choice("on_bad_record", on_bad_record, ("error", "skip"))
    path = _find_file(path)
    own_report = report is None
    report = report or DataReport()
    records: list[Record] = []
    problems: list[str] = []
    for where, item in _open_reader(path, format):
        if isinstance(item, Record):
            records.append(item)
        elif on_bad_record == "error":
            raise DataError(f"{where}: {item}")
        else:
            problems.append(f"{where}: {item}")
            report.skip(problems[-1])
        if max_records and len(records) >= max_records:
            break
    report.records += len(records)
    if not records:
        raise DataError(_no_record(path, problems))
    if own_report:
        report.log()
    return records


def _no_record(path: pathlib.Path, problems: list[str]) -> str:
    if not problems:
        return f"{path} holds nothing but blank lines, need JSON Lines with {_NEED_KEYS}"
    head = f"{path}: all {len(problems)} records are bad; the first of them:"
    return "\n".join([head, *(f"  {problem}" for problem in problems[:3])])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        guess = nearest(str(value), choices)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise DataError(f"{name}={value!r} is not one of {', '.join(choices)}{hint}")


def _find_file(path: str | pathlib.Path) -> pathlib.Path:
    try:
        found = resolve_path(str(path))
        if found.is_dir():
            names = sorted(p.name for p in found.iterdir() if p.suffix in (".jsonl", ".json"))
            inside = f" (in it: {', '.join(names[:5])})" if names else ""
            raise DataError(f"{found} is a directory, need one JSON Lines file{inside}")
        if not found.is_file():
            raise DataError(f"{found} is not a regular file, need a JSON Lines file")
        with found.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DataError:
        raise
    except UserError as error:
        raise DataError(str(error)) from None
    if not head:
        raise DataError(f"{found} is empty, need JSON Lines with {_NEED_KEYS}")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{found} is a {kind} file, need plain JSON Lines; unpack it first")
    if head.startswith(_OTHER_BYTE_ORDER_MARKS):
        raise DataError(
            f"{found}: found UTF-16 text, need UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {found}"
        )
    return found


def _open_reader(path: pathlib.Path, format: str) -> Iterator[tuple[str, Record | BadField]]:
    """Chooses the format and yields (place, record or what is wrong with it)."""
    if format == "mmlu_cot" or (format == "auto" and path.suffix == ".json"):
        document = load_document(path.read_bytes())
        if format == "mmlu_cot" or looks_like_mmlu_cot(document):
            return read_mmlu_cot(document, path.name)
        if isinstance(document, list):
            raise DataError(
                f"{path}: found one JSON list of {len(document)} items, need JSON Lines "
                f"(one object a line); convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
            )
    if format == "auto":
        format = _detect(path)
    return _read_lines(path, format)


def _read_lines(path: pathlib.Path, format: str) -> Iterator[tuple[str, Record | BadField]]:
    for number, raw in _lines(path):
        where = f"{path.name}:{number}"
        try:
            yield where, parse_object(_parse_json(raw), format, where)
        except BadField as problem:
            yield where, problem


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield number, raw


def _detect(path: pathlib.Path) -> str:
    """Finds the first line that tells the format; lines that tell nothing are judged later."""
    first_keys = None
    for _, raw in _lines(path):
        try:
            value = _parse_json(raw)
        except BadField:
            continue
        if name := detect_format(value):
            return name
        if first_keys is None and isinstance(value, dict):
            first_keys = ", ".join(sorted(map(str, value))) or "none"
    if first_keys is not None:
        raise DataError(
            f"{path}: no line has the fields of a known format; found the fields "
            f"{first_keys[:200]}, need {_NEED_KEYS}"
        )
    # No line is a readable object: any format will do to say what is wrong with the first line.
    return "messages"


def _parse_json(raw: bytes) -> Any:
    if (position := raw.find(b"\0")) >= 0:
        raise BadField("bytes", f"a NUL byte at byte {position + 1}", "text; is the file damaged?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1}, which is not UTF-8"
        raise BadField(
            "bytes", found, "UTF-8 (iconv -f LATIN1 -t UTF-8 converts old files)"
        ) from None
    if text.startswith("\ufeff"):
        raise BadField("bytes", "a byte order mark inside the file", "none; were files joined?")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken_json(text, error) from None
    except (ValueError, RecursionError) as error:
        raise BadField("json", str(error).split(";")[0][:80], "ordinary JSON") from None


def _broken_json(text: str, error: json.JSONDecodeError) -> BadField:
    if not text.endswith("\n") and text.lstrip().startswith("{") and not text.endswith("}"):
        found = f"the end of the file after {describe(text[-30:])}"
        return BadField("json", found, "a complete object; the last line is cut off")
    if text.strip() in ("[", "{"):
        return BadField(
            "json", f"a lone {text.strip()!r}", "one whole object a line (jq -c '.[]' or '.')"
        )
    near = text[error.pos : error.pos + 20].strip() or "the end of the line"
    found = f"broken JSON at column {error.colno} near {near!r} ({error.msg})"
    return BadField("json", found, "one complete JSON object a line")
