"""The tiny models of `golden/make_families.py`, read as a user's files are."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from llama_models import GOLDEN

from qlora_jax.loading import fill_model, read_config
from qlora_jax.models.llama import Llama
from qlora_jax.weights import open_checkpoint

CASES = ("gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt_neox_sequential")


def golden_file(case: str) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a case (also "golden.ids" and "golden.logits") and its config.json."""
    with safetensors.safe_open(GOLDEN / f"family_{case}.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["config"])


def write_folder(case: str, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes a case as a Hugging Face folder without tokenizer; returns token ids and logits."""
    tensors, config = golden_file(case)
    ids, logits = tensors.pop("golden.ids"), tensors.pop("golden.logits")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return ids, logits


def load(folder: pathlib.Path, **kwargs) -> Llama:
    """A model in float32 without a tokenizer."""
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kwargs))
    fill_model(model, checkpoint)
    return model


def golden_family(case: str, folder: pathlib.Path, **kwargs):
    """A case as a model, with its token ids and transformers' logits."""
    ids, logits = write_folder(case, folder)
    return load(folder, **kwargs), jnp.asarray(ids), logits
