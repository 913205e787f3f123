"""Makes gguf.npz: blocks of GGUF's quantized types, decoded by transformers with torch.

Run in an environment with transformers 5:

    python tests/golden/make_gguf.py

The bytes are random (with finite scales), so all sorts of codes and packed scales occur.
"""

import pathlib

import numpy as np
import torch
from transformers.integrations.gguf import dequant

# type: byte positions of the float16 scales in a block
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
ROWS, COLUMNS = 3, 512


def main() -> None:
    """Writes gguf.npz beside this script."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, positions in SCALES.items():
        kind = getattr(dequant, f"GGML_{name}")
        elements, nbytes = dequant.GGML_BLOCK[kind]
        blocks = rng.integers(0, 256, (ROWS * COLUMNS // elements, nbytes), dtype=np.uint8)
        for position in positions:
            scales = rng.normal(size=(len(blocks), 1)).astype(np.float16)
            blocks[:, position : position + 2] = scales.view(np.uint8)
        raw = blocks.reshape(ROWS, -1)
        values = dequant.dequantize(torch.from_numpy(raw.copy()), kind)
        arrays[f"{name}.raw"] = raw
        arrays[f"{name}.values"] = values.reshape(ROWS, COLUMNS).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("gguf.npz"), **arrays)


if __name__ == "__main__":
    main()
