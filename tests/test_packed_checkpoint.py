"""Packed checkpoints of both kinds: the same weights to the bit, the files, refusals by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from synthetic_checkpoint import (
    CONFIG,
    write_small_checkpoint,
    write_tokenizer,
)

from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.loading import base_fingerprint, load_model
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.hf_config import to_hf
from qlora_jax.models.rope import RopeScaling
from qlora_jax.nnx_linear import QuantizedParam
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.checksums import CHECKSUMS
from qlora_jax.weights.safetensors import SafetensorsCheckpoint

GOLDEN = llama_models.GOLDEN
TOKENS = jnp.array([[1, 5, 9, 33, 2, 60, 17, 8]])  # of golden/make_bitsandbytes_folders.py


@pytest.fixture
def model(tmp_path):
    return write_small_checkpoint(tmp_path / "model")


@pytest.fixture(params=["bnb_nf4", "bnb_fp4", "bnb_dynamic"])
def golden(request, tmp_path):
    """A checkpoint that transformers and bitsandbytes saved."""
    folder = shutil.copytree(GOLDEN / request.param, tmp_path / "golden")
    write_tokenizer(folder)
    return folder


def tensors_of(folder):
    """Every tensor of the files: dtype, shape and bytes."""
    files = SafetensorsCheckpoint(folder)
    return {
        name: (str(files.dtype(name)), files.shape(name), files.read(name).tobytes())
        for name in files.names()
    }


def assert_same_model(a, b):
    state_a, state_b = nnx.state(a), nnx.state(b)
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
@pytest.mark.parametrize(
    ("options", "file_bytes"),
    [
        ({}, 5_000_000_000),
        (dict(quant_type="fp4", double_quant=False, block_size=32, where=".*/.*_proj"), 5_000),
    ],
)
def test_a_packed_model_is_the_model_to_the_bit(model, tmp_path, format, options, file_bytes):
    out = tmp_path / "out"
    quantize_checkpoint(model, out, format=format, file_bytes=file_bytes, **options)
    count = len(list(out.glob("*.safetensors")))
    assert count == 1 if file_bytes > 1e9 else count > 3
    for dtype in (jnp.float32, jnp.float16):
        expected, tokenizer = load_model(model, dtype=dtype, **options)
        found, found_tokenizer = load_model(out, dtype=dtype)
        assert_same_model(found, expected)
        assert found_tokenizer.fingerprint == tokenizer.fingerprint
        assert found_tokenizer.eos_token_ids == (2, 5)
    fingerprints = {
        base_fingerprint(load_model(out, dtype=d)[0]) for d in (jnp.float32, "bfloat16")
    }
    fingerprints.add(base_fingerprint(load_model(model, **options)[0]))
    if format == "qlora_jax":
        fingerprints.add(open_checkpoint(out).fingerprint)
    assert len(fingerprints) == 1


def test_int4_and_layers_left_in_16_bits(model, tmp_path):
    options = dict(quant_type="int4", where=r"layers/mlp/.*")
    out = quantize_checkpoint(model, tmp_path / "out", **options)
    assert_same_model(load_model(out)[0], load_model(model, **options)[0])
    with pytest.raises(ConfigError, match="bitsandbytes has no int4 .layers/mlp/down_proj"):
        quantize_checkpoint(out, tmp_path / "bnb", format="bitsandbytes")


def test_where_reaches_transformers_as_skipped_modules(model, tmp_path):
    out = quantize_checkpoint(model, tmp_path / "a", format="bitsandbytes", where="layers/mlp/.*")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    skipped = ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert config["llm_int8_skip_modules"] == skipped
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    out = quantize_checkpoint(model, tmp_path / "b", format="bitsandbytes", where=".*_proj|lm_head")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == []
    assert isinstance(load_model(out)[0].lm_head.kernel, QuantizedParam)


def test_bitsandbytes_is_read_as_transformers_computes_it(golden):
    model, _ = load_model(golden)
    np.testing.assert_allclose(model(TOKENS), np.load(golden / "logits.npy"), atol=2e-5)
    if "fp4" in json.dumps(json.loads((golden / "config.json").read_text())):
        assert isinstance(model.layers.self_attn.o_proj, nnx.Linear)


@pytest.mark.parametrize("via_ours", [False, True])
def test_bitsandbytes_to_ours_and_back_is_the_file_to_the_byte(golden, tmp_path, via_ours):
    source = quantize_checkpoint(golden, tmp_path / "ours") if via_ours else golden
    back = quantize_checkpoint(source, tmp_path / "back", format="bitsandbytes")
    assert tensors_of(back) == tensors_of(golden)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (back, golden))
    assert ours == theirs
    models = [load_model(folder)[0] for folder in (golden, source, back)]
    assert len({base_fingerprint(model) for model in models}) == 1


def test_what_is_in_4_bits_is_not_quantized_again(golden, tmp_path):
    with pytest.raises(ConfigError, match="is in 4 bits already .*block_size=32 was asked for"):
        quantize_checkpoint(golden, tmp_path / "out", block_size=32)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is in 4 bits .* cannot be loaded in 16 or 32"):
        load_model(golden, quant_type=None)


def test_a_mapped_array_is_the_file_itself(model, tmp_path):
    out = quantize_checkpoint(model, tmp_path / "out")
    loaded, _ = load_model(out)
    mapped = [line.split()[0] for line in open("/proc/self/maps") if str(out) in line]
    ranges = [[int(end, 16) for end in one.split("-")] for one in mapped]
    codes = loaded.layers.mlp.up_proj.kernel.get_value().codes.unsafe_buffer_pointer()
    assert any(start <= codes < end for start, end in ranges)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder(tmp_path):
    path = llama_models.smollm2_path()
    expected, tokenizer = load_model(path)
    for format in ("qlora_jax", "bitsandbytes"):
        out = quantize_checkpoint(path, tmp_path / format, format=format)
        found, found_tokenizer = load_model(out)
        assert_same_model(found, expected)
        assert found.config == expected.config
        assert found_tokenizer.fingerprint == tokenizer.fingerprint
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "values",
    [
        dict(rope_scaling=RopeScaling("linear", factor=2.0)),
        dict(rope_scaling=RopeScaling("factors", factors=(1.0, 2.0))),
        dict(sliding_window=16),
        dict(model_type="qwen2", qkv_bias=True, sliding_window=16, full_attention_layers=(0,)),
        dict(model_type="qwen3", qk_norm=True),
    ],
)
def test_shapes_survive_config_json(values):
    config = llama_models.tiny_config(**values)
    read = LlamaConfig.from_hf(json.loads(json.dumps(to_hf(config))))
    if config.model_type == "llama" and config.sliding_window:
        assert read.model_type == "mistral"  # which GGUF files call llama
        read = llama_models.tiny_config(**{**vars(read), "model_type": "llama"})
    assert read == config


def change(folder, changes):
    """Replaces tensors in the one file that holds each; None removes one."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        hit = {name: value for name, value in changes.items() if name in tensors}
        tensors = {k: v for k, v in (tensors | hit).items() if v is not None}
        safetensors.numpy.save_file(tensors, file)


