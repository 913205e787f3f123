"""What an evaluation has found so far, one JSON line each, so that it can be stopped and continued.

The first line says what is evaluated and how. A journal is continued only by the same evaluation:
answers of another model, or to another prompt, would be mixed unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax.errors import EvaluationError


class Journal(contextlib.AbstractContextManager):
    """The records of one evaluation.

    Args:
        path: of the file; its folder is made.
        settings: all that has a say in the records, as JSON keeps it.

    Attributes:
        records: by key, those of earlier starts included.

    Raises:
        EvaluationError: the file is of another evaluation, is no journal, or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "answers.jsonl"
        ...     with Journal(path, {"model": "a"}) as journal:
        ...         journal.write([("1", {"answer": 2})])
        ...     with Journal(path, {"model": "a"}) as journal:
        ...         journal.records
        {'1': {'answer': 2}}
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        settings = json.loads(json.dumps(settings))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8", newline="\n")
            self._file.seek(0)
            self.records = self._read(settings)
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{self.path} cannot be read and written: {error}") from error

    def _read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        text = self._file.read()
        # A line that was cut by a kill is asked for again.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.truncate(len(whole.encode()))
        if not whole:
            self._append([{"settings": settings}])
            return {}
        try:
            header, *lines = map(json.loads, whole.splitlines())
            before = header["settings"]
            records = {line["key"]: line["record"] for line in lines}
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(
                f"{self.path} holds something else than answers of an evaluation. Move it away, or "
                "give another --out."
            ) from None
        if before != settings:
            names = [n for n in sorted({*before, *settings}) if before.get(n) != settings.get(n)]
            changes = ", ".join(f"{n}: {before.get(n)!r} -> {settings.get(n)!r}" for n in names)
            raise EvaluationError(
                f"{self.path} holds answers of another evaluation ({changes}). Give another --out "
                "to keep both, or remove that file."
            )
        return records

    def write(self, records: Iterable[tuple[str, Any]]) -> None:
        """Adds records with their keys; they are on disk when this returns.

        Raises:
            EvaluationError: the disk is full or gone.
        """
        records = list(records)
        self._append([{"key": key, "record": record} for key, record in records])
        self.records |= dict(records)

    def _append(self, lines: list[Any]) -> None:
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise EvaluationError(
                f"{self.path} cannot be written: {error.strerror or error}; what was found before "
                "is kept. Make room and start again to go on."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __exit__(self, *exception) -> None:
        self.close()
