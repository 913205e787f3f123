"""Writing a folder of safetensors so that a kill at any moment costs seconds of work, not hours.

Sizes and places of all tensors are known before the first is computed. So every file is allocated
at once under a name that ends in `.partial` (a full disk shows now, not after an hour), tensors are
written to their places in any order, and a journal says which of them are on the disk. The next
call reads the journal and goes on. When all is written, headers are put in, files are flushed and
renamed; no name without `.partial` ever belongs to half a file.

    .quantize.jsonl   {"job": {…}}, then {"done": […], "tails": {…}} after each flush of the data;
                      each line with its hash, because a wrong name in it would leave a hole

The JSON of bitsandbytes' quant states has a length that depends on the values. These small tensors
lie at the end of their file, after all data, and wait in the journal until then.
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from qlora_jax.errors import WeightsError
from qlora_jax.weights.safetensors_header import DTYPE_NAMES

JOURNAL = ".quantize.jsonl"
_PARTIAL = ".partial"
_HASH, _KEYS = "xxh3_64", {"job", "done", "tails", "finished"}
_FLUSH_BYTES = 256 << 20
_ALIGNMENT = 64
_CONTINUES = "Put that right and run the same command again; it continues where this one ended."
_SPARE_BYTES = 16 << 20  # for configuration, tokenizer and journal


class TensorSpec(NamedTuple):
    """A tensor to be written; `tail`: uint8, of at most so many bytes as the shape says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tail: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Values to be written into a tensor from a byte on."""

    tensor: str
    start: int
    values: np.ndarray


def split_into_files(
    groups: Sequence[Mapping[str, TensorSpec]], file_bytes: int
) -> dict[str, dict[str, TensorSpec]]:
    """Deals tensors out to files with the names that Hugging Face uses.

    Args:
      groups: tensors that stay together, in order.
      file_bytes: a file that would grow beyond this ends before the group.

    Returns:
      The tensors of each file.

    Example:
      >>> spec = TensorSpec((8,), np.dtype(np.uint8))
      >>> list(split_into_files([{"a": spec}, {"b": spec}], 10))
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    files: list[dict[str, TensorSpec]] = [{}]
    for group in groups:
        held = sum(spec.nbytes for spec in files[-1].values())
        if files[-1] and held + sum(spec.nbytes for spec in group.values()) > file_bytes:
            files.append({})
        files[-1] |= group
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    count = len(files)
    return {f"model-{i:05}-of-{count:05}.safetensors": file for i, file in enumerate(files, 1)}


