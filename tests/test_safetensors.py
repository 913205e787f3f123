"""Safetensors folders: values, shards, and every way a folder can be wrong; fitting a model."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.errors import WeightsError
from qlora_jax.weights import Slot, open_checkpoint
from qlora_jax.weights.files import refuse_pickle
from qlora_jax.weights.matching import match_tensors
from qlora_jax.weights.names import find_slot, is_ignored, tensor_name
from qlora_jax.weights.safetensors import SafetensorsCheckpoint

RNG = np.random.default_rng(0)
TENSORS = {
    "model.embed_tokens.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    "model.layers.0.mlp.up_proj.weight": RNG.normal(size=(8, 4)).astype(ml_dtypes.bfloat16),
    "model.layers.1.mlp.up_proj.weight": RNG.normal(size=(8, 4)).astype(np.float16),
    "model.norm.weight": np.ones(4, np.float64),
    "lm_head.weight": RNG.normal(size=(6, 4)).astype(np.float32),
}


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for i, name in enumerate(TENSORS):
        file = f"model-{i + 1:05}-of-{len(TENSORS):05}.safetensors"
        safetensors.numpy.save_file({name: TENSORS[name]}, tmp_path / file)
        weight_map[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_come_back_bit_for_bit(layout, request):
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    assert checkpoint.config == {"model_type": "llama"}
    assert set(checkpoint.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert checkpoint.shape(name) == read.shape == tensor.shape
        assert checkpoint.dtype(name) == read.dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes()
        assert read.ctypes.data % 64 == 0 and read.flags.owndata is False


def test_missing_shards_are_listed_at_once(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    (sharded / "model-00004-of-00005.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks 2 of 5 shards: model-00002.*model-00004"):
        open_checkpoint(sharded)


def test_a_shard_without_its_tensors_is_named(sharded):
    (sharded / "model-00002-of-00005.safetensors").write_bytes(
        (sharded / "model-00001-of-00005.safetensors").read_bytes()
    )
    with pytest.raises(WeightsError, match="lacks 1 tensors.*layers.0.mlp.up_proj.weight"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "index, message",
    [
        ('{"weight_map": {"a": "../../etc/passwd"}}', "'../../etc/passwd'; expected is the name"),
        ('{"weight_map": {"a": 3}}', "'a' is in 3"),
        ('{"weight_map": []}', "no 'weight_map'"),
        ("{}", "no 'weight_map'"),
        ("{", "is not valid JSON"),
        ("[]", "holds list, not a JSON object"),
    ],
)
def test_a_damaged_index(sharded, index, message):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(sharded)


def test_every_truncation_is_a_weights_error(single):
    file = single / "model.safetensors"
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            open_checkpoint(single)


def test_random_damage_of_the_header_never_ends_in_another_error(single):
    file = single / "model.safetensors"
    data = file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(data)
        for position in rng.integers(0, header, 2):
            damaged[position] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            open_checkpoint(single)
        except WeightsError:
            refused += 1
    assert refused > 500


def with_header(header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(64)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (with_header([]), "cannot be read"),
        (with_header(b"{" * 5000), "cannot be read"),
        (with_header(b"\xff\xfe{}"), "cannot be read"),
        (with_header({"a": 3}), "cannot be read"),
        (with_header({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}), "dtype Q9"),
        (with_header({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}), "1 bytes for"),
        (with_header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}}), "numbers"),
        (with_header({"a": {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]}}), "cut off"),
    ],
)
def test_headers_that_lie(single, content, message):
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(single)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"neither model.safetensors nor .*it has config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(WeightsError, match="give one of them: x.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match="pytorch_model.bin is a pickle"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config.json \(the model's configuration\) is missing"):
        open_checkpoint(tmp_path)


def test_a_quantized_checkpoint_is_refused(single):
    (single / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(WeightsError, match="quantized already .quant_method 'gptq'"):
        open_checkpoint(single)


def test_a_part_of_a_folder_is_answered_with_the_folder(single):
    with pytest.raises(WeightsError, match=f"Give the folder {single},"):
        open_checkpoint(single / "model.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PT", ".pkl"])
def test_pickle_suffixes_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(WeightsError, match="is a pickle file .by its suffix.*safetensors or GGUF"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_bytes_are_refused_under_any_name(tmp_path, name, protocol):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"weights": [1.5] * 99}, protocol))
    with pytest.raises(WeightsError, match="is a pickle file .by its first bytes"):
        refuse_pickle(path)
    path.write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(WeightsError, match="zip archive, as torch.save"):
        refuse_pickle(path)


def test_pickle_bytes_inside_a_folder(single):
    (single / "model.safetensors").write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(WeightsError, match="by its first bytes"):
        open_checkpoint(single)


def test_a_header_length_that_looks_like_a_pickle_is_read(single):
    # 0x0280 bytes of header begin with 80 02, as a pickle of protocol 2 does.
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    content = struct.pack("<Q", 0x280) + header.ljust(0x280).encode() + b"\x07"
    (single / "model.safetensors").write_bytes(content)
    assert open_checkpoint(single).read("a").tolist() == [7]


def test_a_file_that_shrinks_after_opening_is_named(single):
    checkpoint = SafetensorsCheckpoint(single)
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(WeightsError, match="model.safetensors ends at byte"):
        for name in checkpoint.names():
            checkpoint.read(name)


NAMES = [
    (
        "layers/self_attn/q_proj/kernel",
        4,
        "model.layers.4.self_attn.q_proj.weight",
        "attn_q.weight",
    ),
    ("layers/self_attn/k_proj/bias", 4, "model.layers.4.self_attn.k_proj.bias", "attn_k.bias"),
    (
        "layers/self_attn/v_proj/kernel",
        4,
        "model.layers.4.self_attn.v_proj.weight",
        "attn_v.weight",
    ),
    (
        *("layers/self_attn/o_proj/kernel", 4),
        *("model.layers.4.self_attn.o_proj.weight", "attn_output.weight"),
    ),
    (
        *("layers/self_attn/q_norm/scale", 4),
        *("model.layers.4.self_attn.q_norm.weight", "attn_q_norm.weight"),
    ),
    ("layers/mlp/gate_proj/kernel", 4, "model.layers.4.mlp.gate_proj.weight", "ffn_gate.weight"),
    ("layers/mlp/down_proj/kernel", 4, "model.layers.4.mlp.down_proj.weight", "ffn_down.weight"),
    (
        "layers/input_layernorm/scale",
        4,
        "model.layers.4.input_layernorm.weight",
        "attn_norm.weight",
    ),
    (
        *("layers/post_attention_layernorm/scale", 4),
        *("model.layers.4.post_attention_layernorm.weight", "ffn_norm.weight"),
    ),
    ("embed_tokens/embedding", None, "model.embed_tokens.weight", "token_embd.weight"),
    ("norm/scale", None, "model.norm.weight", "output_norm.weight"),
    ("lm_head/kernel", None, "lm_head.weight", "output.weight"),
]


@pytest.mark.parametrize("path, layer, hf, gguf", NAMES)
def test_names_both_ways(path, layer, hf, gguf):
    slot = Slot(path, layer)
    gguf = gguf if layer is None else f"blk.{layer}.{gguf}"
    for name, style in ((hf, "hf"), (gguf, "gguf")):
        assert find_slot(name, style) == slot
        assert tensor_name(slot, style) == name


@pytest.mark.parametrize(
    "name", ["model.layers.x.mlp.up_proj.weight", "a", "model.layers.1.weight"]
)
def test_names_that_no_llama_has(name):
    assert find_slot(name, "hf") is None and not is_ignored(name, "hf")


def test_rotary_frequencies_are_ignored():
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq", "hf")
    assert is_ignored("rope_freqs.weight", "gguf")


WANTED = {
    Slot("embed_tokens/embedding", None): (6, 4),
    Slot("norm/scale", None): (4,),
    Slot("layers/mlp/up_proj/kernel", 0): (8, 4),
    Slot("layers/mlp/up_proj/kernel", 1): (8, 4),
}


def test_a_tied_head_may_be_there(single):
    plan = match_tensors(WANTED, open_checkpoint(single))
    assert set(plan.values()) == set(WANTED) and "lm_head.weight" not in plan


def test_all_that_does_not_fit_is_listed_at_once(single):
    tensors = TENSORS | {
        "model.layers.2.mlp.up_proj.weight": np.zeros((8, 4), np.float32),
        "model.layers.3.mlp.up_proj.weight": np.zeros((8, 4), np.float32),
        "vision.weight": np.zeros(1, np.float32),
        "model.norm.weight": np.zeros(5, np.float32),
        "model.embed_tokens.weight": np.zeros((6, 4), np.int8),
    }
    safetensors.numpy.save_file(tensors, single / "model.safetensors")
    wanted = WANTED | {
        Slot("layers/mlp/down_proj/kernel", 0): (4, 8),
        Slot("layers/mlp/down_proj/kernel", 1): (4, 8),
    }
    with pytest.raises(WeightsError) as caught:
        match_tensors(wanted, open_checkpoint(single))
    lines = str(caught.value).splitlines()
    assert "2 tensors are missing, 3 are not expected and 2 do not fit" in lines[0]
    assert lines[1:-1] == [
        "  missing: model.layers.{0-1}.mlp.down_proj.weight",
        "  not expected: model.layers.{2-3}.mlp.up_proj.weight",
        "  not expected: vision.weight",
        "  does not fit: model.embed_tokens.weight is int8, must be one of bfloat16, float16, "
        "float32, float64",
        "  does not fit: model.norm.weight is [5], must be [4]",
    ]
