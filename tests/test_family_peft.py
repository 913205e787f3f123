"""PEFT's adapters on families whose layers have other names, or are several projections."""

import json

import jax
import numpy as np
import pytest
from family_models import golden_family
from flax import nnx
from llama_models import GOLDEN

import qlora_jax as ql
from qlora_jax.errors import ConfigError
from qlora_jax.weights.safetensors import read_entry
from qlora_jax.weights.safetensors_header import read_header


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@nnx.jit
def forward(model, ids):
    return model(ids)


def read(folder):
    """The configuration and the tensors of an adapter."""
    entries = read_header(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {name: read_entry(entry) for name, entry in entries.items()}


@pytest.mark.parametrize("case", ["phi3", "gpt_neox", "opt", slow("gemma3")])
def test_an_adapter_computes_what_it_computes_in_peft(case, tmp_path):
    """And what is written again, where nothing was trained, is the same file."""
    model, ids, _ = golden_family(case, tmp_path / "base")
    golden = GOLDEN / f"family_peft_{case}"
    adapted = ql.load_adapter(model, golden)
    logits = np.load(golden / "logits.npz")
    np.testing.assert_allclose(forward(model, ids), logits["base"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(forward(adapted, ids), logits["adapted"], rtol=0, atol=1e-4)
    config, tensors = read(ql.save_adapter(adapted, tmp_path / "again", base_model="x"))
    theirs, their_tensors = read(golden)
    assert tensors.keys() == their_tensors.keys()
    assert all(np.array_equal(tensors[name], their_tensors[name]) for name in tensors)
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors} == set(
        config["target_modules"]
    )
    assert (config["r"], config["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])


def trained(model, **options):
    model = ql.apply_qlora(model, quant_type=None, rngs=nnx.Rngs(0), **options)
    for i, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        if path[-1] == "lora_b":
            value = 0.3 * jax.random.normal(jax.random.key(i), variable.shape)
            variable.set_value(value)
    return model


@pytest.mark.parametrize(
    ("case", "options", "ranks"),
    [
        slow(
            "phi3",
            dict(rank=2, alpha=8.0),
            {"qkv_proj": 6, "gate_up_proj": 4, "o_proj": 2, "down_proj": 2},
        ),
        ("phi3", dict(rank=2, where=".*/(q|v|up)_proj"), {"qkv_proj": 4, "gate_up_proj": 2}),
        slow("phi3", dict(rank=2, use_rslora=True, where=".*/[qkv]_proj"), {"qkv_proj": 6}),
        slow("gpt_neox", dict(rank=3, where=".*/(k|o)_proj"), {"query_key_value": 3, "dense": 3}),
        ("gpt_neox", dict(rank=2, use_dora=True, where=".*/[qkv]_proj"), {"query_key_value": 6}),
    ],
)
def test_separate_adapters_of_one_layer_are_written_side_by_side(case, options, ranks, tmp_path):
    model, ids, _ = golden_family(case, tmp_path / "base")
    adapted = trained(model, **options)
    folder = ql.save_adapter(adapted, tmp_path / "adapter", base_model="x")
    config, _ = read(folder)
    assert {
        n: config["rank_pattern"].get(n, config["r"]) for n in config["target_modules"]
    } == ranks
    again = ql.load_adapter(model, folder)
    np.testing.assert_allclose(forward(again, ids), forward(adapted, ids), rtol=0, atol=1e-5)


def test_different_ranks_and_scalings_of_one_layer(tmp_path):
    model, ids, _ = golden_family("phi3", tmp_path / "base")
    adapted = trained(model, rank=2, alpha=8.0, where=".*/q_proj")
    adapted = trained(adapted, rank=3, alpha=1.0, where=".*/v_proj")
    folder = ql.save_adapter(adapted, tmp_path / "adapter", base_model="x")
    assert read(folder)[0]["r"] == 5
    again = ql.load_adapter(model, folder)
    np.testing.assert_allclose(forward(again, ids), forward(adapted, ids), rtol=0, atol=1e-5)


def test_magnitudes_of_a_part_of_a_layer_are_refused(tmp_path):
    model, _, _ = golden_family("phi3", tmp_path / "base")
    adapted = trained(model, rank=2, use_dora=True, where=".*/q_proj")
    with pytest.raises(ConfigError, match=r"qkv_proj is several projections.*DoRA"):
        ql.save_adapter(adapted, tmp_path / "adapter", base_model="x")
