"""The encoder-decoders that several tests need: tiny golden ones, in memory and as folders."""

import collections
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx
from llama_models import GOLDEN

from qlora_jax.loading import load_model
from qlora_jax.models.kinds import abstract_model, read_shape
from qlora_jax.models.t5 import T5
from qlora_jax.weights.names import find_slot

CASES = ("gated", "classic", "mt5")
WORDS = "what is the sum of and one two three four five six seven eight it".split()


def golden(case: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The `config.json`, the weights, and what transformers computes with them."""
    with safetensors.safe_open(GOLDEN / f"t5_{case}.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    found = {k.removeprefix("golden."): v for k, v in tensors.items() if k.startswith("golden.")}
    return config, {k: v for k, v in tensors.items() if not k.startswith("golden.")}, found


def write_folder(folder: pathlib.Path, case: str = "gated") -> pathlib.Path:
    """A golden model as a Hugging Face folder with a tokenizer of words."""
    config, tensors, _ = golden(case)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer with T5's control tokens, of words between spaces."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load(folder: pathlib.Path, case: str = "gated", **options) -> T5:
    """A golden model through the loader."""
    model, _ = load_model(write_folder(folder, case), **{"quant_type": None, **options})
    return model


def fill(case: str = "gated", dtype=jnp.float32, **options) -> T5:
    """A golden model without the loader, which compiles a program for every kind of tensor."""
    config, tensors, _ = golden(case)
    model = abstract_model(read_shape(config, tensors), dtype=dtype, param_dtype=dtype, **options)
    variables = {"/".join(path): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    stacks = collections.defaultdict(dict)
    for name, value in tensors.items():
        slot = find_slot(name, "t5")
        stacks[slot.path][slot.layer or 0] = value.T if slot.path.endswith("/kernel") else value
    assert stacks.keys() == variables.keys()
    for path, layers in stacks.items():
        value = np.stack([layers[i] for i in range(len(layers))])
        value = value.reshape(variables[path].shape)
        variables[path].set_value(jnp.asarray(value, dtype))
    return model


def shift_right(model: T5, target: np.ndarray) -> np.ndarray:
    """What the decoder is given for a target."""
    start = np.full_like(target[:, :1], model.config.decoder_start_token_id)
    return np.concatenate([start, target[:, :-1]], axis=1)


def parameters(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of all parameters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(path): leaf.shape for path, leaf in flat}
