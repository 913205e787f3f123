"""A whole run small enough for a test: a random Llama on disk, conversations, a shrunken recipe."""

import io
import json
import pathlib

import numpy as np
import safetensors.numpy
import synthetic_checkpoint
import tokenizers
from fake_tokenizer import CHATML
from rich.console import Console

from qlora_jax import config as config_lib
from qlora_jax.report import Report

REPOSITORY = pathlib.Path(__file__).parents[1]
WORDS = "what is the sum of and one two three four five six seven eight it".split()
SPECIAL = ["<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n"]


def write_model(folder: pathlib.Path, seed: int = 0, **changes) -> pathlib.Path:
    """A Llama of two layers, unless changed, with a word tokenizer and a chat template."""
    folder.mkdir(exist_ok=True)
    config = {**synthetic_checkpoint.CONFIG, "num_hidden_layers": 2, "tie_word_embeddings": True}
    config |= changes
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else (0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in synthetic_checkpoint.hf_shapes(config).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    vocabulary = {word: i for i, word in enumerate(["<unk>", *SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL[:2])
    backend.add_tokens(SPECIAL[2:])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_data(path: pathlib.Path, records: int = 24) -> pathlib.Path:
    """Sums in words; their lengths differ, so that packing has something to do."""
    rng = np.random.default_rng(0)
    numbers = WORDS[6:14]
    with path.open("w") as file:
        for _ in range(records):
            terms = rng.choice(4, size=rng.integers(2, 5))
            question = "what is the sum of " + " and ".join(numbers[i] for i in terms)
            answer = "it is " + " ".join(numbers[i] for i in sorted(terms))
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return path


def tiny_config(model: pathlib.Path, data: pathlib.Path):
    """The quickstart's own recipe, shrunken."""
    config = config_lib.load_config(REPOSITORY / "configs" / "smollm2_135m.py")
    config.model.path, config.data.path, config.data.format = str(model), str(data), "auto"
    config.model.block_size = 32
    config.data.max_len, config.data.cache_dir = 48, "none"
    # Of the schedules the one that does not depend on the number of steps, which tests change.
    config.optimizer.schedule = "constant"
    config.lora.rank, config.lora.dropout = 4, 0.2
    config.train.batch_size, config.train.grad_accum, config.train.steps = 2, 2, 6
    config.train.log_every, config.train.loss_chunk = 2, 32
    config.optimizer.learning_rate = 1e-2
    config.sample.enabled, config.sample.max_new_tokens = False, 8
    config.checkpoint.every = 100
    return config


def quiet_report() -> tuple[Report, io.StringIO]:
    """A report that prints into memory, as it would into a file."""
    text = io.StringIO()
    return Report(Console(file=text, highlight=False)), text
