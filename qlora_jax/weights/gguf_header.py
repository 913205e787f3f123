"""The header of a GGUF file, checked before anything is made of it.

    "GGUF", version, number of tensors, number of metadata fields
    fields     key, type, value; a value is a scalar, a text, or an array of one kind of these
    table      name, dimensions, type and offset of each tensor
    padding    to a multiple of `general.alignment`
    data       the tensors, each at a multiple of the alignment

`gguf.GGUFReader` is not used: it maps the file and believes every count and length in it, so that a
damaged header can make it loop without end or ask for any amount of memory, and for the 98,000
texts of SmolLM2's vocabulary it takes 2.7 seconds and 160 MB (a NumPy view for each).

Here every length is compared with what is left of the file before anything is read, and arrays are
kept as they are in the file: numbers as an `array.array`, texts as a `TextArray`, which is their
bytes and where they end. What else is kept is limited in number, and fields that are no arrays to a
quarter of the file. So a header takes at most twice the size of the file and a few megabytes.
"""

import array
import math
import pathlib
import struct
from typing import Any, BinaryIO, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora_jax.errors import WeightsError
from qlora_jax.text_array import TextArray
from qlora_jax.weights.files import explain_bytes, file_size

SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q8_0"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"),
)
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Metadata value types of the format, by their number; codes of `struct` and of `array`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_TYPE_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}
_MAX_FIELDS = 4096
_MAX_NAME_BYTES = 256
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20


class GGUFEntry(NamedTuple):
    """Where a tensor lies, its shape (row-major), and how it is stored."""

    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def read_gguf_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
    """Reads the metadata and the table of tensors.

    Args:
      path: of the file.

    Returns:
      The values by key, and the places by name, in the order of the file.

    Raises:
      WeightsError: not a GGUF file, damaged, one part of several, or with tensors in a type that is
        not supported; all such types are named.
    """
    with open(path, "rb") as file:
        return _Header(path, file).parse()


