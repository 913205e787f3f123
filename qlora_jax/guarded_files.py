"""Files that came with a model: what is checked before anything is made of them.

A model folder may come from anywhere. Three things are asked of each file in it:

*Where it lies.* A link that leads out of the folder is not followed: if its `tokenizer.json` were a
link to a private key, that key would be carried into every export. One kind of link is needed,
those of the Hugging Face cache, where `models--owner--name/snapshots/<commit>/config.json` points
to `models--owner--name/blobs/<hash>`; so a link in a snapshot may lead into the blobs of its own
repository. The folder itself, and a file that was named on the command line, may be links: they are
the user's own choice.

*What it is and how large.* Only regular files are opened (a pipe would be waited for without end),
and no more of them is read than a file of its kind can need.

*How deep and how wide its JSON is.* Python makes an object of 50 bytes and more of three bytes of
JSON, so the number of values is limited too. A key that occurs twice is refused: what reads the
first and what reads the last would see two different files.
"""

import json
import os
import pathlib
import re
import stat
from typing import Any

from qlora_jax.errors import WeightsError

MAX_JSON_BYTES = 16 << 20  # configurations have kilobytes, with a chat template up to a megabyte
MAX_INDEX_BYTES = 64 << 20  # of shards: 9 MB for the 91,000 tensors of DeepSeek-V3
MAX_TOKENIZER_BYTES = 256 << 20  # tokenizer.json has 33 MB for the 262,000 tokens of Gemma 3
MAX_DEPTH = 64
_MAX_VALUES = 1 << 20
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--")
# Strings are skipped whole. Possessive quantifiers keep no way back, so they need no memory.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def check_inside(path: pathlib.Path) -> None:
    """Refuses a file of a folder that is no regular file or that leads out of the folder.

    Args:
        path: of a file that exists; links in the name of its folder are the user's own.

    Raises:
        WeightsError: it leads elsewhere, or is a pipe, a device or a folder.

    Example:
        >>> check_inside(pathlib.Path("/dev/null"))
        Traceback (most recent call last):
        ...
        qlora_jax.errors.WeightsError: /dev/null is not a regular file. Give the model's own...
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise WeightsError(f"{path} is not a regular file. Give the model's own file.")
    folder, target = path.parent.resolve(), path.resolve()
    allowed = [folder]
    for inner, outer in zip(folder.parents, folder.parents[1:], strict=False):
        if inner.name == "snapshots" and _HUB_REPOSITORY.match(outer.name):
            allowed.append(outer / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise WeightsError(
            f"{path} is a link that leads out of its folder, to {target}; such links are not "
            "followed. Copy the file into the folder, or give the folder in which it lies."
        )


def read_guarded(path: pathlib.Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a whole small file of a folder.

    Args:
        path: of the file.
        max_bytes: more than any such file has.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is none.
        WeightsError: it leads out of its folder, is no regular file, or is too large.
    """
    check_inside(path)
    return read_limited(path, max_bytes)


def read_limited(path: pathlib.Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a whole small file that the user named, or that this project wrote.

    Raises:
        OSError: it cannot be read.
        WeightsError: it is too large.
    """
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise WeightsError(
                f"{path} has {size:,} bytes; a file of this name has at most {max_bytes:,}. It "
                "is damaged or made to do harm: download it again, or take another copy."
            )
        return file.read(size)


def parse_json(raw: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Parses JSON with limits.

    Args:
        raw: UTF-8.
        max_depth: of lists and objects in each other.

    Returns:
        The value.

    Raises:
        ValueError: no JSON, nested too deeply, of more than a million values, or with a key twice
            in one object.

    Example:
        >>> parse_json(b'{"a": [1, 2]}')
        {'a': [1, 2]}
        >>> parse_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' is there twice
    """
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES:,} values")
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(raw):
        first = raw[match.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > max_depth:
            raise ValueError(f"its values are nested more than {max_depth} deep")
    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict, for `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def read_json_object(path: pathlib.Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads an object of JSON from a folder.

    Args:
        path: of the file.
        max_bytes: see `read_guarded`.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is refused by `read_guarded` or `parse_json`, or holds no object.
    """
    try:
        value = parse_json(read_guarded(path, max_bytes))
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value
