"""Decoding 4-bit codes inside a Pallas Mosaic GPU kernel."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.formats import CODEBOOKS


def decode(codes: Int32[Array, "*n"], quant_type: str) -> Float32[Array, "*n"]:
    """The codebook's values at `codes` (0 to 15) by four levels of selects on the code's bits.

    Mosaic shifts and compares no 8-bit integers: bytes are to be cast to int32 first.
    """
    values = [jnp.float32(v) for v in CODEBOOKS[quant_type]]
    for level in range(4):
        bit = (codes & (1 << level)) != 0
        pairs = zip(values[0::2], values[1::2], strict=True)
        values = [jnp.where(bit, odd, even) for even, odd in pairs]
    return values[0]
