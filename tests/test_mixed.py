"""Checkpoints whose layers differ in format: loaded as they are, computed, trained, merged."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
import safetensors.numpy
import tiny_run
from cuda_wheels import needs_cuda_wheels
from flax import nnx
from synthetic_checkpoint import CONFIG, write_checkpoint, write_tokenizer
from test_packed_checkpoint import assert_same_model, change, mix

from qlora_jax import config as config_lib
from qlora_jax import planning, training
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.estimating import estimate
from qlora_jax.export import _packed
from qlora_jax.flax_nnx import apply_qlora, merge_model
from qlora_jax.layer_formats import packed_linears, quantize_as, said_formats
from qlora_jax.loading import base_fingerprint, load_model
from qlora_jax.merged_files import write_4bit_folder
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.mixed import MixedStack, take_layer
from qlora_jax.models.kinds import abstract_model, read_shape
from qlora_jax.nnx_linear import MixedParam, QuantizedParam
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.streaming import StreamedModel
from qlora_jax.training import fitting
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.checksums import CHECKSUMS
from qlora_jax.weights.packed import MixedFormat, PackedFormat

GOLDEN = llama_models.GOLDEN / "bnb_dynamic"
SLOW = pytest.mark.slow
TOKENS = jnp.array([[1, 5, 9, 33, 2, 60, 17, 8]])  # of golden/make_bitsandbytes_folders.py


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Layers 1 (down_proj) and 2 (mlp, q_proj) of four are in 16 bits."""
    folder = shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "dynamic")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden)[0]


@pytest.fixture(scope="module")
def dense(model):
    """The same weights as plain dense layers."""
    dense, _ = merge_model(apply_qlora(model, rank=1, quant_type=None, rngs=nnx.Rngs(0)))
    assert type(dense.layers.mlp.down_proj) is nnx.Linear
    dense.remat = "none"
    return dense


def with_adapter(model, **options):
    """The model with adapters whose B is not zero."""
    model = apply_qlora(model, rank=4, alpha=8, quant_type=None, rngs=nnx.Rngs(1), **options)
    keys = nnx.Rngs(2)
    for _, node in nnx.iter_graph(model):
        if getattr(node, "rank", 0):
            b = 0.1 * jax.random.normal(keys.params(), node.lora_b.shape)
            node.lora_b.set_value(b)
    return model


def loss_function(model, tokens=TOKENS):
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora):
        logits = nnx.merge(graphdef, lora, frozen)(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 7])

    return jax.value_and_grad(loss), lora


@pytest.fixture(scope="module")
def expected(dense):
    """Loss and gradients of the dense model, with LoRA and with DoRA."""

    @functools.cache
    def compute(use_dora):
        function, lora = loss_function(with_adapter(dense, use_dora=use_dora))
        return jax.jit(function)(lora)

    return compute


