"""The 4-bit block formats: codebooks, block sizes, nibble order, the 8-bit maps.

A tensor is flattened row-major and cut into blocks of `block_size` elements; the last one may be
short. A block is stored as its absolute maximum `absmax` (float32) and a 4-bit code per element,
the index of the codebook value nearest to `x / absmax`. So

    x[i] ~ codebook[code[i]] * absmax[i // block_size]

*Double quantization* stores absmax itself in 8 bits: `offset = mean(absmax)`, and
`absmax - offset` in blocks of 256 as indices into the *dynamic map*, with one float32 scale each:

    absmax[j] ~ dynamic_map[code8[j]] * nested_absmax[j // 256] + offset

**Two byte orders.** Files (bitsandbytes) are *interleaved*: byte `i` holds element `2i` in its high
nibble and `2i + 1` in its low one. In memory we keep the codes *planar*: the blocks are split into
a first and a second half, byte `i` holds element `i` of the first half (high nibble) and element
`i` of the second (low nibble). Unpacking is then two contiguous vector loops instead of a shuffle,
and for a matrix with an even number of rows the two planes are its upper and its lower rows.
The second half is padded to the length of the first, which is a whole number of blocks. Repacking
is a bijection, so import and export lose nothing (not even the spare nibble of an odd tensor).

Sources: QLoRA (arXiv 2305.14314) for NF4 and double quantization; Dettmers et al. (arXiv
2110.02861) for the dynamic map; the formats are those of bitsandbytes 0.50.
"""

from __future__ import annotations

import functools

import numpy as np

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)

CODEBOOKS: dict[str, np.ndarray] = {
    # Quantiles of N(0, 1), asymmetric so that zero is exact (QLoRA, appendix E).
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
         -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        np.float32,
    ),
    # Sign, 2 exponent bits, 1 mantissa bit, in bit-pattern order; scaled so that the largest is 1.
    # Both zeros are +0.
    "fp4": np.concatenate([_FP4_MAGNITUDES, 0 - _FP4_MAGNITUDES]),
    # Integers -7..7 in offset binary; code 0 would be -8/7 and is never produced.
    "int4": (np.arange(16, dtype=np.float32) - 8) / np.float32(7),
}  # fmt: skip


def check_format(quant_type: str, block_size: int) -> None:
    """Raises ValueError unless the pair is one of the formats above."""
    if quant_type not in CODEBOOKS:
        raise ValueError(f"{quant_type=} is unknown: use one of {sorted(CODEBOOKS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{block_size=} is not supported: use one of {BLOCK_SIZES}")


@functools.cache
def decision_bounds(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints between neighbouring codebook values, and the code of each interval.

    Returns:
        `bounds`, float32 [15] ascending, and `codes`, uint8 [16]: a value `v` with
        `bounds[k-1] < v <= bounds[k]` gets the code `codes[k]`.
    """
    code = CODEBOOKS[quant_type]
    order = np.argsort(code, kind="stable")
    bounds = (code[order[:-1]] + code[order[1:]]) / np.float32(2)
    if quant_type == "int4":
        bounds[0] = -np.inf  # -8/7 lies outside the block's range
    return bounds, order.astype(np.uint8)


def _dynamic_map(*, signed: bool) -> np.ndarray:
    """An 8-bit dynamic map, ascending float32 [256] (arXiv 2110.02861, section 1.3).

    Seven decades; decade `i` (from 1e-6 upwards) has `2**i` means of an even division of
    [0.1, 1] on each side of zero, and 0 and 1 complete the 256 values. Without a sign it has
    twice as many of them above zero.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # The edges are those of torch.linspace: stepped from both ends, each product and sum
        # rounded to float32 once. Files hold this map, and so it must agree to the bit.
        n = 2 ** (i if signed else i + 1) + 1
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n - 1))
        k = np.arange(n)
        up, down = np.float64(np.float32(0.1)) + step * k, 1 - step * (n - 1 - k)
        edges = np.where(k < n // 2, up, down).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (i - 6)) * means
        values += scaled.tolist() + ((-scaled).tolist() if signed else [])
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP: np.ndarray = _dynamic_map(signed=True)
UNSIGNED_DYNAMIC_MAP: np.ndarray = _dynamic_map(signed=False)


def _dynamic_codes() -> np.ndarray:
    """The dynamic-map code of each of the 65536 grid points of [-1, 1], uint8.

    bitsandbytes' CPU code rounds a value to this grid before it looks for the nearest map entry;
    a value within 1.5e-5 of a midpoint may so get the neighbour's code. We do the same, to agree.
    """
    grid = np.arange(65536, dtype=np.float32) / np.float32(65535) * 2 - 1
    bounds = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    return np.searchsorted(bounds, grid, side="left").astype(np.uint8)


DYNAMIC_CODES: np.ndarray = _dynamic_codes()


def num_blocks(size: int, block_size: int) -> int:
    """Blocks in a tensor of `size` elements.

    >>> num_blocks(130, 64)
    3
    """
    return -(-size // block_size)


def plane_size(size: int, block_size: int) -> int:
    """Bytes of the planar codes of a tensor of `size` elements: half its blocks, rounded up.

    >>> plane_size(130, 64)
    128
    """
    return -(-num_blocks(size, block_size) // 2) * block_size


def interleaved_to_planar(packed: np.ndarray, size: int, block_size: int) -> np.ndarray:
    """File order to memory order.

    Args:
        packed: uint8 [ceil(size / 2)], element `2i` in the high nibble of byte `i`.
        size: number of elements.
        block_size: elements a block.

    Returns:
        uint8 [plane_size(size, block_size)].

    >>> interleaved_to_planar(np.array([0x12, 0x30], np.uint8), 3, 32)[:4].tolist()
    [16, 32, 48, 0]
    """
    packed = np.asarray(packed, np.uint8).reshape(-1)
    if packed.size != -(-size // 2):
        raise ValueError(f"{packed.size=} bytes cannot hold {size=} codes of 4 bits")
    plane = plane_size(size, block_size)
    if packed.size < plane:
        packed = np.concatenate([packed, np.zeros(plane - packed.size, np.uint8)])
    first, second = packed[: plane // 2], packed[plane // 2 :]
    codes = np.empty(plane, np.uint8)
    np.bitwise_or(first & 0xF0, second >> 4, out=codes[0::2])
    np.bitwise_or(first << 4, second & 15, out=codes[1::2])
    return codes


def planar_to_interleaved(codes: np.ndarray, size: int, block_size: int) -> np.ndarray:
    """Memory order to file order; the inverse of `interleaved_to_planar`.

    >>> packed = np.array([0x12, 0x3F], np.uint8)
    >>> planar_to_interleaved(interleaved_to_planar(packed, 3, 32), 3, 32).tolist()
    [18, 63]
    """
    codes = np.asarray(codes, np.uint8).reshape(-1)
    plane = plane_size(size, block_size)
    if codes.size != plane:
        raise ValueError(f"{codes.size=} bytes, expected {plane} for {size=} and {block_size=}")
    even, odd = codes[0::2], codes[1::2]
    packed = np.empty(plane, np.uint8)
    np.bitwise_or(even & 0xF0, odd >> 4, out=packed[: plane // 2])
    np.bitwise_or(even << 4, odd & 15, out=packed[plane // 2 :])
    return packed[: -(-size // 2)]
