"""Configurations and files of the families that are not like Llama, and what is refused."""

import dataclasses
import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from family_models import golden_file, load, write_folder
from flax import nnx

from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.loading import fill_model, packed_linears, quantize_as, read_config
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.hf_config import to_hf
from qlora_jax.models.llama import Llama
from qlora_jax.models.rope import RopeScaling
from qlora_jax.models.shapes import SHAPES
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.names import NAMINGS, Slot, find_slot, tensor_name

# As on the Hugging Face Hub, where defaults are left out.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}


def of(name: str, **changes) -> LlamaConfig:
    return LlamaConfig.from_hf(SHAPES[name] | changes)


def test_gemma_3_that_sees_pictures_is_read_as_its_language_model():
    config = LlamaConfig.from_hf(GEMMA_3_4B)
    assert config == of("google/gemma-3-4b-pt")
    assert config.rope_scaling == RopeScaling("linear", factor=8.0)
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.full_attention_layers == (5, 11, 17, 23, 29)
    assert config.qk_norm and config.final_logit_softcapping is None


def test_gemma_2_alternates_and_caps():
    config = of("google/gemma-2-27b")
    assert config.full_attention_layers == tuple(range(1, 46, 2))
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.query_pre_attn_scalar, config.sliding_window) == (144.0, 4096)


def test_rotations_of_gemma_3_in_the_form_of_transformers_5():
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    old = of("google/gemma-3-4b-pt", rope_local_base_freq=500.0)
    changed = of("google/gemma-3-4b-pt", rope_scaling=None, rope_parameters=new)
    assert old == changed and old.rope_local_base_freq == 500.0


def test_pythia_rotates_a_part_of_each_head():
    config = of("EleutherAI/pythia-12b")
    assert (config.head_dim, config.rotary_dim, config.parallel_residual) == (128, 32, True)
    assert not of("EleutherAI/pythia-12b", use_parallel_residual=False).parallel_residual


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "facebook/opt-125m",
            dict(word_embed_proj_dim=512, do_layer_norm_before=False),
            "this opt model has word_embed_proj_dim 512 .*only opt-350m",
        ),
        ("facebook/opt-125m", dict(activation_function="silu"), "hidden_act 'silu'; only 'relu'"),
        ("facebook/opt-125m", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        (
            "microsoft/Phi-3-mini-4k-instruct",
            dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
            "RoPE scaling 'longrope'; .* do without LongRoPE",
        ),
        ("google/gemma-3-1b-pt", dict(use_bidirectional_attention=True), "bidirectional"),
        ("google/gemma-2-2b", dict(hidden_activation="silu"), "only 'gelu_pytorch_tanh'"),
    ],
)
def test_what_a_family_can_also_be_is_refused_by_name(name, changes, message):
    with pytest.raises(WeightsError, match=message):
        of(name, **changes)


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_and_slots_are_inverse(naming):
    names = NAMINGS[naming]
    for path in names.layer_modules:
        leaf = "scale" if path.endswith("norm") else "kernel"
        slot = Slot(f"layers/{path}/{leaf}", 3)
        assert find_slot(tensor_name(slot, naming), naming) == slot
    for path in names.top_modules:
        leaf = {"norm": "bias", "lm_head": "kernel"}.get(path, "embedding")
        assert find_slot(tensor_name(Slot(f"{path}/{leaf}", None), naming), naming).path == (
            f"{path}/{leaf}"
        )


def rename(case, folder, change, **more):
    """Writes a case with other names of its tensors, and more tensors."""
    write_folder(case, folder)
    tensors, _ = golden_file(case)
    tensors = {change(k): v for k, v in tensors.items() if not k.startswith("golden.")}
    safetensors.numpy.save_file(tensors | more, folder / "model.safetensors")
    return folder


def same_weights(a: Llama, b: Llama) -> bool:
    states = [dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (a, b)]
    assert states[0].keys() == states[1].keys()
    return all(
        np.array_equal(v.get_value(), states[1][k].get_value()) for k, v in states[0].items()
    )


@pytest.mark.parametrize(
    ("case", "change", "more"),
    [
        ("opt", lambda name: name.removeprefix("model."), ["lm_head.weight"]),
        (
            "gpt_neox",
            lambda name: name.replace("embed_out", "lm_head"),
            [f"gpt_neox.layers.0.attention.{b}" for b in ("bias", "rotary_emb.inv_freq")],
        ),
        (
            "gemma3",
            lambda name: f"language_model.{name}",
            ["vision_tower.embed.weight", "multi_modal_projector.norm.weight"],
        ),
        (
            "gemma3",
            lambda name: name.replace("model.", "model.language_model."),
            ["model.vision_tower.embed.weight"],
        ),
    ],
)
def test_files_of_other_versions_are_the_same_model(tmp_path, case, change, more):
    write_folder(case, tmp_path / "plain")
    extra = {name: np.ones((48, 32), np.float32) for name in more}
    folder = rename(case, tmp_path / "other", change, **extra)
    if case == "gemma3":
        text = json.loads((folder / "config.json").read_text())
        outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": 1}
        (folder / "config.json").write_text(json.dumps(outer))
    assert same_weights(load(tmp_path / "plain"), load(folder))


