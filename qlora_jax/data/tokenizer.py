"""Text to ids and back, for whatever form a model brings its tokenizer in.

A `Tokenizer` joins three things that Hugging Face spreads over five files and GGUF keeps in its
metadata: the `tokenizers` pipeline, the tokens that end a text, and the chat template.
"""

import copy
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
import xxhash

from qlora_jax.data.chat_formats import find_chat_format
from qlora_jax.data.chat_template import render_chat_template, render_prefixes
from qlora_jax.data.gguf_tokenizer import adds_bos, build_gguf_tokenizer
from qlora_jax.data.tokenizer_files import (
    find_template,
    first_id,
    is_panic,
    load_backend,
    read_optional_json,
)
from qlora_jax.errors import DataError, WeightsError

# A model may end its turn with another token than the one its files name (SmolLM2 and Qwen name one
# of the two). These mean the end wherever they are control tokens.
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "</s>",
)


class Tokenizer:
    """A model's tokenizer with its chat template.

    `encode` adds no special token, and special tokens that are written in a text become their ids,
    which is what a rendered chat template needs.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      bos_token_id: id of the token before a text, or None.
      eos_token_id: id of the main end token, or None.
      eos_token_ids: ids of all tokens that end a turn or a text, the main one first.
      pad_token_id: id for padding; the end token's where the model names none, else 0.
      add_bos_token: whether the model expects BOS before a plain text.
      chat_template: Jinja source, or None.
      stop_strings: texts that end a reply as an end token does; of the chat format.

    Example:
      >>> words = tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?")
      >>> backend = tokenizers.Tokenizer(words)
      >>> _ = backend.add_special_tokens(["<|im_end|>"])
      >>> tokenizer = Tokenizer(backend, chat_template="{{ messages[0].content }}<|im_end|>")
      >>> text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
      >>> tokenizer.encode(text), tokenizer.eos_token_ids, tokenizer.decode([0, 2])
      ([0, 2], (2,), 'a')
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int | None = None,
        add_bos_token: bool = False,
        chat_template: str | None = None,
    ):
        """Wraps a backend; `from_file` and `from_gguf` find out the arguments.

        Args:
          backend: the pipeline; its truncation and padding are switched off.
          bos_token_id: or None.
          eos_token_ids: what the model's files name, the main one first; other known end tokens
            are added when the vocabulary has them as special tokens.
          pad_token_id: or None.
          add_bos_token: whether the model expects BOS before a plain text.
          chat_template: Jinja source, or None.
        """
        for index in (bos_token_id, *(eos_token_ids := tuple(eos_token_ids)), pad_token_id):
            if index is not None and (type(index) is not int or not 0 <= index < 1 << 31):
                raise WeightsError(
                    f"the model's files name {index!r} as the id of a special token, which must be "
                    "a whole number. Download them again."
                )
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        special = {
            token.content: index
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        known = [special[token] for token in _END_TOKENS if token in special]
        ends = tuple(dict.fromkeys([*eos_token_ids, *known]))
        self.bos_token_id = bos_token_id
        self.eos_token_id = ends[0] if ends else None
        self.eos_token_ids = ends
        fallback = 0 if self.eos_token_id is None else self.eos_token_id
        self.pad_token_id = fallback if pad_token_id is None else pad_token_id
        self.add_bos_token = add_bos_token
        self.chat_template = chat_template
        self.stop_strings: tuple[str, ...] = ()

    def with_chat_format(self, name: str) -> "Tokenizer":
        """The same tokenizer with another way to write conversations.

        Args:
          name: of a `chat_formats.CHAT_FORMATS`, or "model" for the model's own template.

        Returns:
          A new tokenizer; this one stays as it is.

        Raises:
          ConfigError: there is no such format.
        """
        if name == "model":
            return self
        chat_format = find_chat_format(name)
        begin = "{{ bos_token }}" if self.add_bos_token and not chat_format.writes_bos else ""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)  # it covers the template
        other.chat_template = begin + chat_format.template
        other.stop_strings = chat_format.stop_strings
        return other

    @classmethod
    def from_file(cls, path: pathlib.Path | str) -> "Tokenizer":
        """Reads a Hugging Face tokenizer.

        Args:
          path: a folder with `tokenizer.json` (or with T5's `spiece.model`), or that file. From the
            same folder are read, where they are there, `tokenizer_config.json`,
            `special_tokens_map.json`, `generation_config.json`, `config.json` and
            `chat_template.jinja`.

        Returns:
          The tokenizer.

        Raises:
          WeightsError: `tokenizer.json` is missing or damaged, or another file is not JSON.
        """
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        folder = file.parent
        backend = load_backend(file)
        settings = read_optional_json(folder / "special_tokens_map.json")
        settings |= read_optional_json(folder / "tokenizer_config.json")
        ids = {
            key: backend.token_to_id(content)
            for key in ("bos_token", "eos_token", "pad_token")
            if (content := _content(settings.get(key))) is not None
        }
        generation = read_optional_json(folder / "generation_config.json")
        model = read_optional_json(folder / "config.json")
        bos = ids.get("bos_token", model.get("bos_token_id"))
        ends = [
            ids.get("eos_token"),
            *_as_list(generation.get("eos_token_id")),
            *_as_list(model.get("eos_token_id")),
        ]
        return cls(
            backend,
            bos_token_id=bos,
            eos_token_ids=[index for index in ends if index is not None],
            pad_token_id=ids.get("pad_token"),
            add_bos_token=bos is not None and first_id(backend, file) == bos,
            chat_template=find_template(folder, settings),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuilds the tokenizer inside a GGUF file.

        Args:
          metadata: the file's, as `open_checkpoint(path).config` gives it.

        Returns:
          The tokenizer.

        Raises:
          WeightsError: a tokenizer that is not supported (see `gguf_tokenizer.py`).
        """
        metadata = dict(metadata)
        ends = [
            metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom", "eog")
        ]
        return cls(
            build_gguf_tokenizer(metadata),
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=[index for index in ends if index is not None],
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
            add_bos_token=adds_bos(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def to_files(self) -> dict[str, str]:
        """Writes what `from_file` reads, for a tokenizer that has no files of its own (GGUF).

        Returns:
          Contents by file name: `tokenizer.json`, `tokenizer_config.json` and
          `generation_config.json`.
        """
        backend, bos = json.loads(self.backend.to_str()), self.bos_token_id
        if self.add_bos_token and backend["post_processor"] is None:
            token = self.backend.id_to_token(bos)
            copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
            copy.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
            )
            backend = json.loads(copy.to_str())
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos_token,
            **self._special_tokens(),
        }
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        generation = {"bos_token_id": bos, "eos_token_id": list(self.eos_token_ids)}
        generation = {key: value for key, value in generation.items() if value not in (None, [])}
        files = {
            "tokenizer.json": backend,
            "tokenizer_config.json": settings,
            "generation_config.json": generation,
        }
        return {
            name: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            for name, value in files.items()
        }

    def encode(self, text: str) -> list[int]:
        """Turns a text into ids, without adding any special token.

        Args:
          text: any text; special tokens written in it become their ids.

        Returns:
          The ids.

        Raises:
          DataError: the text has half of a surrogate pair, which no encoding can write.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise DataError(_explain_unencodable(text)) from None
        except BaseException as error:
            if not is_panic(error):
                raise
            raise DataError(
                f"the tokenizer gave up on a text of {len(text)} characters ({error}): a rule in "
                "tokenizer.json takes too long. Download it again, or take another model."
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turns ids into a text.

        Args:
          ids: token ids.
          skip_special_tokens: leave out special tokens such as the end token.

        Returns:
          The text; bytes that are no UTF-8 become U+FFFD.
        """
        ids = [int(index) for index in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Writes a conversation the way the model was trained on it.

        Args:
          messages: dictionaries with "role" and "content".
          add_generation_prompt: end with the header of the assistant's turn.

        Returns:
          The text, to be given to `encode`.

        Raises:
          DataError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise DataError(
                "the model has no chat template (it is a base model?). Give plain text or "
                "prompt/completion records, take the instruct model, or put a chat_template.jinja "
                "into the model's folder."
            )
        return render_chat_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens(),
        )

    def render_prefixes(
        self, messages: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[int, bool]]
    ) -> list[str] | None:
        """Writes several beginnings of a conversation at once; see `chat_template`."""
        if self.chat_template is None:
            return None
        special_tokens = self._special_tokens()
        return render_prefixes(self.chat_template, messages, wanted, special_tokens=special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a conversation becomes (32 hex digits)."""
        rest = [self.bos_token_id, self.eos_token_ids, self.pad_token_id, self.add_bos_token]
        digest = xxhash.xxh3_128(self.backend.to_str().encode())
        digest.update(json.dumps([*rest, self.chat_template]).encode())
        return digest.hexdigest()

    def _special_tokens(self) -> dict[str, str]:
        """Returns the variables that templates use, such as `bos_token`."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        ids["pad_token"] = self.pad_token_id
        tokens = {key: self.backend.id_to_token(i) for key, i in ids.items() if i is not None}
        return {key: token for key, token in tokens.items() if token is not None}


def _explain_unencodable(text: Any) -> str:
    """Says why the library does not take a text."""
    if not isinstance(text, str):
        return f"a text is needed, got {type(text).__name__}."
    position = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return (
        f"the text has half of a surrogate pair ({text[position]!a}) at position {position}. "
        "Write the character itself."
    )


def _content(token: Any) -> str | None:
    """Returns a special token's text, which files give as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _as_list(value: Any) -> list[Any]:
    """Wraps a single value."""
    return value if isinstance(value, list) else [value]
