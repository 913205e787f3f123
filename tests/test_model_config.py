import dataclasses
import math

import numpy as np
import pytest
from llama_models import tiny_config

from qlora_jax.errors import WeightsError
from qlora_jax.models.config import SUPPORTED, LlamaConfig
from qlora_jax.models.rope import RopeScaling, inverse_frequencies

SIZES = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
)
LLAMA3 = dict(
    factor=32.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
)
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
}


def from_hf(model_type="llama", **overrides) -> LlamaConfig:
    return LlamaConfig.from_hf({"model_type": model_type, **SIZES, **overrides})


def gguf_of(arch: str, **overrides) -> dict:
    renamed = {key.replace("llama.", f"{arch}."): value for key, value in GGUF.items()}
    return {**renamed, "general.architecture": arch, **overrides}


def test_llama_3_2_1b():
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        }
    )
    assert config == LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", **LLAMA3),
        tie_word_embeddings=True,
    )


def test_rope_in_the_form_of_transformers_5():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    new, old = (
        from_hf(rope_parameters=rope),
        from_hf(rope_theta=500000.0, rope_scaling={"type": "llama3", **LLAMA3}),
    )
    assert new == old and new.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", dict(num_key_value_heads=8, head_dim=8, max_position_embeddings=2048)),
        ("mistral", dict(num_key_value_heads=8, head_dim=8, sliding_window=4096)),
        ("qwen2", dict(qkv_bias=True, o_bias=False, sliding_window=None)),
        ("qwen3", dict(qk_norm=True, qkv_bias=False, head_dim=128, sliding_window=None)),
    ],
)
def test_what_a_config_leaves_out_is_its_familys_default(model_type, expected):
    key_values = {} if model_type in ("llama", "mistral") else dict(num_key_value_heads=2)
    config = from_hf(model_type, **key_values)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.model_type == model_type
    assert config.rope_theta == 10000.0 and not config.tie_word_embeddings


def test_biases():
    llama = from_hf(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen3 = from_hf("qwen3", attention_bias=True, num_key_value_heads=2)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    ("settings", "window", "full_layers"),
    [
        (dict(model_type="mistral", sliding_window=None), None, ()),
        (dict(model_type="mistral", sliding_window=7), 7, ()),
        (dict(model_type="qwen2", sliding_window=7, max_window_layers=2), None, ()),
        (dict(use_sliding_window=True, sliding_window=7, max_window_layers=2), 7, (0, 1)),
        (dict(use_sliding_window=True, sliding_window=7, max_window_layers=0), 7, ()),
        (dict(use_sliding_window=True, sliding_window=7), None, ()),
        (
            dict(
                use_sliding_window=True,
                sliding_window=7,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            7,
            (1, 3),
        ),
    ],
)
def test_sliding_windows(settings, window, full_layers):
    settings = {"model_type": "qwen2", "num_key_value_heads": 2, **settings}
    config = from_hf(**settings)
    assert (config.sliding_window, config.full_attention_layers) == (window, full_layers)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "gemma", "phimoe", "llama4", None]
)
def test_other_families_are_refused_with_what_is_supported(model_type):
    with pytest.raises(WeightsError, match=f"model_type {model_type!r}.*{', '.join(SUPPORTED)}"):
        from_hf(model_type)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "RoPE scaling 'yarn'"),
        (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), "RoPE scaling 'dynamic'"),
        (dict(rope_scaling={"type": "linear"}), "RoPE scaling 'linear' without factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(num_key_value_heads=3), "num_attention_heads=8 is not a multiple of"),
        (dict(head_dim=7), "head_dim=7 must be even"),
        (dict(hidden_size=None), "no hidden_size"),
        (dict(hidden_size="64"), "hidden_size '64'.*whole number"),
    ],
)
def test_what_cannot_be_run_is_refused(settings, message):
    with pytest.raises(WeightsError, match=message):
        from_hf(**settings)


def test_all_missing_sizes_are_named_at_once():
    with pytest.raises(WeightsError, match="no vocab_size, hidden_size, intermediate_size, num_h"):
        LlamaConfig.from_hf({"model_type": "llama"})


def test_gguf_of_smollm2():
    assert LlamaConfig.from_gguf(GGUF) == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )


def test_gguf_of_qwen():
    qwen2 = LlamaConfig.from_gguf(gguf_of("qwen2"), tie_word_embeddings=False)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tie_word_embeddings) == (True, False, False)
    keys = {"qwen3.attention.key_length": 128, "qwen3.rope.dimension_count": 128}
    qwen3 = LlamaConfig.from_gguf(gguf_of("qwen3", **keys))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


def test_gguf_vocabulary_is_counted_where_it_is_not_stated():
    metadata = {k: v for k, v in GGUF.items() if k != "llama.vocab_size"}
    config = LlamaConfig.from_gguf({**metadata, "tokenizer.ggml.tokens": ["a"] * 77})
    assert config.vocab_size == 77
    with pytest.raises(WeightsError, match="neither llama.vocab_size nor tokenizer.ggml.tokens"):
        LlamaConfig.from_gguf(metadata)


def test_gguf_rope_scaling():
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert LlamaConfig.from_gguf({**GGUF, **linear}).rope_scaling == RopeScaling("linear", 2.0)
    # The factors that llama.cpp's converter writes for Llama 3 are what "llama3" divides by.
    plain = inverse_frequencies(64, 500000.0)
    llama3 = inverse_frequencies(64, 500000.0, RopeScaling("llama3", **LLAMA3))
    config = LlamaConfig.from_gguf(GGUF, rope_factors=tuple(plain / llama3))
    ours = inverse_frequencies(64, 500000.0, config.rope_scaling)
    np.testing.assert_allclose(ours, llama3, rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture 'gemma'"),
        ({"llama.expert_count": 8}, "with 8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"llama.rope.dimension_count": 32}, "rotates 32 of 64 dimensions"),
        ({"llama.attention.head_count": [9, 8]}, "differs between layers"),
        ({"llama.attention.head_count_kv": [3, 1]}, "differs between layers"),
        ({"llama.block_count": None}, "no llama.block_count"),
    ],
)
def test_gguf_that_cannot_be_run_is_refused(overrides, message):
    with pytest.raises(WeightsError, match=message):
        LlamaConfig.from_gguf({**GGUF, **overrides})


def test_llama3_frequencies_keep_fast_and_stretch_slow_rotations():
    plain = inverse_frequencies(128, 500000.0)
    ours = inverse_frequencies(128, 500000.0, RopeScaling("llama3", **LLAMA3))
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(ours[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(ours[slow], plain[slow] / 32, rtol=1e-6)
    between = ~fast & ~slow
    assert between.any()
    assert (ours[between] < plain[between]).all() and (ours[between] > plain[between] / 32).all()


def test_a_config_is_hashable_and_compares_by_value():
    assert hash(tiny_config()) == hash(dataclasses.replace(tiny_config()))
