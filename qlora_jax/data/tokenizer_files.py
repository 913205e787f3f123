"""The files that a model's tokenizer comes in, read with limits (see `guarded_files`)."""

import pathlib
from typing import Any

import tokenizers

from qlora_jax.data.sentencepiece_model import build_sentencepiece_tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import MAX_TOKENIZER_BYTES, read_guarded, read_json_object

_MOST_EXTRA_IDS = 10_000


def load_backend(file: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads `tokenizer.json`."""
    if not file.is_file():
        spiece = file.with_name("spiece.model")
        if spiece.is_file():
            return build_sentencepiece_tokenizer(spiece, _extra_ids(file.parent))
        hint = ""
        if (file.parent / "tokenizer.model").is_file():
            hint = (
                " The folder has a SentencePiece tokenizer.model; convert it in an environment "
                "with transformers: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
            )
        raise WeightsError(f"{file} (the tokenizer) is missing.{hint}")
    raw = read_guarded(file, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except BaseException as error:  # plain Exception for anything wrong, or a panic of Rust
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise WeightsError(
            f"{file} cannot be read as a tokenizer: {error}. Download it again."
        ) from None


def _extra_ids(folder: pathlib.Path) -> int:
    """How many sentinels T5's tokenizer adds: what its files say, else 100, and none for mT5."""
    said = read_optional_json(folder / "tokenizer_config.json").get("extra_ids")
    is_t5 = read_optional_json(folder / "config.json").get("model_type") == "t5"
    if said is None:
        return 100 if is_t5 else 0
    if type(said) is not int or not 0 <= said <= _MOST_EXTRA_IDS:
        raise WeightsError(
            f"{folder / 'tokenizer_config.json'} has extra_ids {said!r}, expected is a number from "
            f"0 to {_MOST_EXTRA_IDS}. Download it again."
        )
    return said


def read_optional_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads an optional JSON object; a file that is not there counts as empty."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}


def find_template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """Finds the chat template: its own file, or the configuration's, one or several by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_guarded(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(f"{file} is not UTF-8: {error}. Download it again.") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise WeightsError(
            f"{folder / 'tokenizer_config.json'} has a chat_template that is no text but "
            f"{type(template).__name__}. Download it again."
        )
    return template


def first_id(backend: tokenizers.Tokenizer, file: pathlib.Path) -> int | None:
    """The id that a text begins with, whatever the text is."""
    try:
        return next(iter(backend.encode("a").ids), None)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise WeightsError(f"{file} cannot encode a text: {error}. Download it again.") from None


def is_panic(error: BaseException) -> bool:
    """Whether the library, which is written in Rust, met what it has no error for."""
    return type(error).__name__ == "PanicException"
