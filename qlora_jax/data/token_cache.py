"""Tokenized data on disk, so that a second start need not tokenize again.

An entry is a folder whose name is a hash of everything that decides its tokens: the content and
names of the data files, how they are read, the tokenizer with its chat template, the limits of
length, the source code of this package, and the version of the library that encodes. What is not
in it (seed, held-out share, weights of a mixture, packing) is decided after it, and may change.

An entry is made in a folder of another name, and renamed when it is whole; of two processes that
make the same one, the first to finish wins and both read the same bytes. Its `about.json` holds
the size and hash of every file. They are checked before the entry is used, so one that was cut or
damaged is noticed, and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jinja2
import tokenizers
import xxhash

from qlora_jax.data.data_files import find_files
from qlora_jax.data.example_arrays import COLUMNS, Question, Table, TableWriter, table_in_memory
from qlora_jax.data.formats import Record
from qlora_jax.data.masking import Example, tokenize_each
from qlora_jax.data.overlap import digest
from qlora_jax.data.records import read_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import set_files
from qlora_jax.data.spans import ChatTokenizer
from qlora_jax.data.tfds_files import PREFIX
from qlora_jax.errors import DataError
from qlora_jax.files import fingerprint, resolve_path
from qlora_jax.guarded_files import parse_json, read_limited

_LOGGER = logging.getLogger(__name__)
_ABOUT = "about.json"
_FORGOTTEN_S = 24 * 3600
_TEXT_QUESTION_WORDS = 16

# (records, tokenizer, report, on_bad_record=..., **options) -> records and their examples.
Tokenize = Callable[..., Iterator[tuple[Record, Example]]]


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """One source of records, tokenized.

    Attributes:
        table: a row for each record.
        report: the account of its records.
        fingerprint: content hash of its files.
        cached: whether it was there already.
    """

    table: Table
    report: DataReport
    fingerprint: str
    cached: bool


def default_cache_dir() -> pathlib.Path:
    """Where tokens are kept: `$XDG_CACHE_HOME/qlora_jax/tokens`, or under `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "qlora_jax" / "tokens"


def load_tokenized(
    path: str | pathlib.Path,
    format: str,
    tokenizer: ChatTokenizer,
    *,
    cache_dir: pathlib.Path | None,
    tokenize: Tokenize = tokenize_each,
    on_bad_record: Literal["error", "skip"] = "error",
    max_records: int = 0,
    **options: Any,
) -> TokenizedData:
    """Reads and tokenizes records, or finds that it was done before.

    Args:
        path: see `read_records`.
        format: see `read_records`.
        tokenizer: with a `fingerprint` of all that decides ids; as `tokenize_records` takes it.
        cache_dir: folder of the entries; None: nothing is kept, and the tokens are in memory.
        tokenize: `tokenize_each`, or a function like it for another kind of model.
        on_bad_record: see `read_records` and `tokenize_records`.
        max_records: see `read_records`.
        **options: of `tokenize`.

    Raises:
        DataError: see `read_records` and `tokenize_records`; or a file changed while it was read.

    >>> import tempfile
    >>> from qlora_jax.data.tokenizer import Tokenizer
    >>> words = tokenizers.models.WordLevel({"one": 0, "two": 1}, unk_token="one")
    >>> backend = tokenizers.Tokenizer(words)
    >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file, cache_dir = pathlib.Path(folder) / "a.txt", pathlib.Path(folder) / "tokens"
    ...     _ = file.write_text("one two")
    ...     for _ in range(2):
    ...         options = {"cache_dir": cache_dir, "max_len": 8}
    ...         found = load_tokenized(file, "text", Tokenizer(backend), **options)
    ...         print(found.cached, found.table.example(0).tokens.tolist())
    False [0, 1]
    True [0, 1]
    """
    patterns = set_files(format)

    def hash_files() -> tuple[str, list[str]]:
        # What `read_records` reads: beside it, a directory on the hub may get more files.
        files = find_files(path, patterns)
        if str(path).startswith(PREFIX):
            return fingerprint(files[0].parent, files), [file.name for file in files]
        found = resolve_path(str(path), kind="dataset", patterns=patterns)
        return fingerprint(found, files), [file.name for file in files]

    content, names = hash_files()

    def fill(writer: TableWriter) -> DataReport:
        report = DataReport()
        records = read_records(path, format, on_bad_record, max_records, report)
        for record, example in tokenize(
            records, tokenizer, report, on_bad_record=on_bad_record, **options
        ):
            writer.add(example, digest(record), _question(record))
        if hash_files() != (content, names):
            raise DataError(f"{path}: changed while it was read; start again when it is complete")
        return report

    if cache_dir is None:
        return TokenizedData(*_in_memory(fill), content, cached=False)
    key = {
        "content": content,
        "files": names,
        "format": format,
        "on_bad_record": on_bad_record,
        "max_records": max_records,
        "tokenizer": tokenizer.fingerprint,
        "tokenize": f"{tokenize.__module__}.{tokenize.__qualname__}",
        "options": options,
        "code": _code_version(),
    }
    table, report, cached = _find_or_make(cache_dir, key, fill)
    return TokenizedData(table, report, content, cached)


def _question(record: Record) -> Question:
    """What can be asked of a model instead of the record: its prompt, or how its text begins."""
    return record.prompt or " ".join(record.text.split()[:_TEXT_QUESTION_WORDS])


@functools.cache
def _code_version() -> str:
    """A hash of this package's source, and of what it encodes and renders with."""
    found = xxhash.xxh3_64(f"{tokenizers.__version__} {jinja2.__version__}".encode())
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _find_or_make(
    cache_dir: pathlib.Path, key: Mapping[str, Any], fill: Callable[[TableWriter], DataReport]
) -> tuple[Table, DataReport, bool]:
    folder = cache_dir / xxhash.xxh3_128(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if found := _open(folder):
        return *found, True
    try:
        _make(folder, key, fill)
    except OSError as error:
        _LOGGER.warning(
            "%s: tokens cannot be kept there (%s), so the next start will tokenize again; make "
            "room, or set data.cache_dir to another folder",
            cache_dir,
            error.strerror or error,
        )
        return *_in_memory(fill), False
    if found := _open(folder):
        return *found, False
    return *_in_memory(fill), False  # the disk gives back other bytes than it was given


def _in_memory(fill: Callable[[TableWriter], DataReport]) -> tuple[Table, DataReport]:
    buffers: dict[str, io.BytesIO] = {}
    report = fill(TableWriter(lambda name: buffers.setdefault(name, io.BytesIO())))
    return table_in_memory(buffers), report


def _open(folder: pathlib.Path) -> tuple[Table, DataReport] | None:
    """An entry, or None if it is not there or not whole."""
    try:
        about = parse_json(read_limited(folder / _ABOUT))
        if about["files"] != {name: fingerprint(folder / name) for name in COLUMNS}:
            raise ValueError("a file has other content than it was given")
        return Table.open(folder), DataReport(**about["report"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        if folder.exists():
            _LOGGER.warning("%s: damaged (%s), so it is made again", folder, error)
        return None


def _make(
    folder: pathlib.Path, key: Mapping[str, Any], fill: Callable[[TableWriter], DataReport]
) -> None:
    # Tokens are the data: in one's own cache they are for nobody else to read.
    mode = 0o700 if folder.parent == default_cache_dir() else 0o777
    folder.parent.mkdir(mode, parents=True, exist_ok=True)
    _sweep(folder.parent)
    new = _unique(folder)
    new.mkdir()
    try:
        writer = TableWriter(lambda name: (new / name).open("wb"))
        try:
            report = fill(writer)
        finally:
            writer.close()
        files = {name: fingerprint(new / name) for name in COLUMNS}
        about = {"key": key, "report": dataclasses.asdict(report), "files": files}
        (new / _ABOUT).write_text(json.dumps(about, indent=2))
        _put(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a whole entry its name, in the place of a damaged one."""
    while True:
        try:
            os.rename(new, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _open(folder):  # another process was faster
            return
        damaged = _unique(folder)
        with contextlib.suppress(FileNotFoundError):  # another process saw the damage too
            os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _unique(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")


def _sweep(cache_dir: pathlib.Path) -> None:
    """Removes what processes that were killed left unfinished."""
    for left in cache_dir.glob(".*.*.*"):
        with contextlib.suppress(OSError):  # its process has just put it in its place
            last = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - last > _FORGOTTEN_S:
                shutil.rmtree(left, ignore_errors=True)
