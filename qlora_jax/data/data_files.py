"""Data files as a stream of objects: JSON Lines, JSON lists, CSV, TSV, text, Parquet.

The kind follows from the name (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`, `.parquet`; anything
else is taken as JSON Lines), and any of the text kinds may be packed with gzip. A directory is all
files of these kinds inside it, in the order of their names. `tfds:` leads to the files of a split
of TFDS.

The reader trusts nothing: a line that cannot be read comes out as a `BadField` that says what was
found and what is needed, and reading goes on with the next one. Three habits of editors are
harmless and accepted as they are: a UTF-8 byte order mark at the start of the file, Windows line
ends, and blank lines.
"""

import codecs
import csv
import fnmatch
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from qlora_jax.data.formats import BadField, describe
from qlora_jax.data.tfds_files import ARRAY_RECORD, PREFIX, find_tfds_files, read_tfds_file
from qlora_jax.errors import DataError, UserError
from qlora_jax.files import resolve_path

NEED_KEYS = 'one of "messages", "prompt" with "completion", "text"'
# A longer line is no record but a file without line ends; it would take minutes to tokenize.
MAX_LINE_BYTES = 16 << 20

_OTHER_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP = b"\x1f\x8b"
_MAGIC = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
# Beside the data in many directories; it describes the data.
_ABOUT = re.compile(r"(dataset_infos?|config|.*requirements|license|readme)\.(json|txt)", re.I)
_HELD_OUT = re.compile(r"(^|[^a-z])(test|eval|evaluation|val|valid|validation|dev)([^a-z]|$)", re.I)

Item = tuple[str, Any]


def find_files(spec: str | pathlib.Path, patterns: Sequence[str] = ()) -> list[pathlib.Path]:
    """Finds the data files that a path stands for.

    Args:
        spec: what `resolve_path` takes, or `tfds:<name or folder>[#split]`.
        patterns: of the files to take from a directory or the hub, matched against their paths in
            it. If none matches, all are taken but those that are named as held out (`test.jsonl`),
            as long as there are others.

    Returns:
        One file, or the files of a directory in the order of their names; none is empty.

    Raises:
        DataError: nothing is there, it cannot be read, or it is of a kind that is not read.
    """
    if str(spec).startswith(PREFIX):
        return find_tfds_files(str(spec))
    try:
        found = resolve_path(str(spec), kind="dataset", patterns=patterns)
        files = _inside(found, patterns) if found.is_dir() else [found]
        for file in files:
            _check_head(file)
    except OSError as error:
        raise DataError(f"{spec}: cannot be read: {error.strerror}") from None
    except DataError:
        raise
    except UserError as error:
        raise DataError(str(error)) from None
    return files


