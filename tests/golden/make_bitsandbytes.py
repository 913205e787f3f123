"""Makes `bitsandbytes.npz`: what bitsandbytes 0.50.2 does to a dozen and more small tensors.

Run it where bitsandbytes is installed (Python 3.11, CPU build of torch):

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_bitsandbytes.py

Every case stores the input, the packed codes, absmax (nested or not), the offset, both maps and the
dequantized tensor in float32 and bfloat16 (as uint16 bits). Inputs of 16 bits are stored as bits.
"""

from __future__ import annotations

import pathlib

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

# quant_type, block_size, shape, dtype, double_quant, what the numbers look like
CASES = [
    ("nf4", 64, (64, 128), "float32", True, "normal"),
    ("nf4", 64, (48, 192), "bfloat16", True, "normal"),
    ("nf4", 64, (48, 192), "float16", True, "normal"),
    ("nf4", 64, (100, 64), "float32", False, "heavy"),
    ("nf4", 32, (32, 96), "float32", True, "heavy"),
    ("nf4", 128, (33, 96), "float32", False, "normal"),
    ("nf4", 256, (16, 250), "float32", True, "normal"),
    ("nf4", 512, (8, 512), "bfloat16", False, "normal"),
    ("nf4", 1024, (5, 1000), "float32", False, "normal"),
    ("nf4", 2048, (4, 2048), "float32", True, "normal"),
    ("nf4", 4096, (3, 4099), "float32", False, "normal"),
    ("nf4", 64, (7, 9), "float32", False, "normal"),
    ("nf4", 64, (1, 1), "float32", False, "normal"),
    ("nf4", 64, (16, 128), "float32", True, "zeros in some blocks"),
    ("nf4", 64, (8, 64), "float32", False, "subnormal"),
    ("nf4", 64, (4, 64), "float32", False, "midpoints"),
    ("nf4", 64, (330, 64), "float32", True, "wide scales"),
    ("fp4", 64, (64, 128), "float32", True, "normal"),
    ("fp4", 64, (48, 192), "bfloat16", False, "normal"),
    ("fp4", 128, (13, 77), "float32", False, "normal"),
    ("fp4", 32, (16, 128), "float32", True, "zeros in some blocks"),
]


def numbers(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
    if kind == "heavy":
        x = (rng.standard_t(2, shape) * 0.01).astype(np.float32)
    elif kind == "zeros in some blocks":
        x.reshape(-1, 64)[::3] = 0.0
    elif kind == "subnormal":
        x = (rng.standard_normal(shape) * 1e-40).astype(np.float32)
    elif kind == "midpoints":
        code = bnb.get_4bit_type("nf4", device="cpu").numpy()
        mids = (code[1:] + code[:-1]) / 2
        x = np.resize(np.concatenate([mids, code]), shape).astype(np.float32)
    elif kind == "wide scales":
        x *= np.exp(rng.standard_normal((shape[0], 1)) * 2).astype(np.float32)
    return x


def bits(t: torch.Tensor) -> np.ndarray:
    """The tensor's bits: float32 as it is, 16-bit floats as uint16."""
    t = t.detach().contiguous()
    return t.view(torch.uint16).numpy() if t.element_size() == 2 else t.numpy()


def dequantize(packed: torch.Tensor, state: bnb.QuantState, dtype: torch.dtype) -> torch.Tensor:
    if state.shape[-1] % state.blocksize == 0:
        state.dtype = dtype
        return bnb.dequantize_4bit(packed, state)
    # Where blocks cross rows, the library's AVX-512 loop takes some scales from the wrong block
    # (33 x 96 in blocks of 128, for one); its generic implementation is the reference there.
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    code, shape = state.code, state.shape
    return _dequantize_4bit_compute(packed.reshape(-1), absmax, code, state.blocksize, shape, dtype)


def main() -> None:
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    names = []
    for i, (quant_type, block, shape, dtype, double_quant, kind) in enumerate(CASES):
        x = torch.from_numpy(numbers(shape, kind, rng)).to(getattr(torch, dtype))
        packed, state = bnb.quantize_4bit(
            x, blocksize=block, compress_statistics=double_quant, quant_type=quant_type
        )
        names.append(
            f"{quant_type}|{block}|{'x'.join(map(str, shape))}|{dtype}|{double_quant}|{kind}"
        )
        key = f"{i:02d}"
        out[f"{key}.x"] = bits(x)
        out[f"{key}.packed"] = packed.numpy().reshape(-1)
        out[f"{key}.absmax"] = state.absmax.numpy()
        if double_quant:
            out[f"{key}.nested_absmax"] = state.state2.absmax.numpy()
            out[f"{key}.offset"] = np.float32(state.offset.item())
        for to in ("float32", "bfloat16"):
            dense = dequantize(packed, state, getattr(torch, to))
            out[f"{key}.dequantized_{to}"] = bits(dense).reshape(shape)
    out["names"] = np.array(names)
    for quant_type in ("nf4", "fp4"):
        out[f"code_{quant_type}"] = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    out["dynamic_map"] = bnb.create_dynamic_map().numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("bitsandbytes.npz"), **out)


if __name__ == "__main__":
    main()
