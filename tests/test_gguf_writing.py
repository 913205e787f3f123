"""GGUF export: tensors, rows, metadata and tokenizers, all read back."""

import array
import dataclasses
import json

import adapted_models
import gguf
import llama_models
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from qlora_jax.data.gguf_metadata import tokenizer_metadata
from qlora_jax.data.gguf_tokenizer import _LLAMA3_SPLIT, build_gguf_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.loading import load_model, read_config
from qlora_jax.merged_files import write_gguf_file
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.models.gguf_config import rope_factors, to_gguf
from qlora_jax.models.rope import RopeScaling, inverse_frequencies
from qlora_jax.text_array import TextArray
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.gguf import GGUFCheckpoint, permute_rows, unpermute_rows
from qlora_jax.weights.gguf_writing import FILE_TYPES, tensor_type, write_gguf

GOLDEN = json.loads((llama_models.GOLDEN / "tokenizer.json").read_text())


def decoded(values, kind):
    """What `gguf`'s own functions make of a tensor."""
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the merged checkpoint and its file, by family and dtype."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def export(case, dtype):
        if case not in made:
            model, base = adapted_models.adapted(folder, case)
            made[case] = MergedCheckpoint(model, open_checkpoint(base)), Tokenizer.from_file(base)
        merged, tokenizer = made[case]
        path = folder / f"{case}-{dtype}.gguf"
        write_gguf_file(merged, path, tokenizer, dtype=dtype)
        return merged, path

    return export


@pytest.mark.parametrize("dtype", FILE_TYPES)
def test_our_reader_gives_back_the_tensors(exported, dtype):
    merged, path = exported("llama2", dtype)
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.config["general.file_type"] == FILE_TYPES[dtype]
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    names |= {f"model.layers.1.mlp.{p}_proj": f"blk.1.ffn_{p}" for p in ("up", "down")}
    names |= {f"model.layers.0.self_attn.{p}_proj": f"blk.0.attn_{p}" for p in "qkv"}
    for theirs, ours in names.items():
        value = merged.read(f"{theirs}.weight")
        kind = tensor_type(f"{ours}.weight", value.shape, dtype)
        assert checkpoint.type_name(f"{ours}.weight") == kind.name
        heads = 4 if ours.endswith(("attn_q", "attn_k")) else 0
        expected = permute_rows(value, heads) if heads else value
        expected = decoded(expected, kind).reshape(value.shape)
        expected = unpermute_rows(expected, heads) if heads else expected
        np.testing.assert_array_equal(checkpoint.read(f"{ours}.weight"), expected)
    exact = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(dtype)
    if exact:  # to the bit, said without the package
        value = merged.read("model.layers.0.self_attn.q_proj.weight")
        read = checkpoint.read("blk.0.attn_q.weight")
        np.testing.assert_array_equal(read, value.astype(exact).astype(np.float32))


def test_types_are_those_of_llama_cpp():
    types = {
        ("output_norm.weight", (32,), "q4_0"): "F32",
        ("blk.0.attn_q.weight", (32, 64), "q4_0"): "Q4_0",
        ("blk.0.attn_q.weight", (32, 48), "q4_0"): "F16",
        ("token_embd.weight", (32, 64), "q4_1"): "Q8_0",
        ("output.weight", (32, 64), "bf16"): "BF16",
    }
    for arguments, kind in types.items():
        assert tensor_type(*arguments).name == kind


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_a_file_is_the_merged_model(exported, case):
    merged, path = exported(case, "f32")
    config = read_config(open_checkpoint(merged.path))
    read = read_config(open_checkpoint(path))
    assert read.qk_norm == config.qk_norm and read.qkv_bias == config.qkv_bias
    ids = np.arange(12)[None] % 20
    loaded, tokenizer = load_model(path, quant_type=None)
    expected = [merged.read(name) for name in merged.names()]
    tensors = dict(zip(merged.names(), expected, strict=True))
    np.testing.assert_allclose(loaded(ids), llama_models.fill(config, tensors)(ids), atol=5e-5)
    own = Tokenizer.from_file(merged.path)
    text = "ab a\n12, abc. de f<|im_end|>"
    assert tokenizer.encode(text) == own.encode(text) and len(own.encode(text)) > 8
    assert tokenizer.eos_token_ids == own.eos_token_ids
    assert tokenizer.chat_template == own.chat_template


