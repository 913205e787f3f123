"""Adapters of an encoder-decoder, exchanged with PEFT."""

import json

import numpy as np
import pytest
import safetensors.numpy
import t5_models
from flax import nnx
from llama_models import GOLDEN

from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.peft import load_adapter, save_adapter

ADAPTER = GOLDEN / "peft_t5"


@pytest.fixture(scope="module")
def adapted():
    return load_adapter(t5_models.fill(), ADAPTER)


def test_logits_equal_those_of_peft(adapted):
    _, _, found = t5_models.golden("gated")
    tokens = t5_models.shift_right(adapted, found["target"])
    options = dict(source=found["source"], source_segment_ids=found["source_mask"])
    ours = nnx.jit(lambda model: model(tokens, **options))(adapted)
    wanted = np.load(ADAPTER / "logits.npz")["logits"]
    assert np.abs(wanted - found["logits"]).max() > 0.1
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)


def test_what_is_written_is_what_peft_wrote(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "out", base_model="google/flan-t5-small")
    file = "adapter_model.safetensors"
    ours, theirs = (
        safetensors.numpy.load_file(path / file) for path in (tmp_path / "out", ADAPTER)
    )
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path / "out", ADAPTER)
    )
    for key in ("task_type", "r", "lora_alpha", "peft_type", "use_dora", "use_rslora"):
        assert ours[key] == theirs[key], key
    assert sorted(theirs["target_modules"]) == ours["target_modules"]


def test_layers_that_share_a_name_with_others_are_written_in_full(tmp_path):
    def adapt(model, where, rank):
        options = dict(where=where, rank=rank, quant_type=None, rngs=nnx.Rngs(0))
        return apply_qlora(model, **options)

    model = adapt(t5_models.fill(), "decoder/layers/cross_attn/q", 2)
    save_adapter(model, tmp_path / "out", base_model="x")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        f"decoder.block.{layer}.layer.1.EncDecAttention.q" for layer in range(3)
    ]
    again = load_adapter(t5_models.fill(), tmp_path / "out")
    assert again.decoder.layers.cross_attn.q.rank == 2
    with pytest.raises(ConfigError, match="differ in rank or alpha between encoder"):
        save_adapter(adapt(model, "encoder/.*/q", 3), tmp_path / "other", base_model="x")
