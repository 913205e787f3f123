"""How likely a model finds given tokens: what every score of a language model is made of.

Two questions are asked of a model, and both batch rows of similar length:

    log_likelihoods   of a continuation behind its context: the log-probability of every token of it
    choose_next       which of a few tokens comes next, behind a prompt

Prompts of one group may begin with the same text (the solved examples of a benchmark). It is read
once, as a row of its own, and every prompt of the group behind it: five shots of MMLU are ten times
as long as the question.

Benchmarks compile a few programs, all batches of one have the same number of tokens, and memory
does not grow with their length. Logits exist for a few hundred positions at a time, and only for
positions that are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation.packed_prompts import Layout, lay_out, pack, row_width
from qlora_jax.generation.text import common_prefix
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.shared_prefix import SharedPrefix
from qlora_jax.models.t5 import T5

# Lengths that rows are padded to are multiples of it up to 256 tokens, and of a power of two that
# keeps padding below an eighth from there on.
_LENGTH_STEP = 32
# Of a prompt or window, in tokens, where nothing else is said.
LONGEST = 2048
# Positions whose logits exist at one time.
_HEAD_CHUNK = 256


class LogLikelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        tokens: natural logarithm of the probability of every token of it, float32.
        is_greedy: whether every token of it is the likeliest one.
    """

    tokens: Float[np.ndarray, " N"]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Logarithm of the probability of the whole."""
        return float(self.tokens.sum(dtype=np.float64))


class Scorer:
    """A model that is asked for probabilities.

    Args:
        model: a decoder with the interface of `qlora_jax.models.llama.Llama`, adapters or not. It
            is not changed; dropout is off.
        max_len: the longest row, in tokens; None: what the model can see, at most `LONGEST`.
        batch_tokens: tokens of one batch, padding included; a row that is longer is a batch.
        share_prefixes: whether what prompts begin with in common is read once. Its keys and values
            take memory: 0.5 MiB a token of LLaMA-7B, 2.5 of 65B.

    Raises:
        ConfigError: the model is an encoder-decoder, or `max_len` is more than it can see.

    Example:
        >>> scorer = Scorer(model)  # doctest: +SKIP
        >>> scorer.log_likelihoods([([1, 2], [3])])[0].total  # doctest: +SKIP
        -4.1
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        max_len: int | None = None,
        batch_tokens: int = 4096,
        share_prefixes: bool = True,
    ):
        if isinstance(model, T5):
            raise ConfigError(
                "language-model scores are those of a decoder, and this model is an "
                "encoder-decoder; give a decoder-only model."
            )
        limit = self._limit = model.config.max_position_embeddings
        self._window = model.config.sliding_window
        if max_len is not None and not 2 <= max_len <= limit:
            raise ConfigError(f"{max_len=} must be from 2 to the {limit} tokens the model sees")
        self.max_len = max_len or min(limit, LONGEST)
        self.batch_tokens, self.share_prefixes = batch_tokens, share_prefixes
        model = nnx.merge(*nnx.split(model))  # a copy that shares the arrays
        model.eval()
        self._model = nnx.split(model)

    def log_likelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> list[LogLikelihood]:
        """The log-likelihood of each continuation behind its context.

        Args:
            pairs: token ids of a context, at least one, and of a continuation.
            progress: called with the number of rows that were done.

        Returns:
            In the order of `pairs`.

        Raises:
            DataError: a context is empty, or context and continuation are longer than `max_len`.
        """
        for i, (context, continuation) in enumerate(pairs):
            if not len(context):
                raise DataError(f"pair {i} has no context; a model predicts from at least a token")
            # The last token predicts nothing that is asked for.
            self._check_length(i, len(context) + len(continuation) - 1)
        found = [LogLikelihood(np.zeros(0, np.float32), True)] * len(pairs)
        inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
        for batch in self._batches([len(row) for row in inputs]):
            tokens, lengths = pad_right([inputs[i] for i in batch.rows], batch)
            counts = [len(pairs[i][1]) for i in batch.rows]
            starts = [
                line * batch.width + len(pairs[i][0]) - 1 for line, i in enumerate(batch.rows)
            ]
            # Where the asked tokens are predicted from, in the flattened batch.
            places = [np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
            targets = [np.asarray(pairs[i][1], np.int32) for i in batch.rows]
            asked = _pad_flat(places), _pad_flat(targets)
            logprobs, likeliest = map(
                np.asarray, _score_tokens(*self._model, tokens, lengths, *asked)
            )
            ends = np.cumsum(counts)
            for i, end, count in zip(batch.rows, ends, counts, strict=True):
                part = slice(end - count, end)
                found[i] = LogLikelihood(logprobs[part], bool(likeliest[part].all()))
            progress(len(batch.rows))
        return found

    def choose_next(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int],
        *,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> Float[np.ndarray, "N K"]:
        """The log-probability that each of some tokens comes next.

        Args:
            prompts: token ids, at least one each. What all begin with in common is computed once.
            candidates: ids of the tokens that are asked about.
            progress: see `log_likelihoods`.

        Returns:
            Natural logarithms, float32. They are those of the whole vocabulary, so that the
            probabilities of the candidates add up to less than 1.

        Raises:
            DataError: a prompt is empty or longer than `max_len`.
        """
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError(f"prompt {i} has no tokens")
            self._check_length(i, len(prompt))
        found = np.zeros((len(prompts), len(candidates)), np.float32)
        ids = jnp.asarray(candidates, jnp.int32)
        shared = self._count_shared(prompts)
        prefix = self._read_prefix(prompts[0][:shared]) if shared else None
        rest = [prompt[shared:] for prompt in prompts]
        for batch in pack([len(part) for part in rest], self.batch_tokens, self._limit):
            logprobs = score_next(*self._model, lay_out(rest, batch, shared), ids, prefix)
            found[batch.prompts] = np.asarray(logprobs)[: len(batch.prompts)]
            progress(len(batch.prompts))
        return found

    def _count_shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens of all prompts are read once: 0 where that saves nothing."""
        shared = shared_beginning(prompts) if self.share_prefixes else 0
        if shared < _LENGTH_STEP or len(prompts) < 2:
            return 0
        # A window is measured in slots, and packed prompts are not where they would be alone.
        longest = max(map(len, prompts)) - shared
        slots = prefix_length(shared) + row_width(longest, self.batch_tokens, self._limit)
        return shared if (self._window or slots) >= slots else 0

    def _read_prefix(self, ids: Sequence[int]) -> KVCache:
        width = prefix_length(len(ids))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        return read_prefix(*self._model, tokens, len(ids))

    def _check_length(self, i: int, length: int) -> None:
        if length > self.max_len:
            raise DataError(
                f"row {i} has {length} tokens, and at most {self.max_len} can be scored; shorten "
                "it, or raise the limit if the model sees more."
            )

    def _batches(self, lengths: Sequence[int]) -> Iterator[Batch]:
        """Rows of similar length together, the longest first: memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            width = padded_length(lengths[order[0]])
            size = max(1, self.batch_tokens // width)
            size = min(1 << (size.bit_length() - 1), 1 << (len(order) - 1).bit_length())
            yield Batch(order[:size], size, width)
            order = order[size:]


class Batch(NamedTuple):
    """Rows that are computed together.

    Attributes:
        rows: their indices.
        size: rows of the array; those beyond `rows` are padding.
        width: tokens of a row.
    """

    rows: list[int]
    size: int
    width: int


def shared_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with in common; every row is longer than that.

    >>> shared_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2]]), shared_beginning([])
    (1, 0)
    """
    return min((min(common_prefix(rows[0], row), len(row) - 1) for row in rows), default=0)


def prefix_length(length: int) -> int:
    """The length that a shared beginning is padded to; each is a program more.

    >>> [prefix_length(n) for n in (33, 300, 400, 1025)]
    [128, 384, 512, 1536]
    """
    power = 128
    while power < length:
        power *= 2
    return power if power == 128 or length > power * 3 // 4 else power * 3 // 4


def padded_length(length: int) -> int:
    """The length that a row is padded to.

    >>> [padded_length(n) for n in (1, 33, 300, 900)]
    [32, 64, 320, 1024]
    """
    step = _LENGTH_STEP
    while step * 8 < length:
        step *= 2
    return -(-length // step) * step


def pad_right(
    rows: Sequence[Sequence[int]], batch: Batch
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Rows in one array of the size of a batch, and their lengths (at least 1).

    >>> tokens, lengths = pad_right([[5, 6], [7]], Batch([0, 1], 4, 3))
    >>> tokens.tolist(), lengths.tolist()
    ([[5, 6, 0], [7, 0, 0], [0, 0, 0], [0, 0, 0]], [2, 1, 1, 1])
    """
    tokens = np.zeros((batch.size, batch.width), np.int32)
    lengths = np.ones(batch.size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, max(len(row), 1)
    return tokens, lengths


def _pad_flat(parts: Sequence[Int[np.ndarray, " n"]]) -> Int[np.ndarray, " N"]:
    """All parts behind each other, and zeros up to a number of chunks that is a power of two."""
    flat = np.concatenate(parts)
    chunks = 1 << (max(1, -(-len(flat) // _HEAD_CHUNK)) - 1).bit_length()
    return np.pad(flat, (0, chunks * _HEAD_CHUNK - len(flat))).astype(np.int32)


@functools.partial(jax.jit, static_argnames="graphdef")
def _score_tokens(
    graphdef,
    state,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    places: Int[Array, " N"],
    targets: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """The log-probability of every target, and whether it is the likeliest token."""
    model = nnx.merge(graphdef, state)
    places_in_row = jnp.arange(tokens.shape[1])
    hidden = model.hidden_states(
        tokens,
        positions=jnp.broadcast_to(places_in_row, tokens.shape),
        segment_ids=(places_in_row < lengths[:, None]).astype(jnp.int32),
    )
    asked = hidden.reshape(-1, hidden.shape[-1])[places].reshape(-1, _HEAD_CHUNK, hidden.shape[-1])

    def one_chunk(each):
        h, target = each
        logits = model.head(h).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

    logprobs, likeliest = jax.lax.map(one_chunk, (asked, targets.reshape(-1, _HEAD_CHUNK)))
    return logprobs.reshape(-1), likeliest.reshape(-1)


@functools.partial(jax.jit, static_argnames="graphdef")
def read_prefix(graphdef, state, tokens: Int[Array, "1 P"], length) -> KVCache:
    """Keys and values of what all prompts begin with, padded on the right."""
    model = nnx.merge(graphdef, state)
    slots = jnp.arange(tokens.shape[1])[None]
    _, cache = model.hidden_states(
        tokens,
        positions=jnp.minimum(slots, length - 1),
        segment_ids=(slots < length).astype(jnp.int32),
        cache=model.init_cache(1, tokens.shape[1]),
    )
    return cache


@functools.partial(jax.jit, static_argnames="graphdef")
def score_next(
    graphdef, state, layout: Layout, candidates: Int[Array, " K"], prefix: KVCache | None
) -> Float[Array, "N K"]:
    """The log-probabilities of the candidates behind each place of a layout."""
    model = nnx.merge(graphdef, state)
    tokens, segment_ids, positions, places = layout
    options = dict(positions=positions, segment_ids=segment_ids)
    if prefix is None:
        hidden = model.hidden_states(tokens, **options)
    else:
        cache = SharedPrefix.of(prefix, *tokens.shape)
        hidden, _ = model.hidden_states(tokens, **options, cache=cache)
    last = hidden.reshape(-1, hidden.shape[-1])[places]
    return jax.nn.log_softmax(model.head(last).astype(jnp.float32))[:, candidates]