def test_the_package_reads_the_file(exported):
    _, path = exported("llama2", "q8_0")
    reader = gguf.GGUFReader(path)
    assert {"blk.1.ffn_gate.weight", "output.weight"} <= {t.name for t in reader.tensors}
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == 64
    assert tokens[:2] == adapted_models.TOKENS[:2] and types[:3] == [3, 3, 1]
    assert tokens[-1] == "[PAD63]" and types[-1] == 5
    assert reader.fields["llama.rope.dimension_count"].contents() == 8


@pytest.mark.parametrize("case", llama_models.TINY_CASES)
def test_the_shape_survives_or_is_refused(case):
    config = llama_models.golden_tiny(case)[0].config
    if case in ("llama_biased", "qwen2_windowed"):
        with pytest.raises(WeightsError, match="qkv_bias|full_attention_layers"):
            to_gguf(config)
        return
    metadata = to_gguf(config)
    expected = "llama" if case == "mistral" else case.removesuffix("2").removesuffix("3")
    assert metadata["general.architecture"] == (case if "qwen" in case else expected)


def test_rope_factors_turn_the_same_angles():
    config = llama_models.tiny_config(rope_scaling=RopeScaling("llama3", factor=8.0))
    config = dataclasses.replace(config, head_dim=16, rope_theta=500000.0)
    scaled = RopeScaling("factors", factors=tuple(map(float, rope_factors(config))))
    np.testing.assert_allclose(
        inverse_frequencies(16, 500000.0, scaled),
        inverse_frequencies(16, 500000.0, config.rope_scaling),
        rtol=1e-6,
    )
    assert rope_factors(config).max() == 8.0


def test_permuting_undoes_unpermuting():
    rows = np.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(unpermute_rows(permute_rows(rows, 3), 3), rows)
    np.testing.assert_array_equal(permute_rows(unpermute_rows(rows, 3), 3), rows)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    tensors = {"output.weight": (2, 32)}
    metadata = {"general.architecture": "llama"}
    with pytest.raises(WeightsError, match="output.weight holds 70000, which is infinite"):
        write_gguf(
            tmp_path / "x", metadata, tensors, lambda _: np.full((2, 32), 7e4, "f4"), dtype="f16"
        )


def test_smollm2s_tokenizer_survives():
    metadata = GGUFCheckpoint(llama_models.smollm2_path()).config
    tokenizer = Tokenizer.from_gguf(metadata)
    written = tokenizer_metadata(tokenizer, len(metadata["tokenizer.ggml.tokens"]))
    for key in ("tokens", "token_type", "merges", "pre", "model", "bos_token_id", "eos_token_id"):
        before = metadata[f"tokenizer.ggml.{key}"]
        before = list(before) if isinstance(before, TextArray | array.array) else before
        assert written[f"tokenizer.ggml.{key}"] == before, key
    assert written["tokenizer.chat_template"] == metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_the_rule_of_a_byte_level_tokenizer_is_found(rule):
    metadata = dict(GGUFCheckpoint(llama_models.smollm2_path()).config)
    metadata["tokenizer.ggml.pre"] = rule
    tokenizer = Tokenizer.from_gguf(metadata)
    written = tokenizer_metadata(tokenizer, len(metadata["tokenizer.ggml.tokens"]))
    read = Tokenizer.from_gguf(written)
    for text in GOLDEN["strings"][:200]:
        assert read.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused():
    metadata = GGUFCheckpoint(llama_models.smollm2_path()).config
    backend = build_gguf_tokenizer(metadata)
    rule = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}{1,2}")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(rule), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(WeightsError, match="GGUF has no name for the way"):
        tokenizer_metadata(Tokenizer(backend), 49152)
    small = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 3}, merges=[])))
    with pytest.raises(WeightsError, match=r"token 3 \('a'\) has no row"):
        tokenizer_metadata(small, 2)


def test_a_sentencepiece_tokenizer_survives():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "a", "b", "c", "1", "2", "▁a", "ab", "▁ab", "abc"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for prefix in (True, False):
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
        tokenizer = Tokenizer.from_gguf(metadata)
        written = tokenizer_metadata(tokenizer, len(pieces) + len(words))
        assert written["tokenizer.ggml.add_space_prefix"] == prefix
        assert written["tokenizer.ggml.token_type"] == metadata["tokenizer.ggml.token_type"]
        read = Tokenizer.from_gguf(written)
        for text in ("abc ab", " a  abc1é", "cab\n2</s>"):
            assert read.encode(text) == tokenizer.encode(text)
        assert read.add_bos_token and read.eos_token_ids == (2,)
