"""PiSSA, OLoRA and LoftQ: PEFT's arithmetic, and bases that can be made again to the bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_models import GOLDEN
from tiny_run import quiet_report, tiny_config, write_data, write_model

import qlora_jax as ql
from qlora_jax.chat_models import load_engine
from qlora_jax.errors import CheckpointError, ConfigError
from qlora_jax.generation.adapters import merge_for_rows
from qlora_jax.loading import frozen_variables
from qlora_jax.lora import lora_scaling
from qlora_jax.subtraction import (
    SUBTRACTED_FILE,
    read_subtracted,
    set_subtracted,
    write_subtracted,
)
from qlora_jax.training.building import build_model
from qlora_jax.weight_inits import check_init, init_from_weight, subtract

FORMAT = dict(quant_type="nf4", block_size=64, double_quant=False)


def weight(shape=(96, 128), seed=0, decay=0.0):
    """A weight whose singular values fall like those of trained layers, or like noise."""
    w = np.random.default_rng(seed).normal(size=shape) * 0.05
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return ((u * s * np.exp(-decay * np.arange(len(s)))) @ vh).astype(np.float32)


def product(adapter, scaling):
    a, b = (np.asarray(adapter[name], np.float64) for name in ("lora_a", "lora_b"))
    return scaling * (a @ b).T


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("case", ["pissa", "pissa_rslora", "olora", "loftq", "loftq_5"])
def test_it_is_pefts_arithmetic(shape, case):
    golden = np.load(GOLDEN / "lora_inits.npz")
    w = golden[f"{shape}.w"]
    a, b, base = (golden[f"{shape}.{case}.{name}"] for name in ("a", "b", "base"))
    init, _, iterations = case.partition("_")
    alpha = 4 if init == "loftq" else 6
    options = dict(rank=4, alpha=alpha, use_rslora="rslora" in case)
    if init == "loftq":
        options |= FORMAT | {"loftq_iterations": int(iterations or 1)}
    adapter, subtracted = init_from_weight(w, init, **options)
    scaling = lora_scaling(4, alpha, options["use_rslora"])
    theirs = {"lora_a": a.T, "lora_b": b.T}
    np.testing.assert_allclose(product(adapter, scaling), product(theirs, scaling), atol=1e-5)
    for name in adapter:  # a vector's sign is free, the same in A and B
        assert adapter[name].shape == theirs[name].shape
        np.testing.assert_allclose(np.abs(adapter[name]), np.abs(theirs[name]), atol=5e-5)
    ours = w if subtracted is None else subtract(w, subtracted, scaling)
    if init == "loftq":
        ours = ql.dequantize(ql.quantize(ours, **FORMAT))
    np.testing.assert_allclose(ours, base, atol=1e-5)


def test_subspace_iteration_finds_what_the_decomposition_does():
    w = weight((200, 160), decay=0.05)
    exact = product(init_from_weight(w, "pissa", rank=8, alpha=8).adapter, 1.0)
    coarse, fine = (
        np.linalg.norm(product(init_from_weight(w, name, rank=8, alpha=8).adapter, 1.0) - exact)
        for name in ("pissa_niter_0", "pissa_niter_4")
    )
    assert fine < 1e-4 * np.linalg.norm(exact) < coarse


@pytest.mark.parametrize(
    ("init", "use_rslora"),
    # Not OLoRA with a large scaling: its adapter is not divided by it, and the rest grows.
    [(init, False) for init in ("pissa", "pissa_niter_2", "olora", "loftq")]
    + [("pissa", True), ("loftq", True)],
)
def test_base_and_adapter_are_the_weight_and_nearer_to_it_than_the_base_alone(init, use_rslora):
    w = weight(decay=0.02)
    options = dict(rank=16, alpha=24, use_rslora=use_rslora)
    scaling = lora_scaling(16, 24, use_rslora)
    adapter, subtracted = init_from_weight(w, init, **options)
    rest = w if subtracted is None else subtract(w, subtracted, scaling)
    start = ql.dequantize(ql.quantize(rest)) + product(adapter, scaling)
    plain = ql.dequantize(ql.quantize(w))
    errors = [np.linalg.norm(w - v) / np.linalg.norm(w) for v in (start, plain)]
    assert errors[0] < (1.0 if init == "olora" else 0.95) * errors[1], errors


def test_more_iterations_of_loftq_lose_less():
    w = weight(decay=0.02)

    def lost(iterations):
        options = dict(rank=16, alpha=16, loftq_iterations=iterations)
        adapter, subtracted = init_from_weight(w, "loftq", **options)
        assert (subtracted is None) == (iterations == 1)
        rest = w if subtracted is None else subtract(w, subtracted, 1.0)
        return np.linalg.norm(w - ql.dequantize(ql.quantize(rest)) - product(adapter, 1.0))

    assert lost(5) < 0.99 * lost(1)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_subtracting_is_rounded_once(dtype):
    """So it does not depend on the order of sums: an exact product gives the same bits."""
    w = weight((64, 96)).astype(dtype)
    adapter = init_from_weight(w, "pissa", rank=8, alpha=6, dtype=jnp.bfloat16).adapter
    a, b = (np.asarray(adapter[name]).astype(np.longdouble) for name in ("lora_a", "lora_b"))
    exact = w.astype(np.longdouble) - (a * np.longdouble(0.75) @ b).T
    np.testing.assert_array_equal(subtract(w, adapter, 0.75), exact.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(init="piss"), "init='piss'.*pissa_niter_<n>"),
        (dict(init="pissa_niter_"), "expected one of"),
        (dict(init="default"), "looks at the weight"),
        (dict(rank=97), "96 x 128 has singular values.*at most 96"),
        (dict(alpha=0), "alpha=0"),
        (dict(init="loftq", loftq_iterations=0), "loftq_iterations=0"),
    ],
)
def test_what_is_refused(change, message):
    arguments = dict(init="pissa", rank=4, alpha=4) | change
    with pytest.raises(ConfigError, match=message):
        init_from_weight(weight(), **arguments)
    check_init("pissa_niter_16")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inits")
    return write_model(folder / "model"), write_data(folder / "data.jsonl")


def config_of(material, init, **lora):
    config = tiny_config(*material)
    config.model.compute_dtype = "float32"
    config.lora.update({"init": init, **lora})
    return config


def build(config, **options):
    return build_model(config, dtype=np.dtype(np.float32), **options)


def arrays(model):
    return {path: variable.get_value() for path, variable in frozen_variables(model).items()}


@pytest.mark.parametrize(
    ("init", "iterations"), [("pissa", 1), ("pissa_niter_4", 1), ("olora", 1), ("loftq", 2)]
)
def test_a_base_is_made_again_to_the_bit(material, tmp_path, init, iterations):
    config = config_of(material, init, loftq_iterations=iterations)
    model, _, fingerprint = build(config, workdir=tmp_path)
    again, _, same = build(config, workdir=tmp_path, again=True)
    assert fingerprint == same != build(config_of(material, "default"))[2]
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(again))
    # and it is what the functions for one weight say
    linear, kernel = model.layers.mlp.up_proj, again.layers.mlp.up_proj.kernel.get_value()
    original = ql.load_model(material[0], quant_type=None)[0].layers.mlp.up_proj.kernel.get_value()
    options = dict(rank=4, alpha=16.0, loftq_iterations=iterations, block_size=32)
    for layer in range(2):
        w = np.asarray(original[layer].T)
        adapter, subtracted = init_from_weight(w, init, **options)
        expected = ql.quantize(subtract(w, subtracted, 4.0), block_size=32)
        np.testing.assert_array_equal(kernel.codes[layer], expected.codes)
        for name in adapter:
            np.testing.assert_array_equal(linear.adapter[name][layer], adapter[name])


def test_loftq_of_one_iteration_keeps_the_base(material, tmp_path):
    model, _, fingerprint = build(config_of(material, "loftq"), workdir=tmp_path)
    plain, _, same = build(config_of(material, "default"))
    assert fingerprint == same and not list(tmp_path.iterdir())
    assert build(config_of(material, "loftq"), workdir=tmp_path, again=True)[2] == same
    original = ql.load_model(material[0], quant_type=None)[0]
    ids = jnp.arange(12)[None]
    model.eval(), plain.eval()
    started, rounded = (np.abs(m(ids) - original(ids)).mean() for m in (model, plain))
    assert started < 0.9 * rounded


def test_dora_begins_with_the_magnitudes_of_base_and_adapter(material):
    model, _, _ = build(config_of(material, "pissa", use_dora=True))
    plain, _, _ = build(config_of(material, "pissa"))
    ids = jnp.arange(12)[None]
    model.eval(), plain.eval()
    np.testing.assert_allclose(model(ids), plain(ids), atol=1e-4)


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_a_checkpoint_in_4_bits_is_refused(material, tmp_path, format):
    packed = ql.quantize_checkpoint(material[0], tmp_path / "packed", format=format, block_size=32)
    config = config_of((packed, material[1]), "loftq")
    with pytest.raises(ConfigError, match=r"in 4 bits already.*Give the 16-bit model"):
        build(config)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapter_for_the_original_weight_computes_the_same(use_rslora, use_dora):
    """Without quantization in between, the conversion is exact."""
    w, x = weight((48, 64)), np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    options = dict(rank=4, alpha=6.0, use_rslora=use_rslora)
    adapter, subtracted = init_from_weight(w, "pissa", **options)
    scaling = lora_scaling(4, 6.0, use_rslora)

    def adapted(w):
        linear = nnx.Linear(64, 48, use_bias=False, rngs=nnx.Rngs(0))
        linear.kernel = nnx.Param(jnp.asarray(w.T))
        return ql.apply_qlora(
            linear, where=".*", quant_type=None, use_dora=use_dora, rngs=nnx.Rngs(0), **options
        )

    trained = adapted(subtract(w, subtracted, scaling))
    trained.lora_a = nnx.LoRAParam(adapter["lora_a"] + 0.01)
    trained.lora_b = nnx.LoRAParam(adapter["lora_b"] * 1.5)
    set_subtracted(trained, {"": subtracted})
    wider, alpha = trained.original_adapter
    assert wider["lora_a"].shape == (64, 8)
    y = ql.lora_matmul(x, jnp.asarray(w), wider, alpha=alpha, use_rslora=use_rslora)
    np.testing.assert_allclose(y, trained(x), atol=1e-5)


def test_the_file_is_checked(tmp_path):
    with pytest.raises(CheckpointError, match="missing: the run's base"):
        read_subtracted(tmp_path / SUBTRACTED_FILE)
    adapters = {"layers/mlp/up_proj": {"lora_a": np.ones((2, 3, 1)), "lora_b": np.ones((2, 1, 4))}}
    write_subtracted(tmp_path / SUBTRACTED_FILE, adapters)
    again = read_subtracted(tmp_path / SUBTRACTED_FILE)
    jax.tree.map(np.testing.assert_array_equal, adapters, again)
    assert [file.name for file in tmp_path.iterdir()] == [SUBTRACTED_FILE]


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_run_with_pissa_goes_on_comes_back_and_goes_out(material, tmp_path, use_dora):
    config = config_of(material, "pissa", use_dora=use_dora)
    config.train.steps, config.checkpoint.every = 2, 1
    ql.train(config, tmp_path / "run", report=quiet_report()[0])
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    config.train.steps = 4
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    for name in ("run", "whole"):  # one goes on, the other begins again
        ql.train(config, tmp_path / name, report=quiet_report()[0])
    continued, _ = ql.load_trained(tmp_path / "run")
    whole, _ = ql.load_trained(tmp_path / "whole")
    ids = jnp.arange(12)[None]
    np.testing.assert_array_equal(continued(ids), whole(ids))

    adapter = ql.save_adapter(continued, tmp_path / "peft", base_model="x")
    base, _ = ql.load_model(material[0], quant_type=None)
    exported = ql.load_adapter(base, adapter)
    assert exported.layers.mlp.up_proj.rank == 8
    far = np.abs(base(ids) - continued(ids)).mean()
    assert np.abs(exported(ids) - continued(ids)).mean() < 0.5 * far
    # Served, a row without adapter has the base as it was, though the run's own is another.
    engine, *_ = load_engine(workdirs=[str(tmp_path / "run")], slots=1, dense=False)
    served = merge_for_rows(engine._graphdef, engine._state, jnp.array([0, 1]))(ids.repeat(2, 0))
    assert np.abs(served[0] - base(ids)[0]).mean() < 0.5 * far
    np.testing.assert_allclose(served[1], continued(ids)[0], rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="Serve it alone"):
        load_engine(workdirs=[f"{name}={tmp_path / name}" for name in ("run", "whole")])
    (tmp_path / "run" / SUBTRACTED_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        ql.load_trained(tmp_path / "run")
