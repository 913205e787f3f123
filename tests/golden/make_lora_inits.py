"""Makes lora_inits.npz: what PEFT's initialisations make of a few weights.

Run it where torch (CPU), peft and bitsandbytes are installed (Python 3.11):

    python tests/golden/make_lora_inits.py

`<shape>.w` is a weight (out, in), and `<shape>.<case>.a`, `.b` and `.base` are what PEFT's layer
holds afterwards: A [r, in], B [out, r] and the base. LoftQ in PEFT computes on a GPU only; its own
functions run here on the CPU, with that one word replaced.
"""

import pathlib

import numpy as np
import peft
import torch
from bitsandbytes.nn import Params4bit
from peft.utils import loftq_utils

# Rows of whole blocks: with shorter ones bitsandbytes 0.50.2 decodes wrongly on a CPU.
SHAPES = {"wide": (24, 64), "tall": (80, 64)}
RANK = 4
CASES = {
    "pissa": dict(init_lora_weights="pissa", lora_alpha=6),
    "pissa_rslora": dict(init_lora_weights="pissa", lora_alpha=6, use_rslora=True),
    "olora": dict(init_lora_weights="olora", lora_alpha=6),
}
# PEFT leaves alpha / r out of LoftQ: only with 1 does its adapter give back what was lost.
LOFTQ_CASES = {"loftq": 1, "loftq_5": 5}


class OnCpu:
    """Sends to the CPU what PEFT sends to a GPU."""

    def __enter__(self):
        self.originals = [(kind, kind.to) for kind in (torch.Tensor, Params4bit)]
        for kind, original in self.originals:

            def to(tensor, *args, original=original, **kwargs):
                args = ["cpu" if arg == "cuda" else arg for arg in args]
                kwargs = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
                return original(tensor, *args, **kwargs)

            kind.to = to

    def __exit__(self, *_):
        for kind, original in self.originals:
            kind.to = original


def make(weight: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """A layer as PEFT leaves it."""
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    config = peft.LoraConfig(r=RANK, target_modules=["0"], **options)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    a, b = (matrix["default"].weight for matrix in (layer.lora_A, layer.lora_B))
    return dict(a=a, b=b, base=layer.base_layer.weight)


def make_loftq(weight: torch.Tensor, iterations: int) -> dict[str, torch.Tensor]:
    """What PEFT's layer would get; making it asks for scipy, which is not used for it."""
    with OnCpu():
        options = dict(num_bits=4, reduced_rank=RANK, num_iter=iterations)
        base, a, b = loftq_utils.loftq_init(weight, **options)
    return dict(a=a[:RANK], b=b[:, :RANK], base=base)


if __name__ == "__main__":
    arrays = {}
    for shape_name, shape in SHAPES.items():
        torch.manual_seed(0)
        w = torch.randn(shape) * 0.05
        made = {case: make(w, options) for case, options in CASES.items()}
        made |= {case: make_loftq(w, number) for case, number in LOFTQ_CASES.items()}
        arrays[f"{shape_name}.w"] = w.numpy()
        for case, tensors in made.items():
            for name, value in tensors.items():
                arrays[f"{shape_name}.{case}.{name}"] = value.detach().numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "lora_inits.npz", **arrays)
    print(f"PEFT {peft.__version__}: {len(arrays)} arrays")