def change_state(folder, name, **changes):
    (folder / CHECKSUMS).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        for key in tensors:
            if key.startswith(f"{name}.quant_state"):
                state = json.loads(tensors[key].tobytes()) | changes
                tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        safetensors.numpy.save_file(tensors, file)


@pytest.fixture
def nf4(model, tmp_path):
    """A tiny checkpoint of bitsandbytes' kind in one file."""
    return quantize_checkpoint(model, tmp_path / "nf4", format="bitsandbytes", block_size=32)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}.absmax": np.zeros(7, np.uint8)}, r"absmax is uint8 \[7\], must be uint8 \[48\]"),
        ({UP: np.zeros((3, 1), np.uint8)}, r"3 bytes of codes, must be 768 for \[48, 32\]"),
        ({f"{UP}.quant_map": np.zeros(16, np.float32)}, "quant_map is not the codebook of nf4"),
        ({f"{UP}.nested_absmax": np.ones(2, np.float32)}, r"nested_absmax is float32 \[2\]"),
        ({f"{UP}.absmax": np.zeros(48, np.float32)}, r"absmax is float32 \[48\], must be uint8"),
        ({f"{UP}.nested_absmax": np.full(1, np.nan, np.float32)}, "scales that are NaN or infini"),
    ],
)
def test_a_part_that_does_not_fit_is_named(nf4, changes, message):
    change(nf4, changes)
    with pytest.raises(WeightsError, match=f"{UP}.*{message}"):
        load_model(nf4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [48, 64]}, "768 bytes of codes, must be 1536"),
        ({"shape": "no"}, "shape is"),
        ({"blocksize": 48}, "blocksize is 48, must be one of"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4', the name says 'nf4'"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
        ({"dtype": "complex64"}, "lacks 'complex64'"),
    ],
)
def test_a_state_that_does_not_fit_is_named(nf4, changes, message):
    change_state(nf4, UP, **changes)
    with pytest.raises(WeightsError, match=f"{UP}.*{message}"):
        load_model(nf4)


