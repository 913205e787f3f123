"""A beginning that many sequences share: its keys and values once, seen by all of them.

Sequences that begin alike (the solved examples of a benchmark, a system prompt) differ only behind
that beginning. It is read once, as a row of its own; the rest of each sequence is then a segment of
a packed row, as in training, whose tokens see their own segment and the beginning:

    beginning     [p p p p]
    row 0                    [a a a b b c c c]
    row 1                    [d d d d e e . .]

`SharedPrefix` takes the place of a `KVCache` in `Llama.hidden_states`. It keeps one copy of the
beginning whatever the number of rows, and nothing of what the rows compute: a layer's keys and
values are needed in that layer alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.models.kv_cache import EMPTY_SLOT, KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a beginning, in front of packed rows; a pytree of fixed shape.

    A sliding window is measured in slots, and packed segments are not where they would be alone: a
    model may not have one that is shorter than beginning and row together.

    Attributes:
      keys: [L, 1, P, K, H], already rotated.
      values: [L, 1, P, K, H].
      prefix_segments: [1, P] int32, 1 for tokens; `EMPTY_SLOT` where there is none.
      new_keys: [B, T, K, H], of the rows in the layer that was computed last.
      new_values: [B, T, K, H].
      new_segments: [B, T] int32.
    """

    keys: Float[Array, "L 1 P K H"]
    values: Float[Array, "L 1 P K H"]
    prefix_segments: Int[Array, "1 P"]
    new_keys: Float[Array, "B T K H"]
    new_values: Float[Array, "B T K H"]
    new_segments: Int[Array, "B T"]

    @classmethod
    def of(cls, read: KVCache, rows: int, width: int) -> SharedPrefix:
        """A beginning in front of rows that are not known yet.

        Args:
          read: a cache of one row that has read the beginning; a segment id of 0 is padding.
          rows: of the packed rest.
          width: tokens of a row.
        """
        shape = (rows, width, *read.keys.shape[3:])
        return cls(
            keys=read.keys,
            values=read.values,
            prefix_segments=jnp.where(read.segment_ids > 0, 1, EMPTY_SLOT),
            new_keys=jnp.zeros(shape, read.keys.dtype),
            new_values=jnp.zeros(shape, read.values.dtype),
            new_segments=jnp.zeros((rows, width), jnp.int32),
        )

    @property
    def shared(self) -> int:
        """The first so many slots are seen by every segment."""
        return self.keys.shape[2]

    @property
    def visible_segments(self) -> Int[Array, "B S"]:
        """The segment ids of the slots that are looked at."""
        rows = self.new_segments.shape[0]
        prefix = jnp.broadcast_to(self.prefix_segments, (rows, self.shared))
        return jnp.concatenate([prefix, self.new_segments], axis=1)

    def slots(self, tokens: int) -> Int[Array, " T"]:
        """Where the tokens of the rows are."""
        return self.shared + jnp.arange(tokens)

    def append_segments(self, segment_ids: Int[Array, "B T"]) -> SharedPrefix:
        """Takes the segment ids of the rows."""
        return dataclasses.replace(self, new_segments=segment_ids.astype(jnp.int32))

    def append(
        self, layer: Int[Array, ""], keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> SharedPrefix:
        """Takes the rows' keys and values of one layer in place of those of the layer before."""
        return dataclasses.replace(
            self,
            new_keys=keys.astype(self.new_keys.dtype),
            new_values=values.astype(self.new_values.dtype),
        )

    def advance(self, tokens: int) -> SharedPrefix:
        """Nothing is kept of the rows."""
        return self

    def layer(
        self, layer: Int[Array, ""], dtype
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer: the beginning's, and behind them those of each row."""

        def read(prefix: Array, new: Array) -> Array:
            one = jax.lax.dynamic_index_in_dim(prefix, layer, keepdims=False)
            one = jnp.broadcast_to(one, (new.shape[0], *one.shape[1:]))
            return jnp.concatenate([one, new], axis=1)

        return read(self.keys, self.new_keys), read(self.values, self.new_values)
