"""Perplexity of a text: how surprised a model is by every token of it.

A text that is longer than what the model sees is cut into windows. Every token is predicted once,
from at least `max_len - stride` tokens before it (where the text has so many); a smaller stride
gives more context, costs more, and lowers the perplexity a little, so a figure means something only
with its window and stride. The first token is predicted from the BOS token, if the model has one,
and not at all otherwise.

Perplexities of models with different tokenizers cannot be compared: a token is not the same piece
of text. Bits per byte can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation.scoring import Scorer


class Perplexity(NamedTuple):
    """What a model finds of a text.

    Attributes:
        nats: negative log-likelihood of the whole.
        tokens: that were predicted.
        bytes: of the text in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """What the text would be compressed to."""
        return self.nats / math.log(2) / self.bytes


def measure_perplexity(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    progress: Callable[[int], object] = lambda windows: None,
) -> Perplexity:
    """Measures texts, each by itself, and adds them up.

    Args:
        scorer: has the model; its `max_len` is the window.
        tokenizer: the model's.
        texts: documents.
        stride: tokens from window to window; None: half a window.
        progress: called with the number of windows that were done.

    Raises:
        ConfigError: the stride is not from 1 to the window.
        DataError: no text has a token that can be predicted.
    """
    pairs, size = cut(tokenizer, texts, scorer.max_len, stride)
    found = scorer.log_likelihoods(pairs, progress=progress)
    return Perplexity(-sum(one.total for one in found), sum(len(one.tokens) for one in found), size)


def cut(
    tokenizer: Tokenizer, texts: Sequence[str], window: int, stride: int | None = None
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """The pairs of `windows` of all texts, and the bytes of the texts.

    Args:
        tokenizer: the model's.
        texts: documents.
        window: tokens that the model is given at most.
        stride: tokens from window to window; None: half a window.

    Raises:
        ConfigError, DataError: see `measure_perplexity`.
    """
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"{stride=} must be from 1 to the window of {window} tokens")
    bos = tokenizer.bos_token_id
    pairs, size = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        pairs += windows(ids, window, stride)
        size += len(text.encode())
    if not pairs:
        raise DataError("there is no text with a token that could be predicted")
    return pairs, size


def windows(ids: Sequence[int], window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of context and continuation that predict every token but the first once.

    Args:
        ids: tokens of a text.
        window: tokens that the model is given at most.
        stride: tokens that one window adds to the one before.

    >>> windows([0, 1, 2, 3, 4, 5, 6], window=4, stride=2)
    [([0], [1, 2, 3, 4]), ([2, 3, 4], [5, 6])]
    """
    found = []
    done = min(window, len(ids) - 1)
    if done > 0:
        found.append((list(ids[:1]), list(ids[1 : done + 1])))
    while done < len(ids) - 1:
        # The last token of a pair is predicted and not given.
        end = min(done + stride, len(ids) - 1)
        begin = max(0, end - window)
        found.append((list(ids[begin : done + 1]), list(ids[done + 1 : end + 1])))
        done = end
    return found
