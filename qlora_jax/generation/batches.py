"""Text from a model for a list of prompts: `generate` texts, `generate_ids` token ids.

`generate` gives the prompts of a decoder to an `Engine`, a few at a time, and those of a T5 to
`generate_ids`, which has the plainest mechanism there is and takes all prompts at once:

Prompts are padded on the left to a power of two, so that the last token of every row is in the same
place, and run through the model once (prefill). Then a compiled loop makes one token for every row
at a time and stops when all rows have ended; every `CHUNK` tokens it comes back to Python, which is
where an interrupt is noticed. Padded prompt, cache and chunk have sizes from a short list ("shape
buckets"), and everything else that changes from call to call is an argument of the compiled
programs, so that a new prompt does not compile again.

`model` is a `qlora_jax.models.llama.Llama` (for `generate_ids` any module with its interface), or a
`qlora_jax.models.t5.T5`, with adapters or not. A T5 reads its prompts with the encoder and begins a
target of its own; all else is the same. Dropout is off while generating, whatever mode the model is
in, and the model is not changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from qlora_jax.data.chat_formats import cut_at_stop
from qlora_jax.data.pairs import encode_source
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.generation.engine import Engine
from qlora_jax.generation.requests import Request
from qlora_jax.generation.slots import bucket
from qlora_jax.models.attention import KVCache
from qlora_jax.models.t5 import T5, T5Cache
from qlora_jax.sampling import Sampling, greedy_tokens, penalize_repetition, sample_tokens

Prompt = str | Sequence[Mapping[str, str]]

CHUNK = 32
# Replies of `generate` that are written at the same time.
_SLOTS = 8
_SHORTEST_PROMPT_BUCKET = 16
_SHORTEST_CACHE_BUCKET = 64


def generate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """Continues (a T5: answers) every prompt until the model ends or `max_new_tokens` are reached.

    Args:
      model: see the module.
      tokenizer: the model's; its `eos_token_ids` and `stop_strings` end a reply.
      prompts: each a text, which is continued as it is, or a conversation (a list of dicts with
        "role" and "content"), which is written with the chat template and answered.
      max_new_tokens: at most so many tokens a reply.
      temperature: see `Sampling`.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      seed: of the random choices. The i-th reply depends on the seed, i and the prompt only.
      min_p: see `Sampling`.
      repetition_penalty: see `Sampling`; of a T5 only the answer counts, not the prompt.

    Returns:
      The replies, without the prompts and without what ended them.

    Raises:
      ConfigError: a setting is out of range, or a prompt leaves no room for `max_new_tokens`.
      DataError: a prompt cannot be used.

    Example:
      >>> generate(model, tokenizer, ["The capital of France is"])  # doctest: +SKIP
      [' Paris.']
    """
    if isinstance(prompts, str | Mapping):
        raise DataError("prompts must be a list of prompts; put this one into a list: [prompt].")
    has_encoder = isinstance(model, T5)
    prompt_ids = [encode_prompt(tokenizer, prompt, for_encoder=has_encoder) for prompt in prompts]
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    reply = _answer if has_encoder else _continue
    texts = reply(model, tokenizer, prompt_ids, max_new_tokens, sampling, seed)
    # Formats with stop strings set a space before the answer.
    return [
        text if isinstance(prompt, str) or not tokenizer.stop_strings else text.strip()
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _continue(model, tokenizer, prompt_ids, max_new_tokens, sampling, seed) -> list[str]:
    """Replies of a decoder."""
    limit = model.config.max_position_embeddings
    sampling.validate()
    _check_lengths(prompt_ids, max_new_tokens, limit)
    if not prompt_ids:
        return []
    room = max(map(len, prompt_ids)) + max_new_tokens
    engine = Engine(
        model,
        tokenizer,
        slots=min(len(prompt_ids), _SLOTS),
        max_len=min(bucket(room, _SHORTEST_CACHE_BUCKET), limit),
        chunk=CHUNK,
    )
    adapter = next(iter(engine.adapters), None)
    for i, ids in enumerate(prompt_ids):
        own_seed = int(np.random.SeedSequence((seed % 2**32, i)).generate_state(1)[0])
        engine.submit(Request(ids, max_new_tokens, sampling, own_seed, adapter=adapter))
    texts = [""] * len(prompt_ids)
    while engine.busy:
        for delta in engine.step():
            texts[delta.request_id] += delta.text
    return texts


def _answer(model, tokenizer, prompt_ids, max_new_tokens, sampling, seed) -> list[str]:
    """Replies of a T5."""
    stops = tokenizer.stop_strings

    def is_over(ids: list[int]) -> bool:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return cut_at_stop(text, stops) != text

    new_ids = generate_ids(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
        sampling=sampling,
        seed=seed,
        is_over=is_over if stops else None,
    )
    return [cut_at_stop(tokenizer.decode(ids), stops) for ids in new_ids]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, for_encoder: bool = False) -> list[int]:
    """The token ids a model has to see for a text or a conversation.

    Args:
      tokenizer: the model's.
      prompt: see `generate`. An empty text is a text that begins: its only token is BOS.
      for_encoder: whether an encoder reads it, for which a text ends with its end token.

    Returns:
      At least one id.

    Raises:
      DataError: an empty conversation, or an empty text and no BOS token; or a template's refusal.
    """
    if isinstance(prompt, Mapping):
        raise DataError(
            "a prompt is a text or a list of messages, got one message; put the conversation into "
            "a list of its own: [[{'role': ..., 'content': ...}]]."
        )
    if not isinstance(prompt, str):
        if not prompt:
            raise DataError("a conversation needs at least one message, got an empty list.")
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return encode_source(tokenizer, prompt) if for_encoder else tokenizer.encode(prompt)
    if for_encoder:
        return encode_source(tokenizer, prompt)
    ids, bos = tokenizer.encode(prompt), tokenizer.bos_token_id
    if not ids and bos is None:
        raise DataError("the prompt is empty and the model has no BOS token: give some text.")
    begins_with_bos = ids[:1] == [bos]
    return [bos, *ids] if not ids or (tokenizer.add_bos_token and not begins_with_bos) else ids


def generate_ids(
    model: nnx.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    is_over: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """`generate` for token ids.

    Args:
      model: see the module.
      prompt_ids: one non-empty list of ids for each prompt.
      max_new_tokens: at most so many new ids a prompt.
      eos_token_ids: ids that end a reply.
      sampling: how to choose; None is greedy.
      seed: of the random choices.
      is_over: looks at a reply so far, every `CHUNK` tokens; when all are over, none goes on.

    Returns:
      The new ids of each prompt, without the end token.

    Raises:
      ConfigError: a setting is out of range, or a prompt leaves no room for `max_new_tokens`.
    """
    sampling = sampling or Sampling()
    sampling.validate()
    has_encoder = isinstance(model, T5)
    limit = None if has_encoder else model.config.max_position_embeddings
    _check_lengths(prompt_ids, max_new_tokens, limit)
    if not prompt_ids:
        return []
    model = nnx.merge(*nnx.split(model))  # a copy that shares the arrays
    model.eval()
    graphdef, state = nnx.split(model)

    tokens, lengths = pad_left(prompt_ids)
    begun = 1 if has_encoder else tokens.shape[1]
    cache_len = bucket(begun + max_new_tokens, _SHORTEST_CACHE_BUCKET)
    # No token has the id -1: without an end token only the limit ends a reply.
    eos = jnp.asarray(list(eos_token_ids) or [-1], jnp.int32)
    choice = (sampling.as_arrays(), jax.random.key(seed), eos)
    greedy = sampling.greedy
    run = _prefill(graphdef, state, tokens, lengths, *choice, cache_len=cache_len, greedy=greedy)
    columns = [np.array(run.token)[:, None]]  # a copy: the next chunk is given the buffer
    for start in range(1, max_new_tokens, CHUNK):
        if np.array(run.finished).all():
            break
        rows = np.concatenate(columns, axis=1).tolist() if is_over else []
        if rows and all(is_over(_until_end(row, eos_token_ids)) for row in rows):
            break
        limit = min(CHUNK, max_new_tokens - start)
        run, chunk = _decode_chunk(graphdef, state, run, *choice, limit, greedy=greedy)
        columns.append(np.asarray(chunk)[:, :limit])
    return [_until_end(row, eos_token_ids) for row in np.concatenate(columns, axis=1).tolist()]


def pad_left(
    prompt_ids: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts in one array whose width is a power of two, and their lengths.

    >>> tokens, lengths = pad_left([[5, 6], [7]])
    >>> tokens[:, -3:].tolist(), tokens.shape, lengths.tolist()
    ([[0, 5, 6], [0, 0, 7]], (2, 16), [2, 1])
    """
    lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
    tokens = np.zeros((len(prompt_ids), bucket(lengths.max(), _SHORTEST_PROMPT_BUCKET)), np.int32)
    for row, ids in zip(tokens, prompt_ids, strict=True):
        row[-len(ids) :] = ids
    return tokens, lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Run:
    """The state of a batch between two tokens."""

    cache: KVCache | T5Cache
    token: Int[Array, " B"]  # the last one chosen, which the model has not seen yet
    position: Int[Array, " B"]  # of that token, where the model counts
    finished: Bool[Array, " B"]
    step: Int[Array, ""]  # tokens chosen so far
    seen: Bool[Array, "B V"]  # the tokens of the row


