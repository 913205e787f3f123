"""Tiny models of every family in 4 bits, with adapters of NumPy's random numbers."""

import json
import pathlib

import family_models
import jax.numpy as jnp
import llama_models
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers

from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.loading import load_model
from qlora_jax.nnx_linear import QLoRALinear

TOKENS = ["<|endoftext|>", "<|im_end|>", *"abcdefghijklm123,.!?", "Ġ", "Ċ"]
MERGES = [("a", "b"), ("Ġ", "a"), ("1", "2"), ("d", "e"), ("Ġa", "b")]
TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def write_base(folder: pathlib.Path, case: str) -> pathlib.Path:
    """The model that a golden file of transformers holds, as a folder with a byte-level BPE."""
    folder.mkdir(parents=True)
    kind = "family" if case in family_models.CASES else "llama"
    with safetensors.safe_open(llama_models.GOLDEN / f"{kind}_{case}.safetensors", "np") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if not n.startswith("golden.")}
        (folder / "config.json").write_text(file.metadata()["config"])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    vocabulary = TOKENS + ["".join(pair) for pair in MERGES]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(TOKENS[:2])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def adapt(model: nnx.Module, scale: float = 0.1) -> nnx.Module:
    """Puts adapters on a model whose effect is seen; in the order of the paths."""
    model = apply_qlora(model, rank=2, alpha=6, use_rslora=True, quant_type=None, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, QLoRALinear) and node.rank:
            for name in ("lora_a", "lora_b"):
                variable = getattr(node, name)
                value = generator.normal(0, scale, variable.shape)
                variable.set_value(jnp.asarray(value, jnp.float32))
    model.eval()
    return model


def adapted(folder: pathlib.Path, case: str = "llama2") -> tuple[nnx.Module, pathlib.Path]:
    """A base on disk, and the model of it in NF4 with adapters."""
    base = write_base(folder / case, case)
    return adapt(load_model(base, block_size=32)[0]), base
