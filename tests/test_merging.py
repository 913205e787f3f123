"""Merged checkpoints: each tensor, the files made of them, and the model streamed from them."""

import json

import adapted_models
import jax
import jax.numpy as jnp
import llama_models
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.export import _packed
from qlora_jax.flax_nnx import merge_model, without_adapters
from qlora_jax.loading import base_fingerprint, load_model, read_tokenizer
from qlora_jax.merged_files import whole_or_nothing, write_4bit_folder, write_hf_folder
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.quantized import QuantizedTensor, dequantize, quantize
from qlora_jax.streaming import StreamedModel
from qlora_jax.subtraction import set_subtracted
from qlora_jax.vocabulary import quantize_vocabulary
from qlora_jax.weights import Slot, open_checkpoint
from qlora_jax.weights.safetensors_header import read_header

IDS = np.random.default_rng(1).integers(0, 20, (2, 20))
BATCH = {
    "tokens": IDS,
    "positions": np.r_[np.arange(12), np.arange(8)] + np.zeros((2, 1), np.int64),
    "segment_ids": np.r_[np.ones(12, int), np.full(8, 2)] + np.zeros((2, 1), np.int64),
}


@pytest.fixture
def llama2(tmp_path):
    model, base = adapted_models.adapted(tmp_path)
    return model, open_checkpoint(base)


def delta_of(linear, layer):
    """In NumPy, and with rsLoRA's scaling written out."""
    a, b = (np.asarray(matrix[layer], np.float64) for matrix in linear.adapter.values())
    return (a @ b).T * 6 / np.sqrt(2)


@pytest.mark.parametrize("original", [False, True])
def test_each_tensor_is_its_base_plus_the_delta(llama2, original):
    model, source = llama2
    merged = MergedCheckpoint(model, source, original=source if original else None)
    assert sorted(merged.names()) == sorted(source.names())
    for name in source.names():
        stored, value = source.read(name), merged.read(name)
        assert value.dtype == merged.dtype(name) == np.float32
        assert merged.shape(name) == value.shape == stored.shape
        if "_proj" not in name:
            np.testing.assert_array_equal(value, stored)
            continue
        slot = merged.slot(name)
        _, block, projection, _ = slot.path.split("/")
        linear = getattr(getattr(model.layers, block), projection)
        base = stored
        if not original:
            base = np.asarray(dequantize(quantize(jnp.asarray(stored), block_size=32)))
        np.testing.assert_allclose(value, base + delta_of(linear, slot.layer), atol=1e-6)
        assert np.abs(value - base).max() > 0.02


def test_the_original_weights_get_back_what_was_taken_out_of_them(llama2):
    model, source = llama2
    linear = model.layers.mlp.up_proj
    taken = {name: matrix * 0.5 + 0.03 for name, matrix in linear.adapter.items()}
    set_subtracted(model, {"layers/mlp/up_proj": taken})
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (np.asarray(matrix[1], np.float64) for matrix in taken.values())
    given_back = (a @ b).T * 6 / np.sqrt(2)
    stored, delta = source.read(name), delta_of(linear, 1)
    original = MergedCheckpoint(model, source, original=source).read(name)
    np.testing.assert_allclose(original, stored + delta - given_back, atol=1e-6)
    trained = dequantize(quantize(jnp.asarray(stored), block_size=32)) + delta
    np.testing.assert_allclose(MergedCheckpoint(model, source).read(name), trained, atol=1e-6)