def _choose(
    logits, seen, step, key, sampling: Sampling, greedy: bool
) -> tuple[Int[Array, " B"], Bool[Array, "B V"]]:
    """The next tokens, and what the rows have seen with them."""
    logits, rows = penalize_repetition(logits, seen, sampling), jnp.arange(logits.shape[0])
    if greedy:
        token = greedy_tokens(logits)
    else:
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)
        token = sample_tokens(logits, keys, sampling)
    return token, seen.at[rows, token].set(True)


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_len", "greedy"))
def _prefill(graphdef, state, tokens, lengths, sampling, key, eos, *, cache_len, greedy) -> _Run:
    """Runs the prompts through the model and chooses the first token of every reply."""
    model = nnx.merge(graphdef, state)
    batch, width = tokens.shape
    positions = jnp.arange(width) - (width - lengths)[:, None]
    segment_ids = (positions >= 0).astype(jnp.int32)
    seen = jnp.zeros((batch, model.config.vocab_size), bool)
    if isinstance(model, T5):
        start = jnp.full((batch, 1), model.config.decoder_start_token_id, jnp.int32)
        cache = model.init_cache(tokens, cache_len, segment_ids)
        hidden, cache = model.decode_cached(start, cache)
        seen = seen.at[:, model.config.decoder_start_token_id].set(True)
    else:
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(positions >= 0)
        hidden, cache = model.hidden_states(
            tokens,
            positions=jnp.maximum(positions, 0),
            segment_ids=segment_ids,
            cache=model.init_cache(batch, cache_len),
        )
    step = jnp.zeros((), jnp.int32)
    token, seen = _choose(model.head(hidden[:, -1]), seen, step, key, sampling, greedy)
    return _Run(cache, token, lengths, jnp.isin(token, eos), step + 1, seen)


