"""Keys and values of the tokens that a model has read, so that none is read twice.

One array holds all layers; a layer writes its new entries into it and reads its own slice. Inside a
compiled loop that happens in place, because the array travels in the loop's carry.

Two kinds of rows:

- *aligned*: every row has as many slots in use, shorter prompts are padded on the left, and
  segment ids say which slots are padding;
- *ragged* (`length` has an entry for each row): every row begins at slot 0 and has its own length.
  Nothing is padded: whatever lies behind a row's length is later than all its tokens, so no token
  looks at it, and the next ones overwrite it. That is what lets a row be cut back to a prefix, or
  be given to another text, by setting its length.

With `dtype` int8 every vector of a head is stored as int8 codes under one float32 scale, its
largest magnitude divided by 127: 1/2 + 2 / H of the bytes of 16 bits, and an error of at most half
a scale in each number.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.errors import ConfigError

# The segment id of a slot that nothing was written to; no token may carry it.
EMPTY_SLOT = -1
_LARGEST_CODE = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, for all layers; a pytree of fixed shape.

    Attributes:
      keys: [L, B, S, K, H], already rotated.
      values: [L, B, S, K, H].
      segment_ids: [B, S] int32; -1 where nothing was written. Of ragged rows all 1.
      length: slots in use: [] int32 of all rows, or [B] of each.
      key_scales: [L, B, S, K], where `keys` are int8; else None.
      value_scales: likewise of `values`.
      span: only the first so many slots are looked at: those behind are not in use; None: all.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, "*B"]
    key_scales: Float32[Array, "L B S K"] | None = None
    value_scales: Float32[Array, "L B S K"] | None = None
    span: int | None = dataclasses.field(default=None, metadata={"static": True})
    # No slot is of every segment; see `SharedPrefix`.
    shared: ClassVar[int] = 0

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int, int], dtype, *, ragged: bool = False
    ) -> "KVCache":
        """An empty cache.

        Args:
          shape: layers, rows, slots a row, key heads and their size.
          dtype: of keys and values.
          ragged: whether each row has a length of its own.

        >>> KVCache.empty((3, 2, 16, 1, 4), jnp.float32).length.shape
        ()
        >>> KVCache.empty((3, 2, 16, 1, 4), jnp.int8, ragged=True).key_scales.shape
        (3, 2, 16, 1)
        """
        batch, slots = shape[1:3]
        in_codes = jnp.dtype(dtype) == jnp.int8
        # Two arrays each: one could not be given away twice.
        scales = [jnp.zeros(shape[:-1], jnp.float32) if in_codes else None for _ in range(2)]
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.full((batch, slots), 1 if ragged else EMPTY_SLOT, jnp.int32),
            length=jnp.zeros((batch,) if ragged else (), jnp.int32),
            key_scales=scales[0],
            value_scales=scales[1],
        )

    @property
    def ragged(self) -> bool:
        """Whether each row has a length of its own."""
        return self.length.ndim == 1

    @property
    def visible_segments(self) -> Int[Array, "B S"]:
        """The segment ids of the slots that are looked at."""
        return self.segment_ids[:, : self.span]

    def slots(self, tokens: int) -> Int[Array, "*B T"]:
        """Where the next tokens go, in all rows or in each."""
        return self.length[..., None] + jnp.arange(tokens)

    def append(
        self, layer: Int[Array, ""], keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> "KVCache":
        """Writes the new tokens' keys and values of one layer behind the `length` slots in use."""
        new = {"keys": keys, "values": values}
        if self.key_scales is not None:
            new["keys"], new["key_scales"] = quantize_heads(keys)
            new["values"], new["value_scales"] = quantize_heads(values)
        return dataclasses.replace(
            self,
            **{name: self._write(getattr(self, name), layer, one) for name, one in new.items()},
        )

    def _write(self, old: Array, layer: Int[Array, ""], new: Array) -> Array:
        new = new.astype(old.dtype)
        if not self.ragged:
            start = (layer, 0, self.length, *[0] * (old.ndim - 3))
            return jax.lax.dynamic_update_slice(old, new[None], start)
        rows = jnp.arange(new.shape[0])[:, None]
        # Beyond the last slot nothing is written: a row that is full and idle keeps what it has.
        return old.at[layer, rows, self.slots(new.shape[1])].set(new, mode="drop")

    def append_segments(self, segment_ids: Int[Array, "B T"]) -> "KVCache":
        """Writes the new tokens' segment ids behind the `length` slots in use."""
        if self.ragged:
            return self
        start = (0, self.length)
        new = segment_ids.astype(jnp.int32)
        return dataclasses.replace(
            self, segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, new, start)
        )

    def advance(self, tokens: int | Int[Array, " B"]) -> "KVCache":
        """Counts more slots as used, after all layers have appended theirs."""
        return dataclasses.replace(self, length=self.length + tokens)

    def layer(
        self, layer: Int[Array, ""], dtype
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer, of the slots that are looked at."""

        def read(array: Array) -> Array:
            start = (layer, *[0] * (array.ndim - 1))
            size = (1, array.shape[1], self.span or array.shape[2], *array.shape[3:])
            return jax.lax.dynamic_slice(array, start, size)[0]

        keys, values = read(self.keys), read(self.values)
        if self.key_scales is None:
            return keys, values
        return (
            dequantize_heads(keys, read(self.key_scales), dtype),
            dequantize_heads(values, read(self.value_scales), dtype),
        )


def read_kv_dtype(name: str | None) -> DTypeLike | None:
    """The dtype of a cache, as settings name it: None is the model's, "int8" in codes.

    Raises:
      ConfigError: it has another name.
    """
    if name not in (None, "int8"):
        raise ConfigError(f"kv_dtype must be None or 'int8', got {name!r}")
    return name and jnp.int8


def quantize_heads(x: Float[Array, "*B H"]) -> tuple[Int[Array, "*B H"], Float32[Array, "*B"]]:
    """Vectors as int8 codes, and the scale of each.

    >>> quantize_heads(jnp.array([[1.0, -2.0]]))[0].tolist()
    [[64, -127]]
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1) / _LARGEST_CODE
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return codes.astype(jnp.int8), scale


def dequantize_heads(
    codes: Int[Array, "*B H"], scale: Float32[Array, "*B"], dtype
) -> Float[Array, "*B H"]:
    """What `quantize_heads` stored.

    >>> dequantize_heads(*quantize_heads(jnp.array([[1.27, -2.54]])), jnp.float32).round(2).tolist()
    [[1.2799999713897705, -2.5399999618530273]]
    """
    return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)
