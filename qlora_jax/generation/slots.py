"""The compiled programs of the engine: reading prompts into slots, and decoding all slots.

A slot is a row of the key-value cache with the state of the reply that is written in it. Prompts
have different lengths and slots begin and end at different times, so every row has its own length
(`KVCache`, ragged) and its own settings. All that changes from request to request is an argument of
the programs; their shapes come from short lists, so that a server compiles a bounded number of
them: prompts are padded to powers of two, and attention looks at a power of two of the slots.

A decoding step runs over all rows, active or not. What it writes for a row that is not active lies
behind the row's length, where nothing looks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from qlora_jax.generation.adapters import merge_for_rows
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.sampling import Sampling, greedy_tokens, penalize_repetition, sample_tokens

# What stands in a chunk where a row chose no token.
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of all replies between two tokens.

    Attributes:
      cache: what each row has read.
      token: the last one chosen, which the model has not seen yet.
      active: rows whose reply goes on.
      left: tokens that a row may still choose.
      step: tokens it has chosen.
      key: of its random choices.
      seen: the tokens of its prompt and its reply.
      sampling: its settings, arrays [B].
      adapter: the number of its adapter; 0 is none.
    """

    cache: KVCache
    token: Int[Array, " B"]
    active: Bool[Array, " B"]
    left: Int[Array, " B"]
    step: Int[Array, " B"]
    key: PRNGKeyArray
    seen: Bool[Array, "B V"]
    sampling: Sampling
    adapter: Int[Array, " B"]

    @classmethod
    def empty(cls, cache: KVCache, vocab_size: int) -> "Slots":
        """Slots in which nothing is written."""
        rows = cache.length.shape[0]
        # Each field has an array of its own: none could be given away twice.
        sampling = jax.tree.map(lambda x: jnp.full(rows, x, x.dtype), Sampling().as_arrays())
        return cls(
            cache=cache,
            token=jnp.zeros(rows, jnp.int32),
            active=jnp.zeros(rows, bool),
            left=jnp.zeros(rows, jnp.int32),
            step=jnp.zeros(rows, jnp.int32),
            key=jax.random.split(jax.random.key(0), rows),
            seen=jnp.zeros((rows, vocab_size), bool),
            sampling=sampling,
            adapter=jnp.zeros(rows, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """A prompt and the slot it goes to; all arrays. For `admit_all` with an axis of all slots.

    Attributes:
      row: number of the slot.
      tokens: what is read now, padded on the right.
      start: tokens of the prompt before these, which are in the cache.
      count: how many of `tokens` count, at least 1; 0 where `admit_all` leaves a slot alone.
      seen: the tokens of the whole prompt.
      left: how long the reply may be, in tokens.
      seed: of its random choices.
      sampling: its settings.
      adapter: the number of its adapter.
    """

    row: Int[Array, ""]
    tokens: Int[Array, " T"]
    start: Int[Array, ""]
    count: Int[Array, ""]
    seen: Bool[Array, " V"]
    left: Int[Array, ""]
    seed: Int[Array, ""]
    sampling: Sampling
    adapter: Int[Array, ""]


def choose_tokens(
    logits: Array, slots: Slots, vocab_size: int, greedy: bool
) -> tuple[Int[Array, " B"], Bool[Array, "B V"]]:
    """The next token of every row, and what it has seen with it."""
    logits = penalize_repetition(logits, slots.seen, slots.sampling)
    if greedy:
        token = greedy_tokens(logits)
    else:
        keys = jax.vmap(jax.random.fold_in)(slots.key, slots.step)
        token = sample_tokens(logits, keys, slots.sampling)
    rows = jnp.arange(token.shape[0])
    return token, slots.seen.at[rows, token].set(True)


@functools.partial(jax.jit, static_argnames=("graphdef", "span"), donate_argnames=("slots",))
def admit(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    new: Admission,
    end_ids: Int[Array, " E"],
    *,
    span: int,
) -> tuple[Slots, Int[Array, ""]]:
    """Reads a prompt into a slot and chooses the first token of its reply.

    Args:
      graphdef: of the model.
      state: of the model.
      slots: given away.
      new: the prompt.
      end_ids: tokens that end a reply.
      span: slots that attention looks at.

    Returns:
      The slots with the new one active, unless its reply is over; and the token.
    """
    model = merge_for_rows(graphdef, state, new.adapter[None])
    row, width = new.row, new.tokens.shape[0]

    def of_row(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, row, 1, axis=1)

    big = slots.cache
    stored = _stored(big)
    cache = dataclasses.replace(
        big,
        **{name: of_row(array) for name, array in stored.items()},
        segment_ids=big.segment_ids[:1],
        length=new.start,
        span=span,
    )
    # Aligned (one row has one length), and without padding: what follows the last token that
    # counts is later than all of them.
    tokens, segments = new.tokens[None], jnp.ones((1, width), jnp.int32)
    hidden, cache = model.hidden_states(tokens, segment_ids=segments, cache=cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, new.count - 1, 1, axis=1)[:, 0]

    def put(array: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), row, 0)

    key = jax.random.key(new.seed)
    one = Slots(
        cache=None,
        token=None,
        active=None,
        left=None,
        step=jnp.zeros(1, jnp.int32),
        key=key[None],
        seen=new.seen[None],
        sampling=jax.tree.map(lambda x: x[None], new.sampling),
        adapter=None,
    )
    (token,), (seen,) = choose_tokens(model.head(last), one, new.seen.shape[0], greedy=False)
    written = {
        name: jax.lax.dynamic_update_slice_in_dim(array, getattr(cache, name), row, axis=1)
        for name, array in stored.items()
    }
    slots = Slots(
        cache=dataclasses.replace(big, **written, length=put(big.length, new.start + new.count)),
        token=put(slots.token, token),
        active=put(slots.active, (new.left > 1) & ~jnp.isin(token, end_ids)),
        left=put(slots.left, new.left - 1),
        step=put(slots.step, jnp.int32(1)),
        key=slots.key.at[row].set(key),
        seen=put(slots.seen, seen),
        sampling=jax.tree.map(put, slots.sampling, new.sampling),
        adapter=put(slots.adapter, new.adapter),
    )
    return slots, token


@functools.partial(jax.jit, static_argnames=("graphdef", "span"), donate_argnames=("slots",))
def admit_all(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    new: Admission,
    end_ids: Int[Array, " E"],
    *,
    span: int,
) -> tuple[Slots, Int[Array, " B"]]:
    """`admit` for several slots in one pass of the model, in which the others have no part.

    Args:
      graphdef: see `admit`, as the rest.
      state: of the model.
      slots: given away.
      new: a prompt for every slot.
      end_ids: tokens that end a reply.
      span: slots of the cache.

    Returns:
      The slots, and the first token of each reply.
    """
    old, admitted = slots.cache.length, new.count > 0

    def choose(of_new: Array, of_old: Array) -> Array:
        here = admitted.reshape(-1, *[1] * (of_old.ndim - 1))
        return jnp.where(here, of_new, of_old)

    adapter = choose(new.adapter, slots.adapter)
    model = merge_for_rows(graphdef, state, adapter)
    # What is written for the others lies behind what they have read, where nothing looks.
    cache = dataclasses.replace(slots.cache, length=choose(new.start, old), span=span)
    hidden, cache = model.hidden_states(new.tokens, cache=cache)
    last = jnp.maximum(new.count - 1, 0)[:, None, None]
    logits = model.head(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    slots = dataclasses.replace(
        slots,
        step=choose(0, slots.step),
        key=choose(jax.vmap(jax.random.key)(new.seed), slots.key),
        seen=choose(new.seen, slots.seen),
        sampling=jax.tree.map(choose, new.sampling, slots.sampling),
        adapter=adapter,
    )
    token, seen = choose_tokens(logits, slots, slots.seen.shape[1], greedy=False)
    length = choose(new.start + new.count, old)
    slots = dataclasses.replace(
        slots,
        cache=dataclasses.replace(cache, length=length, span=None),
        token=choose(token, slots.token),
        active=choose((new.left > 1) & ~jnp.isin(token, end_ids), slots.active),
        left=choose(new.left - 1, slots.left),
        step=slots.step + admitted,
        seen=choose(seen, slots.seen),
    )
    return slots, token


@functools.partial(
    jax.jit, static_argnames=("graphdef", "span", "chunk", "greedy"), donate_argnames=("slots",)
)
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    alive: Bool[Array, " B"],
    end_ids: Int[Array, " E"],
    least: Int[Array, ""],
    *,
    span: int,
    chunk: int,
    greedy: bool,
) -> tuple[Slots, Int[Array, "B chunk"], Int[Array, ""]]:
    """Chooses up to `chunk` more tokens in every active row, without going back to Python.

    Args:
      graphdef: of the model.
      state: of the model.
      slots: given away.
      alive: rows that nobody has given up.
      end_ids: tokens that end a reply.
      least: ends as soon as fewer rows than this are active: where requests wait for a slot.
      span: slots that attention looks at.
      chunk: tokens.
      greedy: whether no row draws at random.

    Returns:
      The slots; each row's tokens in order, then `NO_TOKEN`; and how many steps were made.
    """
    cache = dataclasses.replace(slots.cache, span=span)
    slots = dataclasses.replace(slots, cache=cache, active=slots.active & alive)
    tokens = jnp.full((slots.token.shape[0], chunk), NO_TOKEN)

    def go_on(carry):
        slots, _, count = carry
        return (count < chunk) & (slots.active.sum() >= jnp.maximum(least, 1))

    def one_token(carry):
        slots, tokens, count = carry
        model = merge_for_rows(graphdef, state, slots.adapter)
        logits, cache = model(slots.token[:, None], cache=slots.cache)
        token, seen = choose_tokens(logits[:, -1], slots, slots.seen.shape[1], greedy)
        active = slots.active
        token = jnp.where(active, token, slots.token)
        shown = jnp.where(active, token, NO_TOKEN)[:, None]
        left = slots.left - active
        slots = dataclasses.replace(
            slots,
            cache=dataclasses.replace(cache, length=slots.cache.length + active),
            token=token,
            active=active & (left > 0) & ~jnp.isin(token, end_ids),
            left=left,
            step=slots.step + active,
            seen=jnp.where(active[:, None], seen, slots.seen),
        )
        return slots, jax.lax.dynamic_update_slice(tokens, shown, (0, count)), count + 1

    slots, tokens, count = jax.lax.while_loop(go_on, one_token, (slots, tokens, 0))
    slots = dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, span=None))
    return slots, tokens, count


def _stored(cache: KVCache) -> dict[str, Array]:
    """The arrays that have an entry for every layer, row and slot."""
    names = ("keys", "values", "key_scales", "value_scales")
    return {n: getattr(cache, n) for n in names if getattr(cache, n) is not None}


def bucket(size: int, shortest: int) -> int:
    """The next power of two, from `shortest` on.

    >>> bucket(5, 16), bucket(17, 16)
    (16, 32)
    """
    return max(shortest, 1 << (int(size) - 1).bit_length())


def seen_tokens(ids: list[int], vocab_size: int) -> Bool[np.ndarray, " V"]:
    """True for every token that a prompt has."""
    seen = np.zeros(vocab_size, bool)
    seen[np.asarray(ids)] = True
    return seen