class FolderWriter:
    """Writes the files of one job, or continues to.

    Attributes:
      folder: where.
      finished: whether the job was finished by an earlier call.
      done: keys that are on the disk.
    """

    def __init__(self, folder: pathlib.Path, job: Mapping[str, Any], *, advice: str = _CONTINUES):
        """Takes the folder; use it in a `with` statement.

        Args:
          folder: a new one, or one that holds the same job.
          job: what is done here, as JSON; a folder continues only the job it began.
          advice: what to do after an error of the disk.

        Raises:
          WeightsError: the folder holds something else, another process writes there, or it cannot
            be written to.
        """
        self.folder, self._job = folder, json.loads(json.dumps(job))
        self._advice = advice
        self.done: set[str] = set()
        self.finished = False
        self._tails: dict[str, str] = {}
        self._fresh: list[str] = []
        self._fresh_tails: dict[str, str] = {}
        self._unflushed = 0
        self._places: dict[str, tuple[str, int]] = {}
        self._files: dict[str, dict[str, TensorSpec]] = {}
        self._descriptors: dict[str, int] = {}
        with self._explained():
            known = set(os.listdir(folder)) if folder.is_dir() else set()
            if known and JOURNAL not in known:
                raise WeightsError(
                    f"{folder} is not empty (it has {sorted(known)[0]}). Give a new folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._journal)
            raise WeightsError(f"{folder} is being written by another process.") from None
        try:
            with self._explained():
                self._read_journal()
        except BaseException:
            os.close(self._journal)
            raise

    def __enter__(self) -> "FolderWriter":
        """Returns itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Lets go of the folder; what is not flushed is written again by the next call."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        os.close(self._journal)

    def allocate(self, files: Mapping[str, Mapping[str, TensorSpec]]) -> None:
        """Makes room for all files.

        Args:
          files: from `split_into_files`.

        Raises:
          WeightsError: the disk has not enough room, or a file of an earlier call is gone.
        """
        sizes: dict[str, int] = {}
        for name, tensors in files.items():
            self._files[name] = dict(sorted(tensors.items(), key=_place_in_file))
            offset = self._data_start(name)
            for tensor, spec in self._files[name].items():
                self._places[tensor] = (name, offset)
                offset += spec.nbytes
            sizes[name] = offset
        begun = [name for name in sizes if self._partial(name).exists() or self._final(name)]
        if self.done and len(begun) < len(sizes):
            gone = next(name for name in sizes if name not in begun)
            raise WeightsError(
                f"{self.folder} lacks {gone}{_PARTIAL}, which an earlier call began. Remove the "
                "folder and start again."
            )
        missing = [name for name in sizes if not self._final(name)]
        with self._explained():
            held = sum(self._partial(n).stat().st_blocks * 512 for n in missing if n in begun)
            needed = max(0, sum(sizes[name] for name in missing) - held) + _SPARE_BYTES
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise WeightsError(
                    f"{self.folder} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free "
                    "there. Make room, or give another folder."
                )
            try:
                for name in missing:
                    descriptor = os.open(self._partial(name), os.O_RDWR | os.O_CREAT, 0o666)
                    self._descriptors[name] = descriptor
                    os.posix_fallocate(descriptor, 0, sizes[name])
            except OSError:
                if not self.done:  # do not keep a full disk full for nothing
                    for name in self._descriptors:
                        self._partial(name).unlink()
                raise
            self._flush_folder()

    def write(self, key: str, pieces: Sequence[Piece], tails: Mapping[str, bytes] = {}) -> None:
        """Writes what one step of the job has made.

        Args:
          key: of the step; it is in `done` in a later call if all of this has reached the disk.
          pieces: of tensors.
          tails: whole tensors that were declared as tails, ASCII.
        """
        with self._explained():
            for tensor, start, values in pieces:
                name, offset = self._places[tensor]
                data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
                _write_at(self._descriptors[name], offset + start, data)
                self._unflushed += len(data)
        self._fresh.append(key)
        self._fresh_tails |= {name: value.decode("ascii") for name, value in tails.items()}
        if self._unflushed >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Waits until everything is on the disk, then says so in the journal."""
        if not self._fresh:
            return
        with self._explained():
            for descriptor in self._descriptors.values():
                os.fdatasync(descriptor)
            self._append({"done": self._fresh, "tails": self._fresh_tails})
        self.done.update(self._fresh)
        self._tails |= self._fresh_tails
        self._fresh, self._fresh_tails, self._unflushed = [], {}, 0

    def finish_files(self) -> list[pathlib.Path]:
        """Completes all files and gives them their names.

        Returns:
          Their paths, in order.
        """
        self.flush()
        with self._explained():
            for name, descriptor in self._descriptors.items():
                tensors, start = self._files[name], self._data_start(name)
                tails = [self._tails[t].encode("ascii") for t, spec in tensors.items() if spec.tail]
                header = _header(tensors, [len(tail) for tail in tails])
                prefix = struct.pack("<Q", start - 8) + header.ljust(start - 8)
                _write_at(descriptor, 0, memoryview(prefix))
                end = start + sum(spec.nbytes for spec in tensors.values() if not spec.tail)
                _write_at(descriptor, end, memoryview(b"".join(tails)))
                os.ftruncate(descriptor, end + sum(map(len, tails)))
                os.fsync(descriptor)
                os.replace(self._partial(name), self.folder / name)
            self._flush_folder()
        return [self.folder / name for name in self._files]

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file so that it is there whole or not at all."""
        partial = self.folder / (name + _PARTIAL)
        with self._explained():
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
            self._flush_folder()

    def finish(self) -> None:
        """Says in the journal that the job is finished."""
        with self._explained():
            self._append({"finished": True})
        self.finished = True

    def _read_journal(self) -> None:
        """Takes over what an earlier call did, or begins."""
        with open(self._journal, "rb", closefd=False) as file:
            text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):  # a kill tore the last line
            os.ftruncate(self._journal, whole)
        lines = [self._checked(line) for line in text[:whole].splitlines()]
        if not lines:
            self._append({"job": self._job})
            return
        if lines[0] != {"job": self._job}:
            raise WeightsError(
                f"{self.folder} belongs to another job, {json.dumps(lines[0].get('job'))}; "
                f"this one is {json.dumps(self._job)}. Give a new folder, or remove that one."
            )
        for line in lines[1:]:
            self.done.update(line.get("done", ()))
            self._tails |= line.get("tails", {})
            self.finished |= line.get("finished", False)

    def _append(self, line: Mapping[str, Any]) -> None:
        _write_all(self._journal, json.dumps({**line, _HASH: _hash(line)}).encode() + b"\n")
        os.fsync(self._journal)

    def _checked(self, line: bytes) -> dict[str, Any]:
        """A line of the journal; those of older versions have no hash."""
        try:
            said = json.loads(line)
            digest = said.pop(_HASH, None)
            whole = said.keys() <= _KEYS and digest in (None, _hash(said))
        except (ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise WeightsError(
                f"{self.folder / JOURNAL} is damaged. Remove the folder and start again."
            )
        return said

    def _partial(self, name: str) -> pathlib.Path:
        return self.folder / (name + _PARTIAL)

    def _final(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _data_start(self, name: str) -> int:
        """Where a file's data begins: after the longest header that the tails can lead to."""
        tensors = self._files[name]
        longest = _header(tensors, [spec.nbytes for spec in tensors.values() if spec.tail])
        return -(-(8 + len(longest)) // _ALIGNMENT) * _ALIGNMENT

    def _flush_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"{self.folder} cannot be written: {error.strerror or error}. {self._advice}"
            ) from error


def _hash(line: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(line).encode())


def _place_in_file(item: tuple[str, TensorSpec]) -> tuple[bool, bool]:
    """Tensors whose size keeps the next one aligned come first: such can be mapped and used.

    Tails come last: their final lengths move nothing that was written before.
    """
    spec = item[1]
    return spec.tail, spec.nbytes % _ALIGNMENT != 0


def _header(tensors: Mapping[str, TensorSpec], tail_lengths: Sequence[int]) -> bytes:
    """The JSON of a file whose tails have these lengths."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    lengths, offset = iter(tail_lengths), 0
    for name, spec in tensors.items():
        shape = (next(lengths),) if spec.tail else spec.shape
        end = offset + math.prod(shape) * spec.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    return json.dumps(header, separators=(",", ":")).encode()


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Writes all of it, however little the kernel takes at once."""
    while len(data):
        count = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