def test_a_missing_part_and_a_weight_without_state(nf4, tmp_path):
    other = shutil.copytree(nf4, tmp_path / "other")
    change(nf4, {f"{UP}.quant_map": None})
    # `change` leaves out what is None only where the name is there
    with pytest.raises(WeightsError, match="quant_map is missing"):
        load_model(nf4)
    change(other, {f"{UP}.quant_state.bitsandbytes__nf4": None})
    with pytest.raises(WeightsError, match=f"not expected: .*{UP}|{UP}.*not expected"):
        load_model(other)


def test_another_nested_map_is_decoded_to_the_same_scales(nf4):
    """Older versions' maps may differ in the last bit; the file's own one holds."""
    before = open_checkpoint(nf4).read(UP)
    table = np.linspace(-1, 1, 256).astype(np.float32)
    change(nf4, {f"{UP}.nested_quant_map": table})
    after = open_checkpoint(nf4).read(UP)
    expected = table[before.absmax] * before.nested_absmax + before.offset
    assert after.nested_absmax is None and after.offset is None
    np.testing.assert_array_equal(after.absmax, expected)
    np.testing.assert_array_equal(after.codes, before.codes)


def test_other_nested_blocks_are_decoded_to_the_same_scales(nf4):
    before = open_checkpoint(nf4).read(UP)
    assert before.absmax.size == 48
    change(nf4, {f"{UP}.nested_absmax": np.float32([1, 2, 3])})
    change_state(nf4, UP, nested_blocksize=16)
    after = open_checkpoint(nf4).read(UP)
    table = safetensors.numpy.load_file(nf4 / "model.safetensors")[f"{UP}.nested_quant_map"]
    expected = table[before.absmax] * np.repeat(np.float32([1, 2, 3]), 16) + before.offset
    np.testing.assert_array_equal(after.absmax, expected)


def mix(a, b, choose, out):
    """A checkpoint whose tensors are those of `b` where `choose(name)`, else those of `a`."""
    shutil.copytree(a, out)
    (out / CHECKSUMS).unlink(missing_ok=True)
    one, two = (safetensors.numpy.load_file(f / "model.safetensors") for f in (a, b))
    mixed = {k: v for k, v in one.items() if not choose(k)}
    mixed |= {k: v for k, v in two.items() if choose(k)}
    safetensors.numpy.save_file(mixed, out / "model.safetensors")
    return out


def test_projections_may_differ(model, nf4, tmp_path):
    other = quantize_checkpoint(model, tmp_path / "o", format="bitsandbytes", quant_type="fp4")
    mixed = mix(nf4, other, lambda name: "mlp" in name, tmp_path / "mixed")
    loaded, _ = load_model(mixed)
    q, up = loaded.layers.self_attn.q_proj.kernel, loaded.layers.mlp.up_proj.kernel
    assert (q.get_value().quant_type, q.get_value().block_size) == ("nf4", 32)
    assert (up.get_value().quant_type, up.get_value().block_size) == ("fp4", 64)


def test_a_stacked_folder_that_is_damaged(model, tmp_path):
    """One without hashes, where all that can be compared is what the files say of each other."""
    out = quantize_checkpoint(model, tmp_path / "out", file_bytes=20_000)
    (out / CHECKSUMS).unlink()
    index = json.loads((out / "qlora_jax.json").read_text())
    file = sorted(out.glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    with pytest.raises(WeightsError, match=f"{file.name} is damaged: 1 bytes at its end"):
        load_model(out)
    file.write_bytes(content)
    path = "layers/mlp/up_proj/kernel"
    for wrong, message in [
        ({"version": 3}, "has version 3, this is made for at most 2"),
        ({"kernels": index["kernels"] | {path: {}}}, "is missing"),
        ({"kernels": {k: v for k, v in index["kernels"].items() if k != path}}, f"{path}.* only"),
        (
            {"kernels": index["kernels"] | {path: index["kernels"][path] | {"block_size": 32}}},
            f"{path}.absmax is .* must be",
        ),
    ]:
        (out / "qlora_jax.json").write_text(json.dumps(index | wrong))
        with pytest.raises(WeightsError, match=message):
            load_model(out)
    (out / "qlora_jax.json").unlink()
    with pytest.raises(WeightsError, match="qlora_jax.json .* is missing"):
        load_model(out)


def test_8_bit_models_are_refused(model):
    config = CONFIG | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="quantized already in 8 bits .quant_method 'bitsandby"):
        load_model(model)
