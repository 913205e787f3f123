"""A tokenizer as GGUF metadata: the inverse of `gguf_tokenizer`.

GGUF has no place for a pipeline. It stores tokens, their kinds and merges (or scores), and one
name for the rule that cuts text. Whether a name stands for the rule of a tokenizer is found out by
trying: the metadata is read back, and both tokenizers must give the same ids for a text in which
the known rules differ.
"""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

from qlora_jax.data.gguf_tokenizer import build_gguf_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_RULES = ("llama-bpe", "qwen2", "smollm", "gpt-2")
_LOWEST_SCORE = -1e6
# Digits, contractions in both cases, spaces before and after words and lines, scripts, marks that
# NFC composes, symbols, bytes that are no text of their own.
_PROBE = (
    "x  12   3\n 4\t 56  a 7b8 9.  !?  \n\n  1\r\n 2"
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～\n \n\n \t\t \n  leading\n"
    "3 33 333 3333 33333 3.3 3..3 I've been 'told he's there, 'RE you sure? We'Ve a'lL; 'D you "
    "like\r\n\r\n tea???? ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "កាន់តែពិសេស e\u0301 \u00e9 🚀 (normal) 😶‍🌫️ (multiple) def f(x):\n\treturn x**2  # \u00a0end "
)


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Writes the keys `tokenizer.*`.

    Args:
      tokenizer: of a model, from `tokenizer.json` or from GGUF.
      vocab_size: rows of the embedding; rows without a token get one that is never used.

    Returns:
      Values by key. Reading them back gives the same ids for a text of many scripts.

    Raises:
      WeightsError: a kind of tokenizer, or a rule of cutting text, that GGUF has no name for.

    Example:
      >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
      >>> tokenizer_metadata(Tokenizer(backend), 1)
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: a tokenizer of the kind WordLevel cannot be written as GGUF...
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise WeightsError(
            f"a tokenizer of the kind {model['type']} cannot be written as GGUF here; byte-level "
            "BPE and SentencePiece BPE can. Choose format hf."
        )
    tokens, types = _vocabulary(tokenizer.backend, model, vocab_size)
    common: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos_token,
    }
    ends = tokenizer.eos_token_ids
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"eot": ends[1] if len(ends) > 1 else None, "padding": tokenizer.pad_token_id}
    ids["unknown"] = types.index(_UNKNOWN) if _UNKNOWN in types else None
    common |= {f"tokenizer.ggml.{k}_token_id": i for k, i in ids.items() if i is not None}
    if tokenizer.chat_template:
        common["tokenizer.chat_template"] = tokenizer.chat_template
    wanted = tokenizer.encode(_PROBE)
    for candidate in _candidates(model, tokens):
        read = build_gguf_tokenizer(common | candidate)
        if read.encode(_PROBE, add_special_tokens=False).ids == wanted:
            return common | candidate
    raise WeightsError(
        "GGUF has no name for the way in which this tokenizer cuts text (tried: "
        f"{', '.join(_RULES)}, SentencePiece), so its ids would be wrong. Choose format hf."
    )


def _vocabulary(
    backend: tokenizers.Tokenizer, model: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, a place for each row of the embedding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    unknown = model.get("unk_token") or ("<unk>" if model.get("byte_fallback") else None)
    added = backend.get_added_tokens_decoder()
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size:
            raise WeightsError(
                f"token {index} ({token!r}) has no row in the embedding, which has {vocab_size}; "
                "tokenizer and model do not belong together."
            )
        tokens[index] = token
        if index in added:
            types[index] = _CONTROL if added[index].special else _USER_DEFINED
        elif model.get("byte_fallback") and _is_byte(token):
            types[index] = _BYTE
        else:
            types[index] = _NORMAL
        if token == unknown:
            types[index] = _UNKNOWN
    return tokens, types


def _candidates(model: dict[str, Any], tokens: list[str]) -> Iterator[dict[str, Any]]:
    """The ways in which the rest of the metadata may be said."""
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if not model.get("byte_fallback"):
        for rule in _RULES:
            yield {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": rule,
                "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            }
        return
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    scores = [-float(rank[t]) if t in rank else _LOWEST_SCORE for t in tokens]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
