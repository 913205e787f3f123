"""A million examples as a few flat arrays, in memory or in files that are mapped into it.

An `Example` is two small NumPy arrays and a text: about 600 bytes of Python objects beside its
tokens, and nothing that another process could share. A `Table` holds the same as five arrays, the
tokens of all records one after the other. Of a table in files, the operating system reads the pages
that are used and forgets them when memory is short.

`Examples` is a selection from tables (the training part, a mixture, a set shown twice): indices,
no copies. It behaves as a list of `Example`s.

A table has a row for every record that was read, also for those that no example was made of: the
division into training and held-out records is one over records, and is made when a run starts.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, overload

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8

from qlora_jax.data.masking import Example

Question = str | list[dict[str, str]]

# Where the tokens, the id and the question of a record end in the flat arrays, and what is asked of
# all records at once.
RECORD = np.dtype(
    [
        ("tokens_end", "<i8"),
        ("id_end", "<i8"),
        ("question_end", "<i8"),
        ("tokens", "<i4"),  # 0: no example was made of the record
        ("loss_tokens", "<i4"),
        ("largest_token", "<i4"),
        ("question_chars", "<i4"),  # of a conversation; -1: plain text
        ("truncated", "?"),
        ("digest", "<u8"),  # of its words, see `overlap`
    ]
)
COLUMNS = {"tokens": "<i4", "loss_mask": "u1", "ids": "u1", "questions": "u1", "records": RECORD}


class Table:
    """Tokenized records as flat arrays.

    Attributes:
        records: a row of the type `RECORD` for each record.
        tokens: int32, of all records.
        loss_mask: uint8, of all tokens.
        folder: where the arrays are files, None for arrays in memory.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], folder: pathlib.Path | None = None):
        """Takes the arrays of `COLUMNS`."""
        self.records, self.tokens = columns["records"], columns["tokens"]
        self.loss_mask, self.folder = columns["loss_mask"], folder
        self._ids, self._questions = columns["ids"], columns["questions"]

    @classmethod
    def open(cls, folder: pathlib.Path) -> Table:
        """Maps the files of a folder; nothing is read yet but the rows of the records."""
        columns = {name: _map(folder / name, dtype) for name, dtype in COLUMNS.items()}
        return cls({**columns, "records": np.array(columns["records"])}, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process goes the place of the files, not what is in them.
        if self.folder is not None:
            return Table.open, (self.folder,)
        columns = {"ids": self._ids, "questions": self._questions, "records": self.records}
        return Table, ({**columns, "tokens": self.tokens, "loss_mask": self.loss_mask},)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int) -> Example:
        """The example of one record; it has no tokens if none was made of it."""
        record = self.records[index]
        end = int(record["tokens_end"])
        place = slice(end - int(record["tokens"]), end)
        mask = self.loss_mask[place].astype(np.int32)
        return Example(self.tokens[place], mask, self.record_id(index), bool(record["truncated"]))

    def record_id(self, index: int) -> str:
        """Where a record stands, "train.jsonl:17"."""
        return self._bytes(self._ids, "id_end", index).decode()

    def question(self, index: int) -> Question:
        """What a record asks: its prompt, or the beginning of a plain text."""
        return json.loads(self._bytes(self._questions, "question_end", index))

    def _bytes(self, array: np.ndarray, field: str, index: int) -> bytes:
        start = self.records[field][index - 1] if index else 0
        return array[start : self.records[field][index]].tobytes()


def _map(path: pathlib.Path, dtype: Any) -> np.ndarray:
    # An empty file cannot be mapped.
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    # As a plain array: slicing the subclass costs microseconds.
    return np.asarray(np.memmap(path, dtype, "r"))


