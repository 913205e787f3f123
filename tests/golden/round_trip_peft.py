"""Adapters through the real libraries: PEFT and this project compute the same, in both directions.

Run it where transformers and peft are installed (Python 3.11, CPU build of torch); it calls this
project with another Python. With a GGUF file of SmolLM2 it goes through that model, too.

    python tests/golden/round_trip_peft.py --ours=.venv/bin/python \\
        --gguf=SmolLM2-135M-Instruct.Q4_1.gguf

On a float32 base it ends with an error unless logits differ by less than 1e-4 for

* an adapter with random A and B that PEFT saved, loaded by us, and
* one with random B that we made and wrote, loaded by PEFT, which has to find every tensor.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import warnings

import numpy as np
import peft
import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).parents[2]
IDS = json.loads(pathlib.Path(__file__).with_name("loading.json").read_text())["ids"]
# Arguments: the base, PEFT's adapter, where to write ours, the ids. Logits of both go to stdout.
OURS = """
import sys, json, pathlib
import jax, numpy as np
from flax import nnx
import qlora_jax as ql

base, theirs, out, ids = sys.argv[1:]
ids = np.array(json.loads(ids))
model, _ = ql.load_model(base, quant_type=None)
np.save(f"{out}-theirs.npy", ql.load_adapter(model, theirs)(ids))
adapted = ql.apply_qlora(model, rank=8, alpha=12, use_rslora=True, quant_type=None,
                         rngs=nnx.Rngs(0))
keys = nnx.Rngs(1)
for _, node in nnx.iter_graph(adapted):
    if isinstance(node, ql.QLoRALinear) and node.rank:
        b = node.lora_b.get_value()
        node.lora_b = nnx.LoRAParam(0.02 * jax.random.normal(keys.params(), b.shape))
np.save(f"{out}-ours.npy", adapted(ids))
np.save(f"{out}-base.npy", model(ids))
ql.save_adapter(adapted, out, base_model=base)
"""


def logits(model: torch.nn.Module, ids: list[list[int]]) -> np.ndarray:
    """What a model computes in evaluation mode."""
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.float().numpy()


def load(base: pathlib.Path) -> transformers.PreTrainedModel:
    """The base in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def check(name: str, ours: str, base: pathlib.Path, folder: pathlib.Path) -> None:
    """Both directions for the model in `base`; adapters are made in `folder`."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16},
        alpha_pattern={"down_proj": 24},
    )
    model = peft.get_peft_model(load(base), config)
    for parameter_name, value in model.named_parameters():
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(value, std=0.02)
    model.save_pretrained(folder / "theirs")
    config = transformers.AutoConfig.from_pretrained(base)
    ids = (np.array([IDS]) % config.vocab_size).tolist()
    expected = logits(model, ids)
    out = folder / "ours"
    command = [ours, "-c", OURS, str(base), str(folder / "theirs"), str(out), json.dumps(ids)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    base_logits = np.load(f"{out}-base.npy")
    report(f"{name}: PEFT's adapter, loaded by us", f"{out}-theirs.npy", expected, base_logits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*(missing|unexpected).*")
        model = peft.PeftModel.from_pretrained(load(base), out)
    report(
        f"{name}: our adapter, loaded by PEFT", f"{out}-ours.npy", logits(model, ids), base_logits
    )


def report(what: str, ours: str, expected: np.ndarray, base: np.ndarray) -> None:
    """Prints the largest difference, and how much the adapter changes at all."""
    error = np.abs(np.load(ours) - expected).max()
    change = np.abs(expected - base).max()
    print(f"{what}: logits differ by {error:.1e}; the adapter changes them by up to {change:.2f}")
    assert error < 1e-4 and change > 0.1, (error, change)


def main() -> None:
    """Goes through the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", required=True, help="a Python that has this project's packages")
    parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2 as a GGUF file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if args.gguf:
            (folder / "smol").mkdir()
            source = dict(pretrained_model_name_or_path=args.gguf.parent, gguf_file=args.gguf.name)
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # Reading a GGUF marks the model as quantized, and saving would refuse it.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(folder / "smol" / "base")
            transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(
                folder / "smol" / "base"
            )
            check("SmolLM2-135M", args.ours, folder / "smol" / "base", folder / "smol")
        for family in ("llama", "phi3", "gpt_neox", "opt", "gemma2"):
            check_tiny(family, args.ours, folder / family)


def check_tiny(family: str, ours: str, folder: pathlib.Path) -> None:
    """Both directions for a random model of a family."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        **(dict(ffn_dim=96, word_embed_proj_dim=64, init_std=0.2) if family == "opt" else {}),
    )
    folder.mkdir()
    base = folder / "base"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    words = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(base / "tokenizer.json"))
    check(f"tiny {family}", ours, base, folder)


if __name__ == "__main__":
    main()
