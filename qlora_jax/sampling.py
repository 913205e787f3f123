"""How the next token is chosen from the logits: the likeliest, or at random among the likely ones.

The order is that of transformers: repetition penalty, temperature, top-k, then top-p among what is
left, and min-p. What top-k and top-p keep is always the head of the vocabulary sorted by logit, so
both are one count, and no token has to be moved: among equal logits the lower ids count first.

A token is drawn by adding Gumbel noise to the logits and taking the largest. The noise belongs to
the token ids, so a row's draw depends on its key and its logits, not on the settings of the rows
beside it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qlora_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings; a pytree of numbers, so that other values do not compile again.

    Inside compiled functions each may also be an array with a value for every row.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: choose among the `top_k` likeliest tokens; 0: among all.
      top_p: choose among the fewest likeliest tokens whose probabilities reach `top_p`.
      min_p: choose among the tokens with at least `min_p` times the probability of the likeliest
        (arXiv 2407.01082); 0: among all.
      repetition_penalty: the logits of tokens that are in the prompt or the reply are divided by
        it, or multiplied where they are negative (CTRL, arXiv 1909.05858); 1: nothing happens.
    """

    temperature: float | Float[Array, "*B"] = 0.0
    top_k: int | Int[Array, "*B"] = 0
    top_p: float | Float[Array, "*B"] = 1.0
    min_p: float | Float[Array, "*B"] = 0.0
    repetition_penalty: float | Float[Array, "*B"] = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; decided before compilation."""
        return self.temperature == 0

    def validate(self) -> None:
        """Raises ConfigError where a value cannot be meant.

        >>> Sampling(top_p=1.5).validate()
        Traceback (most recent call last):
        qlora_jax.errors.ConfigError: top_p must be above 0 and at most 1, got 1.5
        """
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be 0 (greedy) or a finite number above, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (all tokens) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be 0 (all tokens) to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                "repetition_penalty must be 1 (none) or another finite number above 0, got "
                f"{self.repetition_penalty}"
            )

    def as_arrays(self) -> "Sampling":
        """The same settings with fixed dtypes, as a compiled function takes them."""
        return Sampling(
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )


def greedy_tokens(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The likeliest token of each row.

    >>> greedy_tokens(jnp.array([[0.0, 3.0, 1.0]]))
    Array([1], dtype=int32)
    """
    # XLA's argmax is one slow loop on a CPU; a maximum and a minimum are four times faster.
    places, best = jnp.arange(logits.shape[-1]), logits.max(axis=-1, keepdims=True)
    first = jnp.where(logits == best, places, logits.shape[-1] - 1).min(axis=-1)
    return first.astype(jnp.int32)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Makes the tokens of a row's prompt and reply less likely; see `Sampling`.

    >>> seen = jnp.array([[True, True, False]])
    >>> penalize_repetition(jnp.array([[2.0, -1.0, 1.0]]), seen, Sampling(repetition_penalty=2.0))
    Array([[ 1., -2.,  1.]], dtype=float32)
    """
    penalty = _column(sampling.repetition_penalty)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_tokens(
    logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling
) -> Int[Array, " B"]:
    """Draws one token a row.

    Args:
      logits: of the next token.
      keys: one key a row.
      sampling: the settings, for all rows or for each; rows whose temperature is 0 get their
        likeliest token.

    Returns:
      Token ids.

    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> sample_tokens(jnp.array([[0.0, 3.0, 1.0]]), keys, Sampling(temperature=1.0, top_k=1))
    Array([1], dtype=int32)
    """
    # The noise of a whole vocabulary is not free, and many rows do not want it.
    draws = jnp.any(jnp.asarray(sampling.temperature) > 0)
    return jax.lax.cond(
        draws, lambda x: _draw(x, keys, sampling), greedy_tokens, jnp.asarray(logits)
    )


def _draw(logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling) -> Int[Array, " B"]:
    temperature = _column(sampling.temperature)
    # Differences to the best, so that a tiny temperature overflows to -inf and never to NaN.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(
        temperature > 0, temperature, 1.0
    )
    ranks_count = jnp.any((sampling.top_k != 0) | (sampling.top_p < 1))
    kept = jax.lax.cond(
        ranks_count, lambda x: _head(x, sampling), lambda x: jnp.ones(x.shape, bool), scaled
    )
    kept &= scaled >= jnp.log(_column(sampling.min_p))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = greedy_tokens(jnp.where(kept, scaled + noise, -jnp.inf))
    return jnp.where(temperature[:, 0] == 0, greedy_tokens(logits), drawn)


def _head(scaled: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """The tokens that top-k and top-p keep."""
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    top_k, rank = _column(sampling.top_k), jnp.arange(scaled.shape[-1])
    ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # What rounding makes of the sum must not matter to a row that takes all tokens.
    reached = (before < _column(sampling.top_p)) | (_column(sampling.top_p) >= 1)
    reached &= ranked > -jnp.inf
    count = jnp.maximum(reached.sum(axis=-1, keepdims=True), 1)
    least = jnp.take_along_axis(ranked, count - 1, axis=-1)
    above, equal = scaled > least, scaled == least
    places = count - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= places))


def _column(setting: float | Array) -> Float[Array, "B 1"]:
    """A setting of one or all rows, beside the vocabulary."""
    return jnp.reshape(jnp.asarray(setting), (-1, 1))