class TableWriter:
    """Writes a table record by record, with little in memory.

    Args:
        open_column: gives the file of a column by its name; `records` is written at the end.

    >>> buffers = {}
    >>> writer = TableWriter(lambda name: buffers.setdefault(name, io.BytesIO()))
    >>> writer.add(Example(np.array([5, 6]), np.array([0, 1]), "a.jsonl:1"))
    >>> writer.close()
    >>> table_in_memory(buffers).example(0).tokens.tolist()
    [5, 6]
    """

    def __init__(self, open_column: Callable[[str], BinaryIO]):
        """Opens all columns."""
        self._files = {name: open_column(name) for name in COLUMNS}
        self._ends = dict.fromkeys(("tokens_end", "id_end", "question_end"), 0)

    def add(
        self,
        example: Example,
        digest: int = 0,
        question: Question = "",
    ) -> None:
        """Appends a record.

        Args:
            example: without tokens where none could be made.
            digest: of the record's words.
            question: what it asks.
        """
        chars = -1 if isinstance(question, str) else sum(len(turn["content"]) for turn in question)
        name, asked = example.record_id.encode(), json.dumps(question).encode()
        count = len(example.tokens)
        for end, size in zip(self._ends, (count, len(name), len(asked)), strict=True):
            self._ends[end] += size
        loss = int(example.loss_mask[1:].astype(bool).sum())
        largest = int(example.tokens.max()) if count else 0
        facts = (count, loss, largest, chars, example.truncated, digest)
        self._files["tokens"].write(example.tokens.astype("<i4").tobytes())
        self._files["loss_mask"].write(example.loss_mask.astype(np.uint8).tobytes())
        self._files["ids"].write(name)
        self._files["questions"].write(asked)
        self._files["records"].write(np.array((*self._ends.values(), *facts), RECORD).tobytes())

    def close(self) -> None:
        """Ends all files that are on a disk."""
        for file in self._files.values():
            if not isinstance(file, io.BytesIO):
                file.close()


def table_in_memory(columns: Mapping[str, io.BytesIO]) -> Table:
    """The table that was written into buffers."""
    return Table(
        {name: np.frombuffer(columns[name].getbuffer(), dtype) for name, dtype in COLUMNS.items()}
    )


class Examples(Sequence[Example]):
    """Some of the records of some tables, in any order, each as often as wanted.

    Args:
        tables: where they are.
        chosen: indices, counted through all tables; every one is a record with tokens. None: all
            such records in their order.

    Attributes:
        lengths: tokens of each example.
        loss_tokens: tokens of each that carry loss.
        largest_tokens: the largest id of each.

    >>> found = Examples.of([Example(np.array([5, 6]), np.array([0, 1]), "a.jsonl:1")])
    >>> len(found), found[0].record_id, found.take([0, 0]).lengths.tolist()
    (1, 'a.jsonl:1', [2, 2])
    """

    def __init__(self, tables: Sequence[Table], chosen: Int[np.ndarray, " N"] | None = None):
        """Looks up the sizes of the chosen ones."""
        self._tables = list(tables)
        self._starts = np.cumsum([0, *(len(table) for table in self._tables)])
        if chosen is None:
            chosen = np.flatnonzero(np.concatenate([t.records["tokens"] for t in self._tables]))
        self.chosen: Int64[np.ndarray, " N"] = np.asarray(chosen, np.int64)
        self.lengths = self._facts("tokens")
        self.loss_tokens = self._facts("loss_tokens")
        self.largest_tokens = self._facts("largest_token")

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Copies examples into arrays; those that are in arrays already stay there."""
        if isinstance(examples, Examples):
            return examples
        buffers: dict[str, io.BytesIO] = {}
        writer = TableWriter(lambda name: buffers.setdefault(name, io.BytesIO()))
        for example in examples:
            writer.add(example)
        table = table_in_memory(buffers)
        return cls([table], np.arange(len(table)))

    def _facts(self, field: str) -> Int64[np.ndarray, " N"]:
        facts = [table.records[field] for table in self._tables]
        return np.concatenate([np.zeros(0, np.int64), *facts]).astype(np.int64)[self.chosen]

    def take(self, positions: Sequence[int] | Int[np.ndarray, " M"]) -> Examples:
        """A selection from this one."""
        return Examples(self._tables, self.chosen[np.asarray(positions, np.int64)])

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, position: int) -> Example: ...

    @overload
    def __getitem__(self, position: slice) -> Examples: ...

    def __getitem__(self, position: int | slice) -> Example | Examples:
        if isinstance(position, slice):
            return Examples(self._tables, self.chosen[position])
        index = int(self.chosen[position])
        table = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._tables[table].example(index - int(self._starts[table]))

    def contents(self) -> Iterator[tuple[Int32[np.ndarray, " T"], UInt8[np.ndarray, " T"]]]:
        """The tokens and the loss mask of each, some times faster than through an `Example`."""
        tables = np.searchsorted(self._starts, self.chosen, side="right") - 1
        ends = self._facts("tokens_end")
        places = zip(tables.tolist(), (ends - self.lengths).tolist(), ends.tolist(), strict=True)
        for table, start, end in places:
            found = self._tables[table]
            yield found.tokens[start:end], found.loss_mask[start:end]

    def __iter__(self) -> Iterator[Example]:
        return (self[position] for position in range(len(self)))
