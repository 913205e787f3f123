"""How the next token is chosen from the logits: greedily, or at random within top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qlora_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings; a pytree of scalars, so that other values do not compile again.

    The order is that of transformers: temperature, then top-k, then top-p among what is left.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: choose among the `top_k` likeliest tokens; 0: among all.
      top_p: choose among the fewest likeliest tokens whose probabilities reach `top_p`.
    """

    temperature: float | Float[Array, ""] = 0.0
    top_k: int | Int[Array, ""] = 0
    top_p: float | Float[Array, ""] = 1.0

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

    def as_arrays(self) -> "Sampling":
        """The same settings with fixed dtypes, as a compiled function takes them."""
        return Sampling(
            jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p)
        )


def greedy_tokens(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The likeliest token of each row.

    >>> greedy_tokens(jnp.array([[0.0, 3.0, 1.0]]))
    Array([1], dtype=int32)
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample_tokens(
    logits: Float[Array, "B V"], keys: PRNGKeyArray, sampling: Sampling
) -> Int[Array, " B"]:
    """Draws one token a row.

    Args:
      logits: of the next token.
      keys: one key a row.
      sampling: the settings; the temperature must be above 0.

    Returns:
      Token ids.

    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> sample_tokens(jnp.array([[0.0, 3.0, 1.0]]), keys, Sampling(temperature=1.0, top_k=1))
    Array([1], dtype=int32)
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    # Differences to the best, so that a tiny temperature overflows to -inf and never to NaN.
    ranked = (ranked - ranked[:, :1]) / sampling.temperature
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((before < sampling.top_p) | (rank == 0), ranked, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
