"""Rebuilds the tokenizer that a GGUF file describes in its metadata.

GGUF stores a vocabulary, merges or scores, and the *name* of the rule that cuts text before the
merges apply (`tokenizer.ggml.pre`). With the wrong rule everything still works and many ids are
wrong, so only names are accepted whose rule is known. The rules below are those of the models'
original `tokenizer.json`, which llama.cpp's name stands for.
"""

import array
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from qlora_jax.errors import WeightsError
from qlora_jax.text_array import TextArray

_KINDS = ("gpt2", "llama")
_LONGEST_TOKEN = 1024  # characters; all ways to cut a token in two are looked at
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type

# Runs of up to three digits for Llama 3, single digits for Qwen 2.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS = (*_LLAMA3_NAMES, "qwen2", "smollm", "gpt-2", "default")


def build_gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Builds a tokenizer from GGUF metadata.

    Args:
      metadata: with the keys `tokenizer.ggml.*`.

    Returns:
      A `tokenizers.Tokenizer` that adds no special tokens by itself. Control tokens are special,
      user-defined ones are matched whole.

    Raises:
      WeightsError: a kind of tokenizer or a cutting rule that is not supported, or missing keys.

    Example:
      >>> build_gguf_tokenizer({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: the GGUF file's tokenizer is of the kind 'bert'; supported...
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _array(metadata, "tokens", str)
    if not tokens:
        raise WeightsError(
            "the GGUF file has no tokenizer (tokenizer.ggml.tokens). Take a file that was "
            "converted with its vocabulary."
        )
    if longest := max((t for t in tokens if len(t) > _LONGEST_TOKEN), key=len, default=""):
        raise WeightsError(
            f"the GGUF file's tokenizer has a token of {len(longest)} characters, expected are at "
            f"most {_LONGEST_TOKEN}: it is damaged. Download it again."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightsError(
            f"the GGUF file's tokenizer has {len(tokens) - len(vocab)} tokens twice; the ids of a "
            "text would not be certain. Convert the model again with a current llama.cpp."
        )
    if kind not in _KINDS:
        raise WeightsError(
            f"the GGUF file's tokenizer is of the kind {kind!r}; supported are 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece BPE). Use the model's Hugging Face folder instead."
        )
    try:
        build = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer = build(metadata, vocab)
    except WeightsError:
        raise
    except Exception as error:  # the library raises plain Exception for what it does not take
        raise WeightsError(
            f"the GGUF file's tokenizer cannot be built: {error}. Download it again."
        ) from None
    types = _array(metadata, "token_type", int)
    pairs = list(zip(tokens, types, strict=False))
    special = [token for token, kind in pairs if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    whole = [token for token, kind in pairs if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return tokenizer


def _array(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    """An array of the metadata as a list; empty where there is none of that kind."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list | array.array | TextArray):
        return []
    values = list(values)
    return values if all(isinstance(value, kind) for value in values) else []


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Says whether the model was trained with its BOS token before every text.

    Args:
      metadata: with the keys `tokenizer.ggml.*`.

    Returns:
      `add_bos_token` of the file; without that key what llama.cpp assumes for the kind.

    Example:
      >>> adds_bos({"tokenizer.ggml.model": "llama"})
      True
      >>> adds_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"})
      False
    """
    assumed = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", assumed))


def _byte_level(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """GPT-2's BPE over bytes, with the cutting rule that the file names."""
    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in _PRE_TOKENIZERS:
        raise WeightsError(
            f"the GGUF file's pre-tokenizer (tokenizer.ggml.pre) is {rule!r}; supported are "
            f"{', '.join(_PRE_TOKENIZERS)}. With a wrong one the ids would be wrong. Use the "
            "model's Hugging Face folder instead."
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise WeightsError("the GGUF file's tokenizer has no merges (tokenizer.ggml.merges).")
    merges = [tuple(merge.split(" ", 1)) for merge in _array(metadata, "merges", str)]
    is_llama3 = rule in _LLAMA3_NAMES
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3))
    if rule == "smollm":
        stages = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif rule in ("gpt-2", "default"):
        stages = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        split = _LLAMA3_SPLIT if is_llama3 else _QWEN2_SPLIT
        stages = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE as BPE with byte fallback; its scores become an order of merges."""
    scores = _array(metadata, "scores", float)
    if len(scores) != len(vocab):
        raise WeightsError("the GGUF file's tokenizer has no score for each token.")
    merges = merges_from_scores(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    add_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if add_prefix else "never", split=False
    )
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        stages.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(stages)
    return tokenizer


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Recovers BPE merges from SentencePiece scores: the higher a token's score, the earlier.

    Args:
      vocab: tokens with their ids.
      scores: one for each id.

    Returns:
      Every pair of tokens that joins to a token, in the order of transformers' conversion.

    Example:
      >>> merges_from_scores({"a": 0, "b": 1, "ab": 2, "aba": 3}, [0.0, 0.0, -1.0, -2.0])
      [('a', 'b'), ('ab', 'a')]
    """
    found = []
    for token, index in vocab.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[index], *pair) for pair in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]