def test_rounding_happens_once_and_is_checked(llama2):
    model, source = llama2
    exact = MergedCheckpoint(model, source)
    rounded = MergedCheckpoint(model, source, dtype=jnp.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(rounded.read(name), exact.read(name).astype(ml_dtypes.bfloat16))
    assert rounded.config["torch_dtype"] == "bfloat16" and "dtype" not in rounded.config
    up = model.layers.mlp.up_proj
    up.lora_b.set_value(up.lora_b.get_value().at[1].set(1e5))
    with pytest.raises(WeightsError, match=f"merged: {name} holds .* infinite in float16"):
        MergedCheckpoint(model, source, dtype=np.float16).read(name)


def test_a_vocabulary_in_8_bits_is_what_the_adapter_knows(llama2):
    model, source = llama2
    small = quantize_vocabulary(model)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    trained = MergedCheckpoint(small, source)
    for name in (table, head):
        error = np.abs(trained.read(name) - source.read(name)).max()
        assert 0 < error < np.abs(source.read(name)).max() / 200
    original = MergedCheckpoint(small, source, original=source)
    np.testing.assert_array_equal(original.read(table), source.read(table))


def test_what_cannot_be_merged_is_refused(llama2, tmp_path):
    model, source = llama2
    with pytest.raises(ConfigError, match="has no adapter"):
        MergedCheckpoint(without_adapters(model), source)
    folder = tmp_path / "nf4"
    tokenizer = Tokenizer.from_file(source.path)
    merged = MergedCheckpoint(model, source)
    write_4bit_folder(merged, folder, tokenizer, format="qlora_jax", packed=_packed(model))
    with pytest.raises(ConfigError, match="is in 4 bits, so it cannot be the original"):
        MergedCheckpoint(model, source, original=open_checkpoint(folder))


def test_the_base_of_an_adapted_model_shares_its_arrays(llama2):
    model, source = llama2
    base = without_adapters(model)
    assert not jax.tree.leaves(nnx.state(base, nnx.LoRAParam)) and model.layers.mlp.up_proj.rank
    plain, _ = load_model(source.path, block_size=32)
    np.testing.assert_array_equal(base(IDS), plain(IDS))
    codes = [m.layers.mlp.up_proj.kernel.get_value().codes for m in (model, base)]
    assert codes[0] is codes[1]


def test_the_base_keeps_what_was_taken_out_of_its_weights(llama2):
    model, _ = llama2
    taken = {name: 0.5 * matrix for name, matrix in model.layers.mlp.up_proj.adapter.items()}
    set_subtracted(model, {"layers/mlp/up_proj": taken})
    base = without_adapters(model)
    assert base.layers.mlp.down_proj.rank == 0
    for name, matrix in base.layers.mlp.up_proj.adapter.items():
        np.testing.assert_array_equal(matrix, taken[name])
    assert model.layers.mlp.up_proj.lora_a.get_value() is not taken["lora_a"]


@pytest.mark.parametrize("case", ["llama3", "qwen2_windowed", "gemma3", "opt"])
def test_a_streamed_model_is_the_model(tmp_path, case):
    model, base = adapted_models.adapted(tmp_path, case)
    streamed = StreamedModel(MergedCheckpoint(model, open_checkpoint(base)), jnp.float32)
    whole, _ = merge_model(model)
    expected = whole.hidden_states(**{**BATCH, "tokens": jnp.asarray(IDS)})
    hidden, again = streamed.hidden_states([BATCH, BATCH])
    np.testing.assert_array_equal(hidden, again)
    np.testing.assert_allclose(hidden, expected, atol=2e-5)
    np.testing.assert_allclose(streamed.model.head(hidden), whole.head(expected), atol=5e-5)


def test_a_merged_folder_is_the_adapted_model(tmp_path):
    model, base = adapted_models.adapted(tmp_path, "qwen2")
    out = tmp_path / "merged"
    tokenizer = Tokenizer.from_file(base)
    merged = MergedCheckpoint(model, open_checkpoint(base))
    seen = []
    write_hf_folder(merged, out, tokenizer, file_bytes=9_000, progress=lambda *x: seen.append(x))
    assert [done for done, _, _ in seen] == list(range(1, len(merged.names()) + 1))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(merged.names()) and len(set(index.values())) > 2
    loaded, again = load_model(out, quant_type=None)
    np.testing.assert_allclose(loaded(IDS), model(IDS), atol=5e-5)
    assert again.fingerprint == tokenizer.fingerprint
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["model_type"] == "qwen2"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("case", ["phi3", "gpt_neox"])
def test_projections_that_a_family_keeps_in_one_tensor_are_joined(tmp_path, case):
    model, base = adapted_models.adapted(tmp_path, case)
    merged = MergedCheckpoint(model, open_checkpoint(base))
    write_hf_folder(merged, tmp_path / "out", Tokenizer.from_file(base))
    names = [set(read_header(f / "model.safetensors")) for f in (base, tmp_path / "out")]
    assert names[0] == names[1] and any("qkv" in n or "query_key" in n for n in names[0])
    loaded, _ = load_model(tmp_path / "out", quant_type=None)
    np.testing.assert_allclose(loaded(IDS), model(IDS), atol=5e-5)


def test_the_chat_format_of_the_run_goes_along(llama2, tmp_path):
    model, source = llama2
    tokenizer = Tokenizer.from_file(source.path).with_chat_format("guanaco")
    write_hf_folder(MergedCheckpoint(model, source), tmp_path / "out", tokenizer)
    read = Tokenizer.from_file(tmp_path / "out")
    assert read.chat_template == tokenizer.chat_template != adapted_models.TEMPLATE
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["stop_strings"] == ["### Human:"]


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_requantized_folders_hold_the_merged_weights_in_the_same_format(tmp_path, format):
    model, base = adapted_models.adapted(tmp_path, "llama2")
    out = tmp_path / "merged"
    merged = MergedCheckpoint(model, open_checkpoint(base), dtype=jnp.bfloat16)
    tokenizer = Tokenizer.from_file(base)
    with whole_or_nothing(out) as partial:
        write_4bit_folder(merged, partial, tokenizer, format=format, packed=_packed(model))
    assert sorted(f.name for f in out.iterdir() if f.name.startswith(".")) == []
    loaded, _ = load_model(out)
    stack = loaded.layers.self_attn.k_proj.kernel.get_value()
    assert isinstance(stack, QuantizedTensor) and stack.block_size == 32
    weight = merged.read("model.layers.1.self_attn.k_proj.weight")
    expected = quantize(jnp.asarray(weight), block_size=32)
    layer = jax.tree.map(lambda leaf: leaf[1], stack)
    np.testing.assert_array_equal(layer.codes, expected.codes)
    np.testing.assert_array_equal(layer.absmax, expected.absmax)
    assert base_fingerprint(loaded) != base_fingerprint(model)


def test_only_original_weights_keep_a_small_change_in_4_bits(tmp_path):
    """A 4-bit weight lies on a code and is rounded back; others cross edges as often as is due."""
    base = adapted_models.write_base(tmp_path / "llama2", "llama2")
    source = open_checkpoint(base)
    model = adapted_models.adapt(load_model(base, block_size=32)[0], scale=0.03)

    def kept(original):
        """The part of the change that is left: the slope of what was stored over what was due."""
        merged = MergedCheckpoint(model, source, original=source if original else None)
        due, stored = [], []
        for name in source.names():
            if "_proj" in name:
                weight = jnp.asarray(source.read(name))
                in_4_bits = dequantize(quantize(weight, block_size=32))
                value = jnp.asarray(merged.read(name))
                due.append((value - (weight if original else in_4_bits)).ravel())
                again = dequantize(quantize(value, block_size=32))
                stored.append((again - in_4_bits).ravel())
        due, stored = np.concatenate(due), np.concatenate(stored)
        return float(due @ stored / (due @ due))

    assert abs(kept(original=True) - 1) < 0.25
    assert kept(original=False) < 0.5


def test_golden_logits_of_transformers(tmp_path):
    """golden/round_trip_export.py exported the same model, and transformers loaded that folder."""
    golden = json.loads((llama_models.GOLDEN / "export.json").read_text())
    for case, told in golden["tiny"].items():
        model, base = adapted_models.adapted(tmp_path, case)
        merged = MergedCheckpoint(model, open_checkpoint(base), dtype=jnp.bfloat16)
        out = tmp_path / f"{case}-merged"
        write_hf_folder(merged, out, Tokenizer.from_file(base))
        loaded, _ = load_model(out, quant_type=None)
        logits = np.asarray(loaded(np.array([told["ids"]])))[0]
        np.testing.assert_allclose(logits, told["logits"], atol=1e-3)


@pytest.mark.slow
def test_golden_loss_of_smollm2(tmp_path):
    """A whole model out of GGUF: tokenizer, shards and logits, as transformers has them."""
    golden = json.loads((llama_models.GOLDEN / "export.json").read_text())
    text = json.loads((llama_models.GOLDEN / "loading.json").read_text())
    source = open_checkpoint(llama_models.smollm2_path())
    model = adapted_models.adapt(load_model(source.path)[0], scale=0.01)
    merged = MergedCheckpoint(model, source, dtype=jnp.bfloat16)
    write_hf_folder(merged, tmp_path / "out", read_tokenizer(source), file_bytes=200_000_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    loaded, tokenizer = load_model(tmp_path / "out", quant_type=None)
    assert tokenizer.encode(text["text"]) == text["ids"]
    ids = jnp.array([text["ids"]])
    log_probs = jax.nn.log_softmax(loaded(ids)[0, :-1])
    loss = -jnp.take_along_axis(log_probs, ids[0, 1:, None], axis=1).mean()
    np.testing.assert_allclose(loss, golden["smollm2_loss"], atol=1e-3)


def test_nothing_half_written_stays(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), whole_or_nothing(out) as partial:
        partial.mkdir()
        (partial / "x").write_text("x")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    with whole_or_nothing(out) as partial:
        partial.write_text("whole")
    assert out.read_text() == "whole" and list(out.parent.iterdir()) == [out]
    with pytest.raises(WeightsError, match="is there already"), whole_or_nothing(out):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        with whole_or_nothing(tmp_path / "file" / "out"):
            pass


def test_a_full_disk_leaves_nothing(llama2, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    model, source = llama2
    with pytest.raises(WeightsError, match="No space left .* nothing was left there"):
        with whole_or_nothing(tmp_path / "out") as partial:
            merged = MergedCheckpoint(model, source)
            write_hf_folder(merged, partial, Tokenizer.from_file(source.path))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llama2"]


def test_slots_are_found_by_name(llama2):
    merged = MergedCheckpoint(*llama2)
    assert merged.slot("lm_head.weight") == Slot("lm_head/kernel", None)
