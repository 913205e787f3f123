"""From one tensor of a file to one array of the model, or to one layer of a stacked array.

Each tensor is read alone and quantized on the device; where it is a layer of a stack, the stack's
buffer is donated so that the write happens in place. A tensor that is in 4 bits already is taken as
it is.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import quantize_4bit, quantize_absmax
from qlora_jax.errors import WeightsError
from qlora_jax.lora import is_quantized
from qlora_jax.mixed import MixedStack, one_format_each
from qlora_jax.quantized import QuantizedTensor, quantize
from qlora_jax.vocabulary import Int8Rows, quantize_rows
from qlora_jax.weights import Slot

_PIECE_ELEMENTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a tensor of a file becomes (a layer of) an array of the model; static under jit."""

    shape: tuple[int, ...]
    dtype: Any
    transpose: bool = False
    quantize: tuple[tuple[str, Any], ...] | None = None
    in_rows: bool = False

    @classmethod
    def of(cls, slot: Slot, target: Any) -> "Rule":
        """The rule for a slot whose variable has the (abstract) value `target`."""
        if isinstance(target, MixedStack):
            target = target.parts[target.find(slot.layer)[0]]
        if is_quantized(target):
            options = dict(
                quant_type=target.quant_type,
                block_size=target.block_size,
                double_quant=target.nested_absmax is not None,
            )
            return cls(target.shape, np.dtype(target.dtype), quantize=tuple(options.items()))
        if isinstance(target, Int8Rows):
            return cls(target.shape, np.dtype(np.float32), in_rows=True)
        shape = tuple(target.shape if slot.layer is None else target.shape[1:])
        if slot.path.endswith("/kernel"):
            return cls(shape[::-1], np.dtype(target.dtype), transpose=True)
        return cls(shape, np.dtype(target.dtype))

    def apply(self, weight: Float[Array, "..."] | QuantizedTensor) -> Any:
        """Returns the converted tensor."""
        if is_quantized(weight):
            return dataclasses.replace(weight, dtype=self.dtype)
        if self.quantize is not None:
            packed = quantize_in_pieces(weight, **dict(self.quantize))
            return dataclasses.replace(packed, dtype=self.dtype)
        if self.in_rows:
            return quantize_rows(weight)
        return (weight.T if self.transpose else weight).astype(self.dtype)

    def apply_to_stack(self, stack: Any) -> Any:
        """The same for all layers of an array that is in its model's shape already."""
        if isinstance(stack, MixedStack):
            return dataclasses.replace(stack, parts=tuple(map(self.apply, stack.parts)))
        return self.apply(stack)


@functools.partial(jax.jit, static_argnames="rule")
def convert(weight: Float[Array, "..."] | QuantizedTensor, rule: Rule) -> Any:
    """Converts a tensor that is an array of its own."""
    return rule.apply(weight)


def convert_into(
    stack: Any, weight: Float[Array, "..."] | QuantizedTensor, layer: int, rule: Rule
) -> Any:
    """Writes a converted tensor into its layer of the donated stack."""
    if isinstance(stack, MixedStack):
        part, entry = stack.find(layer)
        return stack.with_part(part, convert_into(stack.parts[part], weight, entry, rule))
    return _convert_into(stack, weight, np.int32(layer), rule)


@functools.partial(jax.jit, static_argnames="rule", donate_argnames="stack")
def _convert_into(
    stack: Any, weight: Float[Array, "..."] | QuantizedTensor, layer: Int[Array, ""], rule: Rule
) -> Any:
    def write(stacked: Array, leaf: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, axis=0)

    return jax.tree.map(write, stack, rule.apply(weight))


def quantize_in_pieces(
    weight: Float[Array, "out in"], *, quant_type: str, block_size: int, double_quant: bool
) -> QuantizedTensor:
    """Gives what `quantize` gives, to the bit, with temporaries of a few megabytes.

    In one piece the float32 temporaries are twice a bfloat16 weight. The planar order pairs the
    first half of the blocks with the second, so a piece takes a slice of both.

    Args:
      weight: float32, bfloat16 or float16.
      quant_type: see `quantize`.
      block_size: see `quantize`.
      double_quant: see `quantize`.

    Returns:
      The quantized tensor.

    Example:
      >>> weight = jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)
      >>> quantize_in_pieces(
      ...     weight, quant_type="nf4", block_size=64, double_quant=True
      ... ).codes.shape
      (4096,)
    """
    pieces = 1
    while weight.size > pieces * _PIECE_ELEMENTS and weight.size % (4 * pieces * block_size) == 0:
        pieces *= 2
    halves = weight.reshape(2, pieces, -1) if pieces > 1 else None
    if halves is None:
        options = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        return quantize(weight, **options)

    def quantize_piece(index: Int[Array, ""]) -> tuple[Array, Array]:
        piece = jax.lax.dynamic_index_in_dim(halves, index, axis=1, keepdims=False)
        codes, absmax = quantize_4bit(piece, quant_type=quant_type, block_size=block_size)
        return codes, absmax.reshape(2, -1)

    codes, absmax = jax.lax.map(quantize_piece, jnp.arange(pieces))
    absmax = absmax.swapaxes(0, 1).reshape(-1)
    nested = offset = None
    if double_quant:
        absmax, nested, offset = quantize_absmax(absmax)
    return QuantizedTensor(
        codes.reshape(-1),
        absmax,
        nested,
        offset,
        quant_type,
        block_size,
        weight.shape,
        weight.dtype,
    )


def check_finite(weight: np.ndarray | QuantizedTensor, rule: Rule, name: str) -> None:
    """Refuses NaN and infinity, and values that the conversion would make infinite.

    Args:
      weight: as it was read; of a 4-bit weight the scales are looked at.
      rule: how it will be converted.
      name: how messages call it.

    Raises:
      WeightsError: there is such a value.
    """
    if isinstance(weight, MixedStack):
        for part_name, part in one_format_each({name: weight}):
            check_finite(part, rule, part_name)
        return
    if is_quantized(weight):
        scales = [weight.nested_absmax, weight.offset]
        if weight.nested_absmax is None:
            scales = [weight.absmax]
        if not all(np.isfinite(scale).all() for scale in scales):
            raise WeightsError(f"{name} has scales that are NaN or infinite. Download it again.")
        return
    largest = _largest_magnitude(weight)
    if not np.isfinite(largest):
        raise WeightsError(
            f"{name} holds NaN or infinity. Download the file again, or take another model."
        )
    if rule.quantize is None and largest > float(jnp.finfo(rule.dtype).max):
        raise WeightsError(
            f"{name} holds {largest:g}, which is infinite in {rule.dtype}. Load the model with "
            "bfloat16 or float32 instead."
        )


def _largest_magnitude(weight: np.ndarray) -> float:
    """Returns the largest absolute value; NaN counts as larger than infinity.

    As unsigned integers without their sign bit, floats are ordered by magnitude with NaN at the
    top, and NumPy compares integers many times faster than `ml_dtypes` compares bfloat16.
    """
    unsigned = np.dtype(f"u{weight.dtype.itemsize}")
    mask = unsigned.type((1 << (8 * weight.dtype.itemsize - 1)) - 1)
    bits = weight.reshape(-1).view(unsigned)
    chunks = range(0, bits.size, _PIECE_ELEMENTS)
    top = max((bits[i : i + _PIECE_ELEMENTS] & mask).max() for i in chunks)
    return float(np.array([top], unsigned).view(weight.dtype)[0])
