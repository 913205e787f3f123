"""The header of a safetensors file, checked before anything is made of it.

    8 bytes    length of the header, little-endian
    header     {"__metadata__": {"format": "pt"},
                "w": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}, …}
    data       the tensors, without holes: each byte belongs to exactly one tensor

`json.loads` of a header that somebody made to do harm takes twenty times the memory of the file. So
the header is gone through as bytes, one entry at a time, by patterns that need no memory, and what
does not look like an entry ends it. What is kept of an entry takes less than a kilobyte; a file has
no more than 4096 tensors, or one for each kilobyte of it. So reading a header takes at most twice
the size of the file and a few megabytes, whatever is in it.

The rules are those of the format's description and of its reference implementation. A key that
occurs twice is refused: two programs would see two models in the file.
"""

import json
import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import unique_keys
from qlora_jax.weights.files import explain_bytes, file_size, refuse_pickle

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_NAME_BYTES = 256
_MAX_ENTRY_BYTES = 4096
_MAX_DIMS = 8
_MAX_METADATA = 4096
_METADATA = b'"__metadata__"'
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrtu])*+"'
_KEY = re.compile(rb"[ \t\r\n]*+(" + _STRING + rb")[ \t\r\n]*+:[ \t\r\n]*+")
_TEXT = re.compile(_STRING)
_FLAT_OBJECT = re.compile(rb'\{[^{}"]*+(?:' + _STRING + rb'[^{}"]*+)*+\}')
_OPEN = re.compile(rb"[ \t\r\n]*+\{")
_NEXT = re.compile(rb"[ \t\r\n]*+([,}])")
_CLOSE = re.compile(rb"[ \t\r\n]*+\}")
_REST = re.compile(rb"[ \t\r\n]*+\Z")


class Entry(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: of the file.
      offset: of its first byte.
      shape: of the tensor.
      dtype: of the tensor.
      runs: into how many runs of equal length its bytes are divided.
      step: bytes from the start of one run to that of the next.
    """

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    runs: int = 1
    step: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """Reads one file's header and checks all of it against the size of the file.

    Args:
      path: of the file.

    Returns:
      The place of each tensor by its name.

    Raises:
      WeightsError: the file is damaged, cut off, or no safetensors file.
    """
    refuse_pickle(path)
    size = file_size(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise WeightsError(explain_bytes(path, "a safetensors file"))
        if 8 + length > size:
            raise WeightsError(
                f"{path} is cut off: its header has {length} bytes, the file only {size}. "
                "Download it again."
            )
        raw = file.read(length)
    start, entries = 8 + length, {}
    limit = max(4096, size // 1024)
    try:
        for name, value in _members(raw):
            if len(entries) == limit:
                raise ValueError(f"more than {limit} tensors in {size} bytes")
            if name in entries:
                raise ValueError(f"two tensors named {name!r}")
            entries[name] = _parse_entry(path, start, name, value)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(
            f"{explain_bytes(path, 'a safetensors file')} Its header cannot be read: {error!r}."
        ) from None
    _check_places(path, start, size, entries)
    return entries


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and JSON of the entries, one at a time; `__metadata__` is checked and left out."""
    if raw[:1] != b"{":
        raise ValueError("it does not begin with '{'")
    has_metadata, position, more = False, 1, not _CLOSE.match(raw, 1)
    while more:
        key = _match(_KEY, raw, position, "a name and ':'")
        if raw.startswith(_METADATA, key.start(1)):
            if has_metadata:
                raise ValueError("__metadata__ is there twice")
            has_metadata, position = True, _skip_metadata(raw, key.end())
        else:
            value = _match(_FLAT_OBJECT, raw, key.end(), "an object")
            if value.end() - value.start() > _MAX_ENTRY_BYTES:
                raise ValueError(f"an entry of {value.end() - value.start()} bytes")
            position = value.end()
            yield _name(raw, *key.span(1)), value[0]
        following = _match(_NEXT, raw, position, "',' or '}'")
        position, more = following.end(), following[1] == b","
    if position == 1:
        position = _CLOSE.match(raw, 1).end()
    _match(_REST, raw, position, "nothing but spaces")


def _skip_metadata(raw: bytes, position: int) -> int:
    """Returns where an object of texts ends."""
    position = _match(_OPEN, raw, position, "an object of texts").end()
    if end := _CLOSE.match(raw, position):
        return end.end()
    seen: set[str] = set()
    while True:
        key = _match(_KEY, raw, position, "a key and ':'")
        text = _match(_TEXT, raw, key.end(), "a text")
        name = _name(raw, *key.span(1))
        if name in seen or len(seen) == _MAX_METADATA:
            raise ValueError(f"__metadata__ has {name!r} twice, or more than {_MAX_METADATA} keys")
        seen.add(name)
        following = _match(_NEXT, raw, text.end(), "',' or '}'")
        position = following.end()
        if following[1] == b"}":
            return position


def _match(pattern: re.Pattern, raw: bytes, position: int, expected: str) -> re.Match:
    if (match := pattern.match(raw, position)) is None:
        found = raw[position : position + 16]
        raise ValueError(f"expected {expected} at byte {8 + position}, found {found!r}")
    return match


def _name(raw: bytes, start: int, end: int) -> str:
    """Decodes a name; it is a key and never a path."""
    if end - start > _MAX_NAME_BYTES + 2:
        raise ValueError(f"a name of {end - start} bytes, at most {_MAX_NAME_BYTES} are allowed")
    name = json.loads(raw[start:end])
    if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"a name that is no text: {name!a}")
    return name


def _parse_entry(path: pathlib.Path, start: int, name: str, value: bytes) -> Entry:
    """Turns one header entry into a place in the file."""
    info = json.loads(value, object_pairs_hook=unique_keys)
    if not isinstance(info["dtype"], str) or (dtype := DTYPES.get(info["dtype"])) is None:
        raise ValueError(f"{name!r} of unknown dtype {info['dtype']}, known: {', '.join(DTYPES)}")
    shape, offsets = info["shape"], info["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has {numbers!r} where numbers are needed")
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"{name!r} has {len(shape)} dimensions, at most {_MAX_DIMS} are allowed")
    begin, end = offsets
    # Python's integers do not overflow: a product that a machine word cannot hold fits no file.
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(f"{end - begin} bytes for {info['dtype']} {shape}, not {nbytes}")
    return Entry(path, start + begin, tuple(shape), dtype)


def _check_places(path: pathlib.Path, start: int, size: int, entries: dict[str, Entry]) -> None:
    """Refuses tensors that overlap, reach beyond the file, or leave bytes to nobody."""
    position, previous = start, "the header"
    places = sorted((entry.offset, entry.nbytes, name) for name, entry in entries.items())
    for offset, nbytes, name in places:
        if offset + nbytes > size:
            raise WeightsError(
                f"{path} is cut off: a tensor reaches to byte {offset + nbytes}, the file has "
                f"{size}. Download it again."
            )
        if offset != position:
            what = "overlap" if offset < position else "leave a hole between them"
            raise WeightsError(
                f"{path} is damaged: {previous!r} and {name!r} {what}. Download it again."
            )
        position, previous = offset + nbytes, name
    if position != size:
        raise WeightsError(
            f"{path} is damaged: {size - position} bytes at its end belong to no tensor. "
            "Download it again."
        )
