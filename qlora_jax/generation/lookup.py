"""Speculative decoding by prompt look-up: several tokens in one pass where a text repeats itself.

A pass over a few tokens costs little more than a pass over one, because its time goes into reading
the weights. So the next tokens are guessed, and one pass checks all guesses: what the model would
have chosen after each of them is known at once, and as far as the guesses agree with it they are
the reply. The guess is what followed when the last two tokens came up before, in the prompt or in
the reply (A. Saxena, "Prompt lookup decoding", 2023): no second model, and of use in summaries,
edits of code, and answers that quote.

The text is the greedy text: a guess only counts where it is the token that would have been chosen
anyway. Rows that draw at random, or whose repetition penalty looks at what was chosen before, take
one token a pass as ever.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from qlora_jax.generation.adapters import merge_for_rows
from qlora_jax.generation.slots import NO_TOKEN, Slots, choose_tokens


def guess(
    history: Int[Array, "B S"], length: Int[Array, " B"], count: int
) -> tuple[Int[Array, "B count"], Bool[Array, " B"]]:
    """What followed the last time that a row's last two tokens came up.

    Args:
      history: each row's text so far.
      length: the place of its last token.
      count: tokens to guess.

    Returns:
      The tokens, and whether there are any.

    >>> tokens, found = guess(jnp.array([[5, 6, 7, 8, 5, 6, 0, 0]]), jnp.array([5]), 2)
    >>> tokens.tolist(), found.tolist()
    ([[7, 8]], [True])
    """

    def of_row(row: Int[Array, " S"], last: Int[Array, ""]):
        place = jnp.arange(row.shape[0])
        before = jnp.roll(row, 1)
        same = (row == row[last]) & (before == row[last - 1]) & (place > 0) & (place < last)
        start = jnp.max(jnp.where(same, place, -1))
        return row[jnp.minimum(start + 1 + jnp.arange(count), last)], start >= 0

    return jax.vmap(of_row)(history, length)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "span", "chunk", "greedy", "count"),
    donate_argnames=("slots",),
)
def decode_guessing(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    slots: Slots,
    history: Int[Array, "B S"],
    alive: Bool[Array, " B"],
    end_ids: Int[Array, " E"],
    least: Int[Array, ""],
    *,
    span: int,
    chunk: int,
    greedy: bool,
    count: int,
) -> tuple[Slots, Int[Array, "B chunk more"], Int[Array, ""]]:
    """`slots.decode` with guesses; `chunk` counts passes.

    Args:
      graphdef: of the model.
      state: of the model.
      slots: given away.
      history: what each row has read, and the token that it has not.
      alive: as of `decode`.
      end_ids: as of `decode`.
      least: as of `decode`.
      span: as of `decode`.
      chunk: passes.
      greedy: as of `decode`.
      count: tokens to guess.

    Returns:
      The slots; the tokens of every pass in order, with `NO_TOKEN` between them; passes made.
    """
    cache = dataclasses.replace(slots.cache, span=span)
    slots = dataclasses.replace(slots, cache=cache, active=slots.active & alive)
    rows = jnp.arange(slots.token.shape[0])[:, None]
    more = jnp.arange(count + 1)
    tokens = jnp.full((slots.token.shape[0], chunk, count + 1), NO_TOKEN)
    settings = slots.sampling
    trusts = (settings.temperature == 0) & (settings.repetition_penalty == 1)

    def go_on(carry):
        slots, _, _, passes = carry
        return (passes < chunk) & (slots.active.sum() >= jnp.maximum(least, 1))

    def pass_over(slots: Slots, guessed: Int[Array, "B n"], found: Bool[Array, " B"]):
        """The chosen tokens [B, n + 1], how many of them count, the cache and what was seen."""
        model = merge_for_rows(graphdef, state, slots.adapter)
        read = jnp.concatenate([slots.token[:, None], guessed], axis=1)
        logits, cache = model(read, cache=slots.cache)
        first, seen = choose_tokens(logits[:, 0], slots, slots.seen.shape[1], greedy)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32).at[:, 0].set(first)
        right = (guessed == chosen[:, :-1]) & (trusts & found)[:, None]
        right = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1)
        chosen = jnp.pad(chosen, ((0, 0), (0, count + 1 - chosen.shape[1])))
        return chosen, right + 1, cache, seen

    def one_pass(carry):
        slots, history, tokens, passes = carry
        guessed, found = guess(history, slots.cache.length, count)
        found &= slots.active & trusts
        chosen, taken, cache, seen = jax.lax.cond(
            found.any(),
            lambda: pass_over(slots, guessed, found),
            lambda: pass_over(slots, guessed[:, :0], found),
        )
        ends = jnp.isin(chosen, end_ids)
        until_end = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, count + 1)
        taken = jnp.minimum(jnp.minimum(taken, until_end), slots.left) * slots.active
        shown = jnp.where(more < taken[:, None], chosen, NO_TOKEN)
        # Of those that are not taken the places lie behind the end, where nothing is written.
        places = jnp.where(shown == NO_TOKEN, history.shape[1], slots.cache.length[:, None] + 1)
        history = history.at[rows, places + more].set(shown, mode="drop")
        last = jnp.take_along_axis(chosen, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
        token = jnp.where(taken > 0, last, slots.token)
        left = slots.left - taken
        active = slots.active & (left > 0) & ~jnp.isin(token, end_ids)
        # All that were taken have been seen; `seen` has the first.
        seen = seen.at[rows, jnp.where(shown == NO_TOKEN, seen.shape[1], shown)].set(
            True, mode="drop"
        )
        slots = dataclasses.replace(
            slots,
            cache=dataclasses.replace(cache, length=slots.cache.length + taken),
            token=token,
            active=active,
            left=left,
            step=slots.step + taken,
            seen=jnp.where((taken > 0)[:, None], seen, slots.seen),
        )
        tokens = jax.lax.dynamic_update_slice(tokens, shown[:, None], (0, passes, 0))
        return slots, history, tokens, passes + 1

    slots, _, tokens, passes = jax.lax.while_loop(go_on, one_pass, (slots, history, tokens, 0))
    slots = dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, span=None))
    return slots, tokens, passes