GGUF_NAMES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def write_gguf(case: str, path):
    """A case as llama.cpp's converter writes it: names by its own table, norms of Gemma plus 1."""
    tensors, config = golden_file(case)
    arch, heads = GGUF_NAMES[case], config["num_attention_heads"]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim", config["hidden_size"] // heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    if case == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if case == "gemma3":
        writer.add_rope_freq_base(1e4)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_float32("gemma3.rope.freq_base_swa", 100.0)
        writer.add_array("gemma3.attention.sliding_window_pattern", [True, False, True])
    for name, value in tensors.items():
        if not name.startswith("golden."):
            shift = 1.0 if case.startswith("gemma") and name.endswith("norm.weight") else 0.0
            writer.add_tensor(names.get_name(name, (".weight",)), value + np.float32(shift))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", GGUF_NAMES)
def test_a_gguf_file_is_the_same_model(tmp_path, case):
    """But for scores, which in GGUF are always divided by the root of a head's size."""
    write_folder(case, tmp_path / "plain")
    plain, read = load(tmp_path / "plain"), load(write_gguf(case, tmp_path / "model.gguf"))
    scalar = 16.0 if case.startswith("gemma") else None
    expected = dataclasses.replace(plain.config, query_pre_attn_scalar=scalar)
    eps = dataclasses.replace(read.config, rms_norm_eps=expected.rms_norm_eps)
    assert eps == expected
    assert LlamaConfig.from_hf(to_hf(read.config)) == read.config
    a, b = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (plain, read))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path][...], b[path][...], rtol=0, atol=1e-6)


def test_a_gguf_file_with_longrope_is_refused():
    metadata = {"general.architecture": "phi3", "phi3.rope.scaling.attn_factor": 1.2}
    metadata |= {f"phi3.{key}": 8 for key in ("block_count", "vocab_size", "embedding_length")}
    metadata |= {"phi3.feed_forward_length": 8, "phi3.context_length": 8}
    metadata |= {"phi3.attention.head_count": 2, "phi3.attention.layer_norm_rms_epsilon": 1e-5}
    with pytest.raises(WeightsError, match="RoPE scaling 'longrope'"):
        LlamaConfig.from_gguf(metadata)


def load_packed(folder):
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    model = quantize_as(model, packed_linears(checkpoint))
    fill_model(model, checkpoint)
    return model


@pytest.mark.parametrize("case", ["phi3", "gpt_neox"])
def test_a_packed_folder_of_split_projections(tmp_path, case):
    """Each projection has its own scales, and the folder computes what they decode to."""
    ids, logits = write_folder(case, tmp_path / "model")
    out = quantize_checkpoint(tmp_path / "model", tmp_path / "packed", block_size=32)
    model = load_packed(out)
    assert set(packed_linears(open_checkpoint(out))) >= {
        f"layers/self_attn/{name}_proj" for name in "qkvo"
    }
    error = np.abs(model(jnp.asarray(ids)) - logits)
    assert 0.01 < error.max() < 2.5


@pytest.mark.parametrize("case", ["phi3", "gpt_neox"])
def test_bitsandbytes_has_no_place_for_split_projections(tmp_path, case):
    write_folder(case, tmp_path / "model")
    with pytest.raises(ConfigError, match="several projections of this family.*format qlora_jax"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", format="bitsandbytes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["gemma2", "opt"])
def test_a_bitsandbytes_folder_has_the_familys_own_names(tmp_path, case):
    ids, _ = write_folder(case, tmp_path / "model")
    out = quantize_checkpoint(
        tmp_path / "model", tmp_path / "bnb", format="bitsandbytes", block_size=32
    )
    source, written = open_checkpoint(tmp_path / "model"), open_checkpoint(out)
    assert set(source.names()) == set(written.names())
    ours = quantize_checkpoint(tmp_path / "model", tmp_path / "ours", block_size=32)
    ids = jnp.asarray(ids)
    np.testing.assert_array_equal(load_packed(out)(ids), load_packed(ours)(ids))


def test_4_bit_weights_of_several_projections_are_refused(tmp_path):
    write_folder("phi3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors = {name: np.zeros((8, 1), np.uint8)}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.zeros(4, np.uint8)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="several projections in one 4-bit tensor.*16-bit model"):
        open_checkpoint(tmp_path)
