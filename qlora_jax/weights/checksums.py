"""Hashes of a packed folder, so that a bit that has flipped is found before it is trained on.

`qlora_jax_checksums.json` is written with the folder (`qlora_jax.packed_checkpoint`) and covers
every byte of every other file: small files as a whole, safetensors in *ranges*, the header and each
tensor.

    {"files": {"config.json": {"bytes": 612, "xxh3_128": "…"},
               "model.safetensors": {"bytes": 81920, "ranges": [[0, 512, "…"], …]}},
     "xxh3_128": "…"}

What is small is verified when the folder is opened, a tensor when it is read: its bytes are about
to be used anyway, so a file is not read twice. The last field is the hash of `files`. The hash is
xxh3 with 128 bits, which finds accidents, not forgers.

A folder without that file (an older one, or of another tool) is read without verification.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from qlora_jax.errors import WeightsError
from qlora_jax.files import fingerprint
from qlora_jax.guarded_files import MAX_INDEX_BYTES, parse_json, read_guarded
from qlora_jax.weights.files import file_size

CHECKSUMS = "qlora_jax_checksums.json"
Range = tuple[int, int, str]  # first byte, bytes, hash


def checksums_of(
    tensors: Mapping[pathlib.Path, Iterable[int]], small: Mapping[str, bytes]
) -> bytes:
    """Describes a folder.

    Args:
        tensors: of each safetensors file, where those of its tensors begin that have bytes.
        small: contents of the other files by name.

    Returns:
        The content of `qlora_jax_checksums.json`.
    """
    files: dict[str, Any] = {
        name: {"bytes": len(content), "xxh3_128": _hash(content)} for name, content in small.items()
    }
    for path, starts in tensors.items():
        size = file_size(path)
        files[path.name] = {"bytes": size, "ranges": _ranges(path, [0, *sorted(starts), size])}
    return _render(files)


class Checksums:
    """What the bytes of a folder have to be."""

    def __init__(self, folder: pathlib.Path, files: Mapping[str, Any]):
        """See `read`."""
        self._folder = folder
        self._ranges: dict[tuple[str, int], Range] = {}
        for name, said in files.items():
            for start, count, digest in said.get("ranges", ()):
                self._ranges[name, start] = (start, count, digest)
        self._files = files

    @classmethod
    def read(cls, folder: pathlib.Path) -> Checksums | None:
        """Reads `qlora_jax_checksums.json`, and verifies all files but what tensors hold.

        Returns:
            None where there is no such file.

        Raises:
            WeightsError: a file is gone, of another size, or has other bytes.
        """
        path = folder / CHECKSUMS
        if not path.is_file():
            return None
        content = read_guarded(path, MAX_INDEX_BYTES)
        try:
            files = parse_json(content)["files"]
            if content != _render(files):
                raise _damaged(path)
            found = cls(folder, files)
            found._check_small()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _damaged(path) from None
        return found

    def check(self, path: pathlib.Path, offset: int, array: np.ndarray, name: str) -> None:
        """Verifies a tensor that was read.

        Args:
            path: of its file.
            offset: of its first byte.
            array: contiguous.
            name: of the tensor, for the message.

        Raises:
            WeightsError: it has other bytes.
        """
        _, count, digest = self._ranges.get((path.name, offset), (0, -1, ""))
        content = array.reshape(-1).view(np.uint8)
        if content.nbytes != count or xxhash.xxh3_128_hexdigest(content) != digest:
            raise _damaged(path, name)

    def _check_small(self) -> None:
        for name, said in self._files.items():
            path = self._folder / name
            if pathlib.PurePath(name).name != name:
                raise _damaged(self._folder / CHECKSUMS)
            if not path.is_file() or file_size(path) != said["bytes"]:
                raise _damaged(path)
            if "ranges" not in said:
                if fingerprint(path) != said["xxh3_128"]:
                    raise _damaged(path)
                continue
            start, count, digest = said["ranges"][0]
            with path.open("rb") as file:
                if start != 0 or _hash(file.read(count)) != digest:
                    raise _damaged(path, "header")


def _damaged(path: pathlib.Path, what: str = "") -> WeightsError:
    where = f"{path} ({what})" if what else str(path)
    return WeightsError(
        f"{where} is not what was written there: it is damaged. Quantize the original model again, "
        f"or copy the folder again. (If it was changed on purpose, remove {CHECKSUMS} beside it.)"
    )


def _ranges(path: pathlib.Path, edges: list[int]) -> list[Range]:
    """The header and the tensors, with hashes; together they are the whole file."""
    with path.open("rb") as file:
        return [
            (start, stop - start, _hash_next(file, stop - start))
            for start, stop in zip(edges, edges[1:], strict=False)
        ]


def _hash_next(file: Any, count: int) -> str:
    digest = xxhash.xxh3_128()
    while count and (chunk := file.read(min(count, 1 << 20))):
        digest.update(chunk)
        count -= len(chunk)
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _render(files: Mapping[str, Any]) -> bytes:
    digest = _hash(json.dumps(files, sort_keys=True).encode())
    return (json.dumps({"files": files, "xxh3_128": digest}, indent=1) + "\n").encode()
