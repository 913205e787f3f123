"""The 4-bit format of a weight, as one value that can be compared and printed."""

from typing import NamedTuple

from qlora_jax.quantized import QuantizedTensor


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