@functools.partial(jax.jit, static_argnames=("graphdef", "greedy"), donate_argnames=("run",))
def _decode_chunk(
    graphdef, state, run: _Run, sampling, key, eos, limit, *, greedy
) -> tuple[_Run, Int[Array, "B chunk"]]:
    """Chooses up to `limit` more tokens a row; what follows the end of a row is end tokens."""

    def unfinished(carry):
        run, _, count = carry
        return (count < limit) & ~run.finished.all()

    def one_token(carry):
        run, chunk, count = carry
        model = nnx.merge(graphdef, state)
        positions = run.position[:, None]
        logits, cache = model(run.token[:, None], positions=positions, cache=run.cache)
        token, seen = _choose(logits[:, -1], run.seen, run.step, key, sampling, greedy)
        token = jnp.where(run.finished, eos[0], token)
        finished = run.finished | jnp.isin(token, eos)
        run = _Run(cache, token, run.position + 1, finished, run.step + 1, seen)
        return run, jax.lax.dynamic_update_slice(chunk, token[:, None], (0, count)), count + 1

    chunk = jnp.broadcast_to(eos[0], (run.token.shape[0], CHUNK))
    run, chunk, _ = jax.lax.while_loop(unfinished, one_token, (run, chunk, 0))
    return run, chunk


def _until_end(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in eos_token_ids]
    return ids[: ends[0]] if ends else ids


def _check_lengths(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None
) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for i, ids in enumerate(prompt_ids):
        if not len(ids):
            raise DataError(f"prompt {i} has no tokens.")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ConfigError(
                f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is "
                f"more than the {limit} tokens the model can see. Shorten the prompt or lower "
                "max_new_tokens."
            )
