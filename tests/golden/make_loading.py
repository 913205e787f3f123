"""Makes loading.json: SmolLM2's loss on a text, as stored and through bitsandbytes' NF4.

Run in an environment with transformers 5 and bitsandbytes 0.50:

    python tests/golden/make_loading.py SmolLM2-135M-Instruct.Q4_1.gguf

The quantized loss is that of the float32 model whose linear layers went to NF4 (blocks of 64,
double quantization) and back.
"""

import json
import pathlib
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The sun is a star at the centre of our solar system. It gives light and heat to the planets, "
    "and without it there would be no life on Earth. Light from the sun takes about eight minutes "
    "to reach us. The planets move around it in ellipses, and the nearer a planet is, the shorter "
    "is its year."
)


def main(gguf: pathlib.Path) -> None:
    """Writes loading.json beside this script."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    losses = {}
    with torch.no_grad():
        losses["dense"] = model(ids, labels=ids).loss.item()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed, state = quantize_4bit(
                    module.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True
                )
                module.weight.data = dequantize_4bit(packed, state)
        losses["nf4"] = model(ids, labels=ids).loss.item()
    golden = {"text": TEXT, "ids": ids[0].tolist(), "losses": losses}
    out = pathlib.Path(__file__).with_name("loading.json")
    out.write_text(json.dumps(golden) + "\n")
    print(losses, ids.shape)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
