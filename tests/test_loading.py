"""Loading: values equal to quantizing one by one, refusals by name, and the peak of memory."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import llama_models
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from synthetic_checkpoint import CONFIG, hf_shapes, write_checkpoint
from test_gguf import permute_as_llama_cpp, write_gguf

from qlora_jax import conversion, loading
from qlora_jax.conversion import quantize_in_pieces
from qlora_jax.errors import UserError, WeightsError, run_main
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.loading import base_fingerprint, load_model
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.nnx_linear import QuantizedParam
from qlora_jax.quantized import QuantizedTensor, dequantize, quantize
from qlora_jax.weights import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A tiny bfloat16 model in several shards."""
    write_checkpoint(tmp_path, CONFIG, shard_bytes=8_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def rewrite(folder, changes):
    """Replaces tensors of a folder (None removes one); all go into a single file."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()} | changes
    for file in folder.glob("model*"):
        file.unlink()
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def layer_of(stack, index):
    return jax.tree.map(lambda leaf: leaf[index], stack)


PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("quant_type, double_quant", [("nf4", True), ("fp4", False)])
def test_each_layer_is_what_quantize_gives(folder, quant_type, double_quant):
    options = dict(quant_type=quant_type, block_size=32, double_quant=double_quant)
    model, _ = load_model(folder, **options)
    checkpoint = open_checkpoint(folder)
    for block, names in PROJECTIONS.items():
        for name in names:
            stack = getattr(getattr(model.layers, block), name).kernel.get_value()
            assert isinstance(stack, QuantizedTensor) and stack.leading_shape == (3,)
            for i in range(3):
                weight = checkpoint.read(f"model.layers.{i}.{block}.{name}.weight")
                # The format's `dtype` is what dequantize gives: the model's, not the file's.
                expected = quantize(jnp.asarray(weight, jnp.float32), **options)
                assert_same_bits(layer_of(stack, i), expected)
    norm = checkpoint.read("model.norm.weight").astype(np.float32)
    np.testing.assert_array_equal(model.norm.scale[...], norm)
    head = checkpoint.read("lm_head.weight").astype(np.float32)
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)
    assert model(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 64)


def test_a_dense_load_equals_filling_the_model_by_hand(folder):
    model, tokenizer = load_model(folder, quant_type=None)
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    by_hand = llama_models.fill(LlamaConfig.from_hf(CONFIG), tensors)
    assert_same_bits(nnx.state(model), nnx.state(by_hand))
    assert tokenizer.encode("a b c") == [3, 4, 5]


def test_dtypes_and_the_choice_of_layers(folder):
    where = r"layers/self_attn/.*"
    model, _ = load_model(folder, dtype=jnp.bfloat16, where=where, block_size=64, remat="none")
    assert model.remat == "none" and model.dtype == jnp.bfloat16
    assert isinstance(model.layers.self_attn.q_proj.kernel.get_value(), QuantizedTensor)
    assert model.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16
    up = open_checkpoint(folder).read("model.layers.2.mlp.up_proj.weight")
    np.testing.assert_array_equal(model.layers.mlp.up_proj.kernel[2], up.T)
    assert all(v.dtype == jnp.bfloat16 for v in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_gguf_file_gives_the_same_model(folder, tmp_path):
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {"model.layers.": "blk."}
    checkpoint = open_checkpoint(folder)
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    for name in checkpoint.names():
        weight = checkpoint.read(name).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            weight = permute_as_llama_cpp(weight, 4 if "q_proj" in name else 2)
        for hf, gguf in names.items():
            name = name.replace(hf, gguf)
        tensors[name] = weight
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, heads=4, **GGUF_SIZES)
    metadata = open_checkpoint(path)
    config = loading.read_config(metadata)
    assert not config.tie_word_embeddings and config.rope_scaling.factors == (1.0,) * 4
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    loading.fill_model(abstract, metadata)
    assert_same_bits(nnx.state(abstract), nnx.state(load_model(folder, quant_type=None)[0]))


GGUF_SIZES = {
    "llama__block_count": 3,
    "llama__vocab_size": 64,
    "llama__embedding_length": 32,
    "llama__feed_forward_length": 48,
    "llama__context_length": 128,
    "llama__attention__head_count_kv": 2,
    "llama__attention__layer_norm_rms_epsilon": 1,
}


@pytest.mark.parametrize("shape", [(96, 128), (33, 256), (64, 100), (512, 256)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pieces_are_the_whole_to_the_bit(monkeypatch, shape, dtype):
    monkeypatch.setattr(conversion, "_PIECE_ELEMENTS", 1 << 11)
    weight = jax.random.normal(jax.random.key(0), shape, dtype)
    options = dict(quant_type="nf4", block_size=64, double_quant=True)
    in_pieces = jax.jit(lambda w: quantize_in_pieces(w, **options))
    assert_same_bits(in_pieces(weight), quantize(weight, **options))


def test_temporaries_of_a_large_matrix_are_small():
    weight = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    options = dict(quant_type="nf4", block_size=64, double_quant=True)
    compiled = jax.jit(lambda w: quantize_in_pieces(w, **options)).lower(weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 2 * 4096 * 4096


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_refused_by_name(folder, name, value, dtype):
    weight = open_checkpoint(folder).read(name).astype(dtype)
    weight.reshape(-1)[-1] = value
    rewrite(folder, {name: weight})
    with pytest.raises(WeightsError, match=f"{name} holds NaN or infinity"):
        load_model(folder)


def test_values_that_float16_cannot_hold_are_refused(folder):
    rewrite(folder, {"model.norm.weight": np.full(32, 1e5, np.float32)})
    with pytest.raises(WeightsError, match="model.norm.weight holds 100000, which is infinite in"):
        load_model(folder, dtype=jnp.float16)
    load_model(folder, dtype=jnp.bfloat16)


def test_all_that_does_not_fit_is_listed_at_once(folder):
    changes = {f"model.layers.{i}.mlp.up_proj.weight": None for i in range(3)}
    changes["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    changes["lm_head.weight"] = np.zeros((63, 32), np.float32)
    rewrite(folder, changes)
    with pytest.raises(WeightsError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "3 tensors are missing, 1 are not expected and 1 do not fit" in message
    assert "missing: model.layers.{0-2}.mlp.up_proj.weight" in message
    assert "not expected: model.layers.0.self_attn.q_proj.bias" in message
    assert "does not fit: lm_head.weight is [63, 32], must be [64, 32]" in message


def test_more_layers_than_the_configuration_says(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    with pytest.raises(WeightsError, match=r"not expected: model.layers.2.mlp.down_proj.weight"):
        load_model(folder)


def test_a_tied_head_may_be_stored(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    assert load_model(folder)[0].lm_head is None


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = CONFIG | {"vocab_size": 4}
    write_checkpoint(folder, config, shard_bytes=1 << 20)
    with pytest.raises(WeightsError, match="tokenizer has 6 tokens, .* only 4 rows"):
        load_model(folder)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(WeightsError, match="is a pickle"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "nf5"}, "quant_type='nf5' is unknown: use one of"),
        ({"block_size": 48}, "block_size=48 is not supported: use one of"),
        ({"where": "no/such/layer"}, "where='no/such/layer' chooses no linear layer"),
    ],
)
def test_options_that_cannot_be_end_a_script_with_code_2(folder, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run_main(lambda: load_model(folder, **options))
    assert message in capsys.readouterr().err


def test_progress_counts_every_tensor(folder):
    calls = []
    load_model(folder, progress=lambda *call: calls.append(call))
    total = len(hf_shapes(CONFIG))
    assert [done for done, _, _ in calls] == list(range(1, total + 1))
    assert {count for _, count, _ in calls} == {total}
    assert {name for _, _, name in calls} == set(hf_shapes(CONFIG))


def test_the_fingerprint_is_that_of_the_base(folder):
    model, _ = load_model(folder)
    fingerprint = base_fingerprint(model)
    assert len(fingerprint) == 32
    assert base_fingerprint(load_model(folder)[0]) == fingerprint
    adapted = apply_qlora(model, rank=2, dropout=0.1, rngs=nnx.Rngs(0, dropout=1))
    assert base_fingerprint(adapted) == fingerprint
    others = [load_model(folder, quant_type="fp4")[0], load_model(folder, quant_type=None)[0]]
    norm = np.ones(32, np.float32)
    norm[7] = 1.5
    rewrite(folder, {"model.norm.weight": norm})
    others.append(load_model(folder)[0])
    assert len({fingerprint, *map(base_fingerprint, others)}) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_base_and_fingerprint_do_not_depend_on_the_compute_dtype(folder, dtype):
    checkpoint = open_checkpoint(folder)
    noise = np.random.default_rng(0)
    rewrite(
        folder,
        {
            name: (0.1 * noise.standard_normal(checkpoint.shape(name))).astype(dtype)
            for name in checkpoint.names()
        },
    )
    models = [load_model(folder, dtype=compute)[0] for compute in (jnp.float32, jnp.bfloat16)]
    codes = [nnx.to_pure_dict(nnx.state(model, QuantizedParam)) for model in models]
    for one, other in zip(*map(jax.tree.leaves, codes), strict=True):
        np.testing.assert_array_equal(one, other)
    fingerprints = [base_fingerprint(model) for model in models]
    assert fingerprints[0] == fingerprints[1]
    rewrite(folder, {"model.norm.weight": np.full(32, 0.5, dtype)})
    assert base_fingerprint(load_model(folder)[0]) not in fingerprints


def test_smollm2_in_full_precision_and_in_nf4():
    path = llama_models.smollm2_path()
    dense = llama_models.smollm2()
    model, tokenizer = load_model(path)
    assert model.config.num_hidden_layers == 30 and model.lm_head is None
    stack = model.layers.mlp.down_proj.kernel.get_value()
    weight = open_checkpoint(path).read("blk.29.ffn_down.weight")
    assert_same_bits(layer_of(stack, 29), quantize(jnp.asarray(weight)))
    error = np.asarray(dequantize(layer_of(stack, 29))) - weight
    assert 0.05 < np.linalg.norm(error) / np.linalg.norm(weight) < 0.12
    # Losses that transformers gives, with bitsandbytes' NF4 for the second: golden/make_loading.py.
    golden = json.loads((llama_models.GOLDEN / "loading.json").read_text())
    assert tokenizer.encode(golden["text"]) == golden["ids"]
    tokens = jnp.array([golden["ids"]])
    for name, one in (("dense", dense), ("nf4", model)):
        log_probs = jax.nn.log_softmax(one(tokens)[0, :-1])
        loss = -jnp.take_along_axis(log_probs, tokens[0, 1:, None], axis=1).mean()
        np.testing.assert_allclose(loss, golden["losses"][name], atol=1e-4)


# Prints peak and packed size in bytes. The peak includes the interpreter and all libraries.
# Without what the `cuda` extra adds: mapping JAX's CUDA plugin and Triton alone takes 400 MB.
MEASURE = """
import sys, types
sys.modules["triton"] = sys.modules["jax_triton"] = None
sys.modules["jax_plugins"] = types.ModuleType("jax_plugins")
sys.modules["jax_plugins"].__path__ = []
import jax, jax.numpy as jnp
from flax import nnx
from qlora_jax.loading import load_model
from qlora_jax.metrics import host_memory
model, _ = load_model(sys.argv[1], dtype=jnp.bfloat16)
print(host_memory()[1], sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))))
"""


def test_what_only_reports_need_is_not_imported():
    """Libraries of tens of MB, which a process that loads a model would carry for nothing."""
    libraries = {"scipy.stats", "matplotlib", "pandas"}
    program = f"import sys, qlora_jax; print({libraries} & {{*sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "set()"


@pytest.mark.slow
def test_peak_memory_of_a_large_sharded_checkpoint(tmp_path):
    """Packed size + 2 x the largest tensor + 300 MB, which must hold Python and JAX as well."""
    config = CONFIG | dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
    )
    try:
        total = write_checkpoint(tmp_path, config, shard_bytes=500_000_000)
        assert total > 4e9
        largest = max(2 * int(np.prod(shape)) for shape in hf_shapes(config).values())
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        peak, packed = map(int, run.stdout.split())
        print(f"{total=:,} {packed=:,} {largest=:,} {peak=:,} {peak - packed - 2 * largest=:,}")
        assert packed < total / 3
        assert peak < packed + 2 * largest + 300e6
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