def test_packed_where_packed_and_dense_where_dense(model, golden):
    stack = model.layers.mlp.down_proj.kernel.get_value()
    assert isinstance(stack, MixedStack) and stack.places == ((0, 3), (1, 2))
    packed, dense = stack.parts
    assert isinstance(packed, QuantizedTensor) and packed.codes.shape == (2, 64 * 128 // 2)
    file = safetensors.numpy.load_file(golden / "model.safetensors")
    for entry, layer in enumerate((1, 2)):
        weight = file[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(dense[entry], weight.T)
    assert isinstance(model.layers.self_attn.q_proj.kernel, MixedParam)
    assert not isinstance(model.layers.self_attn.o_proj.kernel, MixedParam)
    assert isinstance(model.layers.self_attn.o_proj.kernel, QuantizedParam)


def test_logits_are_those_of_transformers(model):
    np.testing.assert_allclose(model(TOKENS), np.load(GOLDEN / "logits.npy"), atol=2e-5)


def test_a_cache_changes_nothing(model):
    cache, steps = model.init_cache(1, TOKENS.shape[1]), []
    call = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    for tokens in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:5]):
        logits, cache = call(model, tokens, cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), model(TOKENS)[:, :5], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(remat="projections"),
        dict(remat="full", sequence_chunk=3),
        pytest.param(dict(remat="none"), marks=SLOW),
        pytest.param(dict(remat="dots"), marks=SLOW),
        pytest.param(dict(remat="full"), marks=SLOW),
        pytest.param(dict(remat="none", use_dora=True), marks=SLOW),
    ],
)
def test_gradients_are_those_of_the_dense_model(model, expected, options):
    use_dora, model = options.pop("use_dora", False), nnx.clone(model)
    for name, value in options.items():
        setattr(model, name, value)
    function, lora = loss_function(with_adapter(model, use_dora=use_dora))
    loss, gradients = jax.jit(function)(lora)
    expected_loss, expected_gradients = expected(use_dora)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())),
        nnx.to_pure_dict(gradients),
        nnx.to_pure_dict(expected_gradients),
    )
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def avals(jaxpr):
    """Of all results in a program, also inside scans, branches and checkpoints."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=has_equations):
            if has_equations(parameter):
                yield from avals(getattr(parameter, "jaxpr", parameter))


def has_equations(parameter):
    return hasattr(getattr(parameter, "jaxpr", parameter), "eqns")


@pytest.mark.parametrize(
    "remat", ["none", "projections", *(pytest.param(r, marks=SLOW) for r in ("full", "dots"))]
)
def test_no_slice_of_a_kernel_is_stored_for_the_backward_pass(model, remat):
    """No array in the program has, for each layer, a dense kernel or the codes of one."""
    model = nnx.clone(model)
    model.remat = remat
    function, lora = loss_function(with_adapter(model))
    shapes = {getattr(a, "shape", ()) for a in avals(jax.make_jaxpr(function)(lora).jaxpr)}
    assert (4, 64, 4) in shapes  # gradients of all layers' adapters: the scan was looked into
    assert not {shape for shape in shapes if shape[:1] == (4,) and {64, 128} <= set(shape[1:])}
    assert (4, 4096) not in shapes


def test_merging_keeps_each_layer_in_its_format(model):
    adapted = with_adapter(model)
    dense, report = merge_model(adapted)
    np.testing.assert_allclose(dense(TOKENS), adapted(TOKENS), atol=2e-4)
    assert report["layers/mlp/down_proj"].max_abs.shape == (4,)
    packed, report = merge_model(adapted, requantize=True)
    stack, old = (m.layers.mlp.down_proj.kernel.get_value() for m in (packed, adapted))
    assert jax.tree.structure(stack) == jax.tree.structure(old)
    errors = report["layers/mlp/down_proj"].relative_frobenius
    assert (errors[jnp.array([1, 2])] == 0).all() and (errors[jnp.array([0, 3])] > 0.05).all()
    exact = dense.layers.mlp.down_proj.kernel
    np.testing.assert_array_equal(take_layer(stack, 2), exact[2])


@pytest.fixture
def three_formats(tmp_path):
    """up_proj is nf4 in blocks of 64, fp4 in blocks of 32, and not in 4 bits."""
    folder, names = tmp_path / "model", "layers.{}.mlp.up_proj"
    folder.mkdir()
    write_checkpoint(folder, CONFIG, shard_bytes=1_000_000)
    nf4 = quantize_checkpoint(folder, tmp_path / "nf4", format="bitsandbytes")
    options = dict(quant_type="fp4", block_size=32, double_quant=False)
    fp4 = quantize_checkpoint(folder, tmp_path / "fp4", format="bitsandbytes", **options)
    where = "layers/(?!mlp/up_proj).*"
    no4 = quantize_checkpoint(folder, tmp_path / "no4", format="bitsandbytes", where=where)
    mixed = mix(nf4, fp4, lambda name: names.format(1) in name, tmp_path / "two")
    mixed = mix(mixed, no4, lambda name: names.format(2) in name, tmp_path / "three")
    models = [load_model(f)[0] for f in (nf4, fp4, no4)]
    return mixed, models


def test_layers_of_three_formats(three_formats):
    folder, (nf4, fp4, no4) = three_formats
    model, _ = load_model(folder)
    stack = model.layers.mlp.up_proj.kernel.get_value()
    assert stack.places == ((0,), (1,), (2,))
    for layer, (one, kind) in enumerate(zip((nf4, fp4, no4), ("nf4", "fp4", None), strict=True)):
        expected = take_layer(one.layers.mlp.up_proj.kernel.get_value(), layer)
        found = take_layer(stack, layer)
        assert getattr(found, "quant_type", None) == kind
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    logits = model(TOKENS % 64)
    dense, _ = merge_model(apply_qlora(model, rank=1, quant_type=None, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(logits, dense(TOKENS % 64), atol=1e-5)
    change(folder, {"model.layers.2.mlp.up_proj.weight": None})
    with pytest.raises(WeightsError, match=r"missing: model.layers.2.mlp.up_proj.weight"):
        load_model(folder)


def test_a_packed_folder_of_it_is_the_same_model(three_formats, tmp_path):
    folder, _ = three_formats
    model, _ = load_model(folder)
    out = quantize_checkpoint(folder, tmp_path / "out")
    found, _ = load_model(out)
    assert_same_model(found, model)
    assert base_fingerprint(model) == base_fingerprint(found) == open_checkpoint(out).fingerprint
    index = json.loads((out / "qlora_jax.json").read_text())
    assert index["version"] == 2
    (out / CHECKSUMS).unlink()
    for places, message in (
        ([[0], [1]], "is in only one of them"),
        ([[0], [1], [1]], r"has the layers"),
    ):
        index["mixed"] = {"layers/mlp/up_proj/kernel": places}
        (out / "qlora_jax.json").write_text(json.dumps(index))
        with pytest.raises(WeightsError, match=message):
            load_model(out)


def test_export_merges_and_streams_each_layer_in_its_format(model, golden, tmp_path):
    source, adapted = open_checkpoint(golden), with_adapter(model)
    exact, _ = merge_model(adapted)
    merged = MergedCheckpoint(adapted, source)
    for layer in range(4):
        found = merged.read(f"model.layers.{layer}.mlp.down_proj.weight")
        np.testing.assert_allclose(found.T, exact.layers.mlp.down_proj.kernel[layer], atol=1e-6)
    out, tokenizer = tmp_path / "out", Tokenizer.from_file(golden)
    write_4bit_folder(merged, out, tokenizer, format="bitsandbytes", packed=_packed(adapted))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [
        "lm_head",
        "model.layers.1.mlp.down_proj",
        *(f"model.layers.2.mlp.{name}_proj" for name in ("down", "gate", "up")),
        "model.layers.2.self_attn.q_proj",
    ]
    stack = load_model(out)[0].layers.mlp.down_proj.kernel.get_value()
    assert stack.places == ((0, 3), (1, 2))
    np.testing.assert_array_equal(
        stack.parts[1], exact.layers.mlp.down_proj.kernel[np.array([1, 2])]
    )
    streamed = StreamedModel(source, jnp.float32)
    ones = jnp.ones_like(TOKENS)
    batch = {"tokens": TOKENS, "positions": jnp.arange(8)[None], "segment_ids": ones}
    (hidden,) = streamed.hidden_states([batch])
    np.testing.assert_allclose(hidden, model.hidden_states(TOKENS), atol=1e-5)


def test_a_t5_with_layers_in_two_formats_is_refused():
    model = abstract_model(read_shape({"model_type": "mt5"}))
    packed = {"encoder/layers/mlp/wo": MixedFormat((PackedFormat("nf4", 64, True), None))}
    with pytest.raises(WeightsError, match=r"of encoder/layers/mlp/wo differ: nf4 .* 16-bit model"):
        quantize_as(model, packed)


@pytest.mark.parametrize("name", ["bnb_dynamic", "bnb_nf4", "bnb_fp4"])
def test_config_json_alone_says_what_the_file_has(name):
    folder = llama_models.GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    model = abstract_model(read_shape(config))
    assert said_formats(config, model) == packed_linears(open_checkpoint(folder))


@pytest.fixture
def planned(golden, tmp_path):
    """A configuration of which nothing but config.json exists."""
    shutil.copy(golden / "config.json", tmp_path)
    config = config_lib.get_config()
    config.model.path, config.model.compute_dtype = str(tmp_path), "bfloat16"
    config.data.path, config.data.max_len, config.lora.rank = "not looked at", 64, 4
    return config


def test_a_plan_has_the_arrays_of_the_run(planned, golden):
    run = fitting.abstract_run(planned, jax.devices()[0])
    loaded, _ = load_model(golden, dtype=jnp.bfloat16)
    _, lora, frozen = nnx.split(with_adapter(loaded), nnx.LoRAParam, ...)
    found, expected = (nnx.state(run.frozen, QuantizedParam), nnx.state(frozen, QuantizedParam))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, found, expected)
    assert jax.tree.leaves(same) and all(jax.tree.leaves(same))
    assert estimate(planned, "rtx4090").parts["linear layers not in 4 bits"] == 2 * 36864


@pytest.mark.slow
@needs_cuda_wheels
def test_it_compiles_for_a_gpu(planned):
    plan = planning.plan(planned, "rtx4090", suggest=False)
    assert plan.verdict == "fits" and plan.parts["linear layers not in 4 bits"] == 2 * 36864


@pytest.mark.slow
def test_a_run_on_it_goes_on_with_a_packed_copy(tmp_path):
    folder = tiny_run.write_model(tmp_path / "model")
    options = dict(format="bitsandbytes", block_size=32)
    nf4 = quantize_checkpoint(folder, tmp_path / "nf4", **options)
    no4 = quantize_checkpoint(folder, tmp_path / "no4", where="layers/self_attn/.*", **options)
    mixed = mix(nf4, no4, lambda name: "layers.1.mlp" in name, tmp_path / "mixed")
    config = tiny_run.tiny_config(mixed, tiny_run.write_data(tmp_path / "data.jsonl"))
    for path, steps in ((mixed, 2), (quantize_checkpoint(mixed, tmp_path / "ours"), 4)):
        config.model.path, config.train.steps = str(path), steps
        report, text = tiny_run.quiet_report()
        assert training.train(config, tmp_path / "run", report=report).steps == steps
        assert "4,608 of 3 linear layers" in text.getvalue()
