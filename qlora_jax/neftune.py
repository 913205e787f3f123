"""NEFTune: noise on the embeddings while training (arXiv 2310.05914).

    x = embed(tokens) + alpha / sqrt(T * D) * u,    u ~ Uniform(-1, 1) for each feature

which keeps a model from learning the wording of a small set of instructions by heart. The noise is
drawn anew for every microbatch, from keys that are a function of (seed, step, microbatch) like
those of dropout, so a resumed run is the same to the bit. Evaluation and generation see no noise.

T is the length of the row, as in other implementations; rows that are packed or padded therefore
have less noise a token than short rows of their own would.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.models.llama import vocabulary_product


class NoisyEmbed(nnx.Module):
    """An embedding whose vectors get noise in training mode.

    Attributes:
        inner: the embedding itself.
        alpha: the paper's noise level; 5 to 15 there.
        deterministic: True switches the noise off; ``model.eval()`` and ``model.train()`` set it.
        rngs: the stream of the noise.

    >>> embed = NoisyEmbed(nnx.Embed(8, 4, rngs=nnx.Rngs(0)), alpha=5.0, rngs=nnx.Rngs(dropout=1))
    >>> tokens = jnp.array([[1, 2, 3]])
    >>> bool(jnp.max(jnp.abs(embed(tokens) - embed.inner(tokens))) <= 5.0 / (3 * 4) ** 0.5)
    True
    >>> embed.eval()
    >>> bool(jnp.all(embed(tokens) == embed.inner(tokens)))
    True
    """

    def __init__(self, inner: nnx.Module, *, alpha: float, rngs: nnx.Rngs):
        self.inner, self.alpha, self.deterministic = inner, alpha, False
        self.rngs = rngs.dropout.fork()

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of some tokens."""
        x = self.inner(tokens)
        if self.deterministic:
            return x
        bound = self.alpha / math.sqrt(x.shape[-2] * x.shape[-1])
        noise = jax.random.uniform(self.rngs(), x.shape, jnp.float32, -bound, bound)
        return (x + noise).astype(x.dtype)

    @property
    def embedding(self) -> nnx.Param:
        """The table, which a tied output head reads."""
        return self.inner.embedding

    def attend(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of a tied output head; no noise."""
        if isinstance(self.inner, nnx.Embed):
            return vocabulary_product(hidden, self.inner.embedding[...].T)
        return self.inner.attend(hidden)


def add_embedding_noise(model: nnx.Module, alpha: float, seed: int) -> nnx.Module:
    """Puts NEFTune's noise on a model's `embed_tokens`, in place.

    Args:
        model: with an embedding of that name.
        alpha: the paper's noise level; 0 leaves the model as it is.
        seed: of the stream. A training step gives it keys of its own.

    Returns:
        The model.
    """
    if alpha:
        rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.key(seed), 0x6E65))
        if getattr(model.config, "scale_embeddings", False):  # the noise is for what comes out
            alpha /= math.sqrt(model.config.hidden_size)
        model.embed_tokens = NoisyEmbed(model.embed_tokens, alpha=alpha, rngs=rngs)
    return model
