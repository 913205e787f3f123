"""Makes family_<case>.safetensors: a tiny random model of each family that is not like Llama.

Run it where transformers is installed (Python 3.11, CPU build of torch):

    python tests/golden/make_families.py

A file holds the weights by the names that transformers saves them under, token ids, and the logits
in float32. The config.json is in its metadata. Windows are shorter than the rows.
"""

import json
import pathlib
import tempfile

import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(sliding_window=5, head_dim=16, num_hidden_layers=3)
CASES = {
    # Caps low enough to bend scores and logits, which are not divided by the root of a head's size.
    "gemma2": (
        "gemma2",
        GEMMA
        | dict(query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | dict(
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
            num_key_value_heads=1,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
                "sliding_attention": dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "phi3": ("phi3", dict(sliding_window=6)),
    "opt": (
        "opt",
        dict(ffn_dim=40, word_embed_proj_dim=32, dropout=0.0),
    ),
    "gpt_neox": ("gpt_neox", dict(intermediate_size=40)),
    "gpt_neox_sequential": (
        "gpt_neox",
        dict(
            use_parallel_residual=False, attention_bias=False, rotary_pct=0.5, num_hidden_layers=1
        ),
    ),
}


def make(case: str, model_type: str, overrides: dict) -> None:
    """Writes one file."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **overrides})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plus_one = model_type.startswith("gemma")
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Factors of norms around one, biases and matrices large enough that every part matters.
            is_factor = "norm" in name and name.endswith("weight")
            value.normal_(1.0 if is_factor and not plus_one else 0.0, 0.2)
        ids = torch.randint(3, config.vocab_size, (2, 20))
        logits = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = safetensors.torch.load_file(f"{folder}/model.safetensors")
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    tensors |= {"golden.ids": ids.int(), "golden.logits": logits}
    metadata = {"config": json.dumps(config), "transformers": transformers.__version__}
    file = HERE / f"family_{case}.safetensors"
    safetensors.torch.save_file(tensors, file, metadata)
    print(case, file.stat().st_size, "bytes, logits up to", logits.abs().max().item())
    print("  ", *(name for name in tensors if ".1." not in name and ".2." not in name))


if __name__ == "__main__":
    for case, (model_type, overrides) in CASES.items():
        make(case, model_type, overrides)
