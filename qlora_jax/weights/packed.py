"""The 4-bit format of a weight, or of stacked ones, as a value to be compared and printed."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from qlora_jax.mixed import MixedStack
from qlora_jax.quantized import QuantizedTensor, abstract_quantized


class PackedFormat(NamedTuple):
    """How a weight is stored; the fields as in `qlora_jax.quantized.quantize`."""

    quant_type: str
    block_size: int
    double_quant: bool

    @classmethod
    def of(cls, q: QuantizedTensor) -> "PackedFormat":
        """The format of a tensor, also an abstract one."""
        return cls(q.quant_type, q.block_size, q.nested_absmax is not None)

    def __str__(self) -> str:
        nested = "with" if self.double_quant else "without"
        return f"{self.quant_type} in blocks of {self.block_size} {nested} double quantization"


@dataclasses.dataclass(frozen=True)
class MixedFormat:
    """How the layers of one projection are stored, where they differ.

    Attributes:
        layers: the format of each; None: not in 4 bits.

    >>> nf4 = PackedFormat("nf4", 64, True)
    >>> print(MixedFormat((nf4, None, nf4)))
    nf4 in blocks of 64 with double quantization in layers 0,2, not in 4 bits in layers 1
    """

    layers: tuple[PackedFormat | None, ...]

    @classmethod
    def of(cls, found: Mapping[int, PackedFormat | None]) -> "MixedFormat":
        """The format of layers by their numbers; what is missing counts as not in 4 bits."""
        return cls(tuple(found.get(layer) for layer in range(max(found) + 1)))

    @classmethod
    def of_stack(cls, stack: MixedStack) -> "MixedFormat":
        """The format of a stack, also of an abstract one."""
        found: dict[int, PackedFormat | None] = {}
        for part, layers in zip(stack.parts, stack.places, strict=True):
            kind = PackedFormat.of(part) if isinstance(part, QuantizedTensor) else None
            found |= dict.fromkeys(layers, kind)
        return cls.of(found)

    @property
    def places(self) -> dict[PackedFormat | None, tuple[int, ...]]:
        """The layers of each format, in the order of `MixedStack`."""
        return {
            kind: tuple(layer for layer, other in enumerate(self.layers) if other == kind)
            for kind in self.layers
        }

    def abstract(self, layers: int, shape: tuple[int, int], dtype: Any) -> MixedStack:
        """The `MixedStack` without values.

        Args:
            layers: of the model; a checkpoint that has another number is refused later, by name.
            shape: (out_features, in_features).
            dtype: see `MixedStack`.
        """
        padded = (*self.layers, *[None] * layers)[:layers]
        places, parts = MixedFormat(padded).places, []
        for kind, numbers in places.items():
            leading = (len(numbers),)
            if kind is None:
                parts.append(jax.ShapeDtypeStruct((*leading, *shape[::-1]), dtype))
            else:
                options = dict(leading_shape=leading, dtype=dtype, **kind._asdict())
                parts.append(abstract_quantized(shape, **options))
        return MixedStack(tuple(parts), None, tuple(places.values()))

    def __str__(self) -> str:
        return ", ".join(
            f"{kind or 'not in 4 bits'} in layers {','.join(map(str, layers))}"
            for kind, layers in self.places.items()
        )


def format_of(value: Any) -> PackedFormat | MixedFormat | None:
    """The format of a kernel; None for one that is dense."""
    if isinstance(value, MixedStack):
        return MixedFormat.of_stack(value)
    return PackedFormat.of(value) if isinstance(value, QuantizedTensor) else None


def all_kinds(formats: Iterable[PackedFormat | MixedFormat]) -> set[PackedFormat]:
    """All 4-bit formats that occur.

    >>> nf4, fp4 = (PackedFormat(name, 64, True) for name in ("nf4", "fp4"))
    >>> sorted(kind.quant_type for kind in all_kinds([nf4, MixedFormat((fp4, None))]))
    ['fp4', 'nf4']
    """
    found: set[PackedFormat | None] = set()
    for kind in formats:
        found |= set(kind.layers) if isinstance(kind, MixedFormat) else {kind}
    return found - {None}