def _inside(folder: pathlib.Path, patterns: Sequence[str]) -> list[pathlib.Path]:
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    files = [n for n in names if _kind(n) in _SUFFIXES and not _ABOUT.fullmatch(n.split("/")[-1])]
    chosen = [n for n in files if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    chosen = chosen or [n for n in files if not _HELD_OUT.search(n)] or files
    if not chosen:
        inside = f" (in it: {', '.join(names[:5])})" if names else " (it is empty)"
        raise DataError(
            f"{folder} is a directory without a data file{inside}; need a file, or a directory "
            f"with some of *{', *'.join(_SUFFIXES)}, gzipped or not"
        )
    return [folder / name for name in chosen]


def _kind(name: str) -> str:
    return pathlib.PurePath(name.lower().removesuffix(".gz")).suffix


def _check_head(path: pathlib.Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is not a regular file, need a data file")
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise DataError(f"{path} is empty, need JSON Lines with {NEED_KEYS}")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path} is a {kind} file, need plain or gzipped text; unpack it first")
    if head.startswith(b"PAR1") and _kind(path.name) != ".parquet":
        raise DataError(f"{path} is a Parquet file, need the ending .parquet; rename it")
    if head.startswith(_OTHER_BYTE_ORDER_MARKS):
        raise DataError(
            f"{path}: found UTF-16 text, need UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path}"
        )


def read_document(path: pathlib.Path) -> Any:
    """Parses a whole `.json` file.

    Returns:
        The document, or a `BadField` that says why it is none.
    """
    try:
        with _open(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        near = error.doc[error.pos : error.pos + 20].strip() or "the end of the file"
        found = f"broken JSON at line {error.lineno}, column {error.colno} near {near!r}"
        return BadField("json", f"{found} ({error.msg})", "one whole JSON document")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        return BadField("file", str(error)[:80], "one whole JSON document")


def read_objects(path: pathlib.Path, columns: Sequence[str] = ()) -> Iterator[Item]:
    """Yields every object with its place ("train.jsonl:17", "train.json[16]").

    Where there is none that can be read, a `BadField` stands in its place and says why.

    Args:
        path: one data file.
        columns: names of the columns of a TSV file that has no header.
    """
    kind = _kind(path.name)
    if kind == ".parquet":
        return _parquet(path)
    if kind.startswith(ARRAY_RECORD):
        return read_tfds_file(path)
    if kind == ".json":
        document = read_document(path)
        if isinstance(document, list):
            return ((f"{path.name}[{i}]", value) for i, value in enumerate(document))
        with _open(path) as file:
            # A list that is broken somewhere is not a file of broken lines.
            if isinstance(document, BadField) and file.read(64).lstrip().startswith(b"["):
                return iter([(path.name, document)])
    readers = {".csv": _csv, ".tsv": lambda p: _tsv(p, columns), ".txt": _paragraphs}
    return readers.get(kind, _json_lines)(path)


def _open(path: pathlib.Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")


def _raw_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as file:
        try:
            for number, raw in enumerate(file, start=1):
                yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path.name}:{number + 1}: the gzip file is damaged or cut off ({error}); "
                "fetch it again"
            ) from None


def _text_lines(path: pathlib.Path) -> Iterator[str]:
    """Lines as text; a byte that is no UTF-8 becomes half a surrogate pair, refused later."""
    return (raw.decode("utf-8", errors="surrogateescape") for _, raw in _raw_lines(path))


def _json_lines(path: pathlib.Path) -> Iterator[Item]:
    for number, raw in _raw_lines(path):
        if not raw.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            yield where, _parse_json(raw)
        except BadField as problem:
            yield where, problem


def _csv(path: pathlib.Path) -> Iterator[Item]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_text_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path.name}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, BadField("csv", str(error), "fields in double quotes, doubled inside")
            continue
        if header is None:
            header = row
        elif row:
            yield where, _row(row, header)


def _tsv(path: pathlib.Path, columns: Sequence[str]) -> Iterator[Item]:
    header = list(columns)
    for number, line in enumerate(_text_lines(path), start=1):
        # Tabs and line ends inside a field are written as two characters.
        row = [
            cell.replace("\\n", "\n").replace("\\t", "\t")
            for cell in line.strip("\r\n").split("\t")
        ]
        if not header or row == header:
            header = row
        elif line.strip():
            yield f"{path.name}:{number}", _row(row, header)


def _row(row: list[str], header: Sequence[str]) -> dict[str, str] | BadField:
    if len(row) != len(header):
        need = f"{len(header)} ({', '.join(header)[:80]})"
        return BadField("columns", f"{len(row)} fields", need)
    return dict(zip(header, row, strict=True))


def _paragraphs(path: pathlib.Path) -> Iterator[Item]:
    """A text is its paragraphs: what blank lines part."""
    start, lines = 0, []
    for number, line in enumerate(itertools.chain(_text_lines(path), [""]), start=1):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield f"{path.name}:{start}", {"text": "\n".join(lines)}
            lines = []


def _parquet(path: pathlib.Path) -> Iterator[Item]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} is a Parquet file, and pyarrow, which reads it, is not installed: "
            "pip install pyarrow"
        ) from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    yield f"{path.name}[{row}]", value
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {row}: {error}") from None


def _parse_json(raw: bytes) -> Any:
    if len(raw) > MAX_LINE_BYTES:
        need = f"at most {MAX_LINE_BYTES:,}; one JSON list over one line needs the ending .json"
        raise BadField("bytes", f"a line of {len(raw):,} bytes", need)
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
            "json",
            f"a lone {text.strip()!r}",
            "one whole object a line (jq -c '.[]' or '.'), or a list in a file named .json",
        )
    near = text[error.pos : error.pos + 20].strip() or "the end of the line"
    found = f"broken JSON at column {error.colno} near {near!r} ({error.msg})"
    return BadField("json", found, "one complete JSON object a line")