class _Header:
    """A parser that checks every length against the size of the file before it believes it."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self._path, self._file, self._size = path, file, file_size(path)
        self._position = 0
        self._most_tensors = max(4096, self._size // 1024)
        self._text_left = max(1 << 20, self._size // 4)

    def parse(self) -> tuple[dict[str, Any], dict[str, GGUFEntry]]:
        """Returns the metadata and the table of tensors."""
        if self._take(min(4, self._size)) != _MAGIC:
            raise WeightsError(explain_bytes(self._path, "a GGUF file"))
        version = self._scalar("I")
        if version not in _VERSIONS:
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise WeightsError(
                f"{self._path} is GGUF version {version}{hint}; versions 2 and 3, little-endian, "
                "are supported. Convert it again with a current llama.cpp."
            )
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        # The shortest field has 13 bytes, the shortest row of the table 24.
        self._require(13 * field_count + 24 * tensor_count)
        if tensor_count > self._most_tensors or field_count > _MAX_FIELDS:
            raise self._damaged(f"{tensor_count} tensors and {field_count} metadata fields")
        config: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._name()
            if key in config:
                raise self._damaged(f"the key {key!r} twice")
            config[key] = self._value(self._scalar("I"))
        if (parts := config.get("split.count", 1)) not in (0, 1):
            raise WeightsError(
                f"{self._path} is one of {parts} parts. Join them first: "
                "`llama-gguf-split --merge FIRST_PART OUTPUT.gguf`."
            )
        table: dict[str, tuple] = {}
        for _ in range(tensor_count):
            name = self._name()
            if name in table:
                raise self._damaged(f"two tensors named {name!r}")
            table[name] = self._tensor_info(name)
        return config, self._place(table, config.get("general.alignment", 32))

    def _place(self, table: dict[str, tuple], alignment: int) -> dict[str, GGUFEntry]:
        """Turns the table into checked places in the file."""
        power = type(alignment) is int and 0 < alignment <= _MAX_ALIGNMENT
        if not power or alignment & (alignment - 1):
            raise self._damaged(f"an alignment of {alignment!r}, which must be a power of two")
        start = -(-self._position // alignment) * alignment
        entries: dict[str, GGUFEntry] = {}
        refused: dict[str, list[str]] = {}
        for name, (shape, number, offset) in table.items():
            kind = _TYPE_NAMES.get(number, f"number {number}")
            if kind not in SUPPORTED_TYPES:
                refused.setdefault(kind, []).append(name)
                continue
            if offset % alignment:
                raise self._damaged(f"{name!r} at byte {offset}, no multiple of {alignment}")
            entries[name] = GGUFEntry(start + offset, shape, GGMLQuantizationType[kind])
        if refused:
            listing = "; ".join(
                f"{kind} ({len(names)}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for kind, names in sorted(refused.items())
            )
            raise WeightsError(
                f"{self._path} has tensors of types that are not supported: {listing}. Supported "
                f"are {', '.join(SUPPORTED_TYPES)}. Take another quantization of the model."
            )
        self._check(entries)
        return entries

    def _check(self, entries: dict[str, GGUFEntry]) -> None:
        """Refuses tensors that are no whole blocks, reach beyond the file, or overlap."""
        position, previous = 0, ""
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            block, block_bytes = GGML_QUANT_SIZES[entry.type]
            if not entry.shape or 0 in entry.shape or entry.shape[-1] % block:
                raise self._damaged(f"{name!r} of shape {list(entry.shape)} in {entry.type.name}")
            # Python's integers do not overflow: a product that no machine word holds fits no file.
            end = entry.offset + math.prod(entry.shape) // block * block_bytes
            if end > self._size:
                raise WeightsError(
                    f"{self._path} is cut off: tensor {name!r} reaches to byte {end}, the file has "
                    f"{self._size}. Download it again."
                )
            if entry.offset < position:
                raise self._damaged(f"{previous!r} and {name!r} in the same place")
            position, previous = end, name

    def _tensor_info(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Returns shape (row-major), type number and offset of the next tensor."""
        dims = self._scalar("I")
        if dims > _MAX_DIMS:
            raise self._damaged(f"tensor {name!r} with {dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return shape, self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        """Returns the next metadata value; an array's values are no arrays."""
        if kind == _STRING:
            length = self._scalar("Q")
            if length > self._text_left:
                raise self._damaged(f"a text of {length} bytes, more than such a file can need")
            self._text_left -= length
            return self._decode(self._take(length))
        if kind in _SCALARS:
            value = self._scalar(_SCALARS[kind])
            return self._bool(value) if kind == _BOOL else value
        if kind != _ARRAY:
            raise self._damaged(f"metadata of type {kind}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind == _STRING:
            return self._texts(count)
        if item_kind not in _SCALARS:
            raise self._damaged(f"a metadata array of type {item_kind}")
        values = array.array(_SCALARS[item_kind])
        values.frombytes(self._take(count * values.itemsize))
        return values

    def _texts(self, count: int) -> TextArray:
        self._require(8 * count)
        data, ends = bytearray(), array.array("Q")
        for _ in range(count):
            text = self._take(self._scalar("Q"))
            self._decode(text)
            data += text
            ends.append(len(data))
        return TextArray(data, ends)

    def _name(self) -> str:
        """Returns a key or a tensor's name."""
        length = self._scalar("Q")
        self._require(length)
        if not 0 < length <= _MAX_NAME_BYTES:
            raise self._damaged(f"a name of {length} bytes")
        if "\0" in (name := self._decode(self._take(length))):
            raise self._damaged(f"the name {name!r}")
        return name

    def _bool(self, value: int) -> bool:
        if value > 1:
            raise self._damaged(f"a truth value of {value}")
        return bool(value)

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _decode(self, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"text that is not UTF-8 ({error.reason})") from None

    def _take(self, count: int) -> bytes:
        self._require(count)
        self._position += count
        return self._file.read(count)

    def _require(self, count: int) -> None:
        if self._position + count > self._size:
            raise WeightsError(
                f"{self._path} is cut off or damaged: its header needs {count} bytes at byte "
                f"{self._position}, the file has {self._size}. Download it again."
            )

    def _damaged(self, found: str) -> WeightsError:
        return WeightsError(f"{self._path} is damaged: its header has {found}. Download it again.")
