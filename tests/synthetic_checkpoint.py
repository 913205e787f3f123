"""Writes Hugging Face folders of any size, a shard at a time, without torch."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_checkpoint(folder: pathlib.Path, config: dict, shard_bytes: int, seed: int = 0) -> int:
    """Writes a model in bfloat16; memory stays at one block of random numbers.

    Args:
      folder: an existing folder.
      config: as in `config.json`, with the keys of `CONFIG`.
      shard_bytes: a new file begins when the current one has this size.
      seed: of the weights.

    Returns:
      Bytes of all tensors.
    """
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    shards, size = [{}], 0
    for name, shape in hf_shapes(config).items():
        if size >= shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * int(np.prod(shape))
    rng = np.random.default_rng(seed)
    block = (0.02 * rng.standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        total += _write_shard(folder / file, shard, block, rng)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_small_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """A new folder with a tiny bfloat16 model in several shards."""
    folder.mkdir()
    write_checkpoint(folder, CONFIG, shard_bytes=8_000)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes a tokenizer of a few words."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


def _write_shard(path: pathlib.Path, shard: dict, block: np.ndarray, rng) -> int:
    header, offset = {}, 0
    for name, shape in shard.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for shape in shard.values():
            left = int(np.prod(shape))
            while left:
                # Another start in the block each time, so that no two tensors are equal.
                start = int(rng.integers(len(block)))
                part = block[start : start + left]
                file.write(part.tobytes())
                left -= len(part)
    return offset
