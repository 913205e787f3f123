"""Makes peft_<case>/ and family_peft_<case>/: adapters as PEFT saves them, with its logits.

Run it where transformers and peft are installed (Python 3.11, CPU build of torch):

    python tests/golden/make_peft.py [case …]

The bases are the tiny models of `make_llama.py`. Adapters are random (also B) and large enough that
every part of them shows in the logits; `logits.npz` has them in float32 with the adapter on and, to
measure against, off.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama3": dict(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1),
    "llama2": dict(r=2, lora_alpha=3, target_modules=["lm_head", "up_proj"]),
    "mistral": dict(
        r=4,
        target_modules=[*ATTENTION, "down_proj"],
        rank_pattern={"q_proj": 2, "mlp.down_proj": 6},
        alpha_pattern={"v_proj": 32},
    ),
    "qwen2": dict(r=3, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "qwen3": dict(
        r=4,
        lora_alpha=6,
        target_modules=r".*\.(q_proj|gate_proj|o_proj)",
        exclude_modules=["layers.0.self_attn.o_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={"layers.0.mlp.gate_proj": 5, r"layers\.1\.self_attn\.q_proj": 9},
    ),
    "qwen2_windowed": dict(r=2, target_modules=["k_proj"], layers_to_transform=[1]),
    "dora_llama3": dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "dora_qwen3": dict(
        r=2,
        use_rslora=True,
        use_dora=True,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0],
    ),
}
DTYPES = {"qwen2": torch.bfloat16, "mistral": torch.float16, "dora_qwen3": torch.bfloat16}


# Bases of `make_families.py`. In phi3 and gpt_neox several projections are one layer.
FAMILIES = {
    "phi3": dict(r=3, lora_alpha=6, target_modules="all-linear", rank_pattern={"qkv_proj": 2}),
    "gpt_neox": dict(
        r=2, lora_alpha=6, target_modules=["query_key_value", "dense", "dense_4h_to_h"]
    ),
    "opt": dict(r=2, target_modules=["k_proj", "out_proj", "fc1"]),
    "gemma3": dict(r=2, target_modules="all-linear"),
}


def family_model(case: str) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """A tiny model of `make_families.py`, and its token ids."""
    with safe_open(HERE / f"family_{case}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = file.metadata()["config"]
    ids, expected = tensors.pop("golden.ids").long(), tensors.pop("golden.logits")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(config)
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    return model, ids


def base_model(case: str) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """A tiny model of `make_llama.py`, and its token ids."""
    if case in FAMILIES:
        return family_model(case)
    with safe_open(HERE / f"llama_{case}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    ids = tensors.pop("golden.ids").long()
    expected = tensors.pop("golden.logits")
    config = transformers.AutoConfig.for_model(**config)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    return model, ids


def make(case: str, options: dict) -> None:
    """Writes one folder."""
    torch.manual_seed(1)
    model, ids = base_model(case.removeprefix("dora_"))
    with torch.no_grad():
        base = model(ids).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    config.base_model_name_or_path = None
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude_vector" in name:
                value.mul_(torch.empty_like(value).uniform_(0.5, 1.5))
            elif ".lora_" in name:
                value.normal_(0.0, 0.3)
            if ".lora_" in name:
                value.data = value.data.to(DTYPES.get(case, torch.float32)).float()
        logits = model(ids).logits
    folder = HERE / (f"family_peft_{case}" if case in FAMILIES else f"peft_{case}")
    shutil.rmtree(folder, ignore_errors=True)
    model.to(DTYPES.get(case, torch.float32))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    np.savez_compressed(folder / "logits.npz", adapted=logits.numpy(), base=base.numpy())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(case, f"{size} bytes; the adapter changes logits by up to", (logits - base).abs().max())


if __name__ == "__main__":
    every = CASES | FAMILIES
    for case in sys.argv[1:] or every:
        make(case, every[case])
