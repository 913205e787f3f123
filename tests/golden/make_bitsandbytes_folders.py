"""Makes bnb_nf4/, bnb_fp4/ and bnb_dynamic/: 4-bit checkpoints as transformers saves them.

Run it where both are installed (Python 3.11, CPU build of torch):

    TORCHDYNAMO_DISABLE=1 python tests/golden/make_bitsandbytes_folders.py

bnb_nf4: bfloat16, double quantization, one file, scales in several nested blocks. bnb_fp4: float32,
no double quantization, several files, o_proj left out of the quantization. bnb_dynamic: bfloat16,
layers in the middle left out, as in Unsloth's dynamic checkpoints. Each has logits.npy, what
transformers computes in float32 for TOKENS from the saved folder.
"""

import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit

TOKENS = [[1, 5, 9, 33, 2, 60, 17, 8]]
CASES = {
    "bnb_nf4": dict(
        sizes=dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2),
        dtype=torch.bfloat16,
        quantization=dict(
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        max_shard_size="1GB",
    ),
    "bnb_fp4": dict(
        sizes=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2),
        dtype=torch.float32,
        quantization=dict(bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["o_proj", "lm_head"]),
        max_shard_size="30KB",
    ),
    "bnb_dynamic": dict(
        sizes=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4),
        dtype=torch.bfloat16,
        quantization=dict(
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[
                "lm_head",
                "model.layers.1.mlp.down_proj",
                "model.layers.2.mlp",
                "model.layers.2.self_attn.q_proj",
            ],
        ),
        max_shard_size="1GB",
    ),
}


def logits(folder: pathlib.Path) -> np.ndarray:
    """What transformers computes from a folder in float32, [batch, tokens, vocabulary].

    bitsandbytes decodes every weight to float32 first; its own products round to the 16-bit compute
    dtype of config.json, and its CPU kernels differ between machines.
    """
    quantized = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    config = transformers.LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = quantized.get_parameter(name)
            if (state := getattr(value, "quant_state", None)) is not None:
                state.dtype = torch.float32
                value = dequantize_4bit(value.data, state)
            parameter.copy_(value)
        return model(torch.tensor(TOKENS)).logits.numpy()


def main(out: pathlib.Path) -> None:
    """Writes the folders."""
    torch.manual_seed(0)
    for name, case in CASES.items():
        config = transformers.LlamaConfig(
            vocab_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.1,
            **case["sizes"],
        )
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as dense:
            transformers.LlamaForCausalLM(config).to(case["dtype"]).save_pretrained(dense)
            quantization = transformers.BitsAndBytesConfig(
                load_in_4bit=True, **case["quantization"]
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                dense, dtype=case["dtype"], device_map="cpu", quantization_config=quantization
            )
            model.save_pretrained(folder, max_shard_size=case["max_shard_size"])
        for file in folder.iterdir():
            file.chmod(0o644)
        np.save(folder / "logits.npy", logits(folder))
        print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
