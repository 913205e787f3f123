"""What adapted layers do: their formula, what learns, dropout, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_flax_nnx import (
    FEATURES,
    LAYERS,
    MLP,
    MODELS,
    ListModel,
    StackedModel,
    base_of,
    call,
    inputs,
    is_qlora,
    perturb,
    shapes,
)

from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import (
    apply_qlora,
    merge_model,
    quantize_model,
    set_dropout_keys,
)
from qlora_jax.linear_layers import linear_paths
from qlora_jax.quantized import dequantize
from qlora_jax.tree import flatten_paths

# ----------------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    ("in_features", "out_features", "axis", "shape"),
    [
        (8, (2, 6), -1, (3, 8)),
        ((2, 4), 6, (-2, -1), (3, 5, 2, 4)),
        ((2, 4), (3, 2), (-1, 1), (3, 2, 5, 4)),
        (3, 4, 0, (3, 5, 6)),
    ],
)
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_general_linear_keeps_its_shapes(in_features, out_features, axis, shape, use_bias):
    linear = nnx.LinearGeneral(
        in_features, out_features, axis=axis, use_bias=use_bias,
        bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    dense = apply_qlora(linear, rank=2, quant_type=None, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(dense(x), linear(x), rtol=1e-5, atol=1e-6)
    quantized = perturb(apply_qlora(linear, rank=2, rngs=nnx.Rngs(1)))
    merged, _ = merge_model(quantized)
    assert isinstance(merged, nnx.LinearGeneral) and merged.kernel.shape == linear.kernel.shape
    np.testing.assert_allclose(quantized(x), merged(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_an_adapted_layer_means_its_formula(quant_type):
    linear = nnx.Linear(40, 24, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    options = dict(rank=4, alpha=6.0, use_rslora=True, quant_type=quant_type)
    layer = perturb(apply_qlora(linear, rngs=nnx.Rngs(1), **options))
    x = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    value = layer.kernel.get_value()
    w = dequantize(value, jnp.float32).T if quant_type else value
    w, a, b, bias = (
        np.asarray(v, np.float64) for v in (w, *layer.adapter.values(), linear.bias.get_value())
    )
    expected = x @ (w + a @ b * 6.0 / np.sqrt(4)) + bias
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "quantized", "dense"),
    [
        (None, jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.int32, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_compute_dtype(dtype, x_dtype, quantized, dense):
    linear, x = nnx.Linear(8, 4, dtype=dtype, rngs=nnx.Rngs(0)), jnp.ones((2, 8), x_dtype)
    assert linear(x).dtype == dense
    options = dict(rank=2, rngs=nnx.Rngs(1))
    assert apply_qlora(linear, quant_type=None, **options)(x).dtype == dense
    layer = apply_qlora(linear, **options)
    assert layer(x).dtype == quantized and layer.lora_a.dtype == jnp.float32


def test_a_stack_cannot_be_called_as_one_layer():
    model = quantize_model(base_of(StackedModel))
    with pytest.raises(ValueError, match=r"stack \(2,\).*scan"):
        model.layers.mlp.up(inputs())


# ----------------------------------------------------------------------- training


def test_only_adapters_learn_and_they_do():
    model = apply_qlora(base_of(StackedModel), rank=4, rngs=nnx.Rngs(1))
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    x, target, tx = inputs(), inputs(seed=1)[..., :11], optax.adam(2e-2)

    @jax.jit
    def step(lora, opt_state):
        def loss_fn(lora):
            return jnp.mean((nnx.merge(graphdef, lora, frozen)(x) - target) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss, grads

    opt_state, losses = tx.init(lora), []
    for _ in range(20):
        lora, opt_state, loss, grads = step(lora, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    names = {path.split("/")[-1] for path in flatten_paths(grads)}
    assert names == {"lora_a", "lora_b"}
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads))


def test_no_optimizer_for_params_sees_a_quantized_kernel():
    model = quantize_model(MLP(nnx.Rngs(0)))
    assert set(flatten_paths(nnx.state(model, nnx.Param))) == {"up/bias"}


@pytest.mark.parametrize("make", MODELS)
def test_no_dense_base_weight_is_kept_for_the_backward_pass(make):
    def kept(model):
        graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)

        def backward(lora, frozen, x):
            def run(lora, x):
                return nnx.merge(graphdef, lora, frozen)(x)

            return jax.vjp(run, lora, x)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, lora, frozen, inputs()))
        return {leaf.shape[-2:] for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}

    def kernels(height, width):
        return {(height, width), (width, height)}

    options = dict(rank=2, rngs=nnx.Rngs(1))
    assert not kernels(FEATURES, 24) & kept(apply_qlora(base_of(make), **options))
    # the same question about a dense base finds its kernels
    dense = apply_qlora(base_of(make), quant_type=None, **options)
    assert kernels(FEATURES, 24) & kept(dense)


# ----------------------------------------------------------------------- dropout


DROPPED = ["query", "up"]  # few, because compiling each stream's random bits takes a second


def dropout_model(make, dropout=0.5):
    options = dict(where=f".*/({'|'.join(DROPPED)})", rank=4, dropout=dropout)
    return perturb(apply_qlora(base_of(make), rngs=nnx.Rngs(1), **options))


def test_evaluation_switches_dropout_off():
    model, x = dropout_model(ListModel), inputs()
    plain = call(dropout_model(ListModel, dropout=0.0), x)
    assert (call(model, x) != plain).any()
    model.eval()
    assert (call(model, x) == plain).all()
    model.train()
    assert not any(layer.deterministic for _, layer in nnx.iter_modules(model) if is_qlora(layer))
    view = nnx.view(model, deterministic=True)
    assert all(layer.deterministic for _, layer in nnx.iter_modules(view) if is_qlora(layer))


def test_written_keys_decide_the_dropout_alone():
    model, x = dropout_model(StackedModel), inputs()
    graphdef, lora, rng, frozen = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)

    @jax.jit
    def run(rng, key):
        return nnx.merge(graphdef, lora, set_dropout_keys(rng, key), frozen)(x)

    first = run(rng, jax.random.key(0))
    assert (first != run(rng, jax.random.key(1))).any()
    call(model, x)  # advances the counters
    other = nnx.state(model, nnx.RngState)
    assert (first == run(other, jax.random.key(0))).all()
    assert (first == run(rng, jax.random.key_data(jax.random.key(0)))).all()


def test_every_stream_and_every_layer_gets_its_own_key():
    model = dropout_model(StackedModel)
    rng = set_dropout_keys(nnx.state(model, nnx.RngState), jax.random.key(3))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rng) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.state(model, nnx.RngState)
    )
    flat = flatten_paths(rng)
    keys = [jax.random.key_data(leaf) for path, leaf in flat.items() if path.endswith("key")]
    assert {key.shape for key in keys} == {(LAYERS, 2)} and len(keys) == len(DROPPED)
    assert len(np.unique(np.concatenate(keys), axis=0)) == LAYERS * len(DROPPED)


def test_variables_that_are_no_streams_pass_through():
    model = dropout_model(ListModel)
    state = nnx.state(model)
    changed = set_dropout_keys(state, jax.random.key(3))
    for path, leaf in flatten_paths(changed).items():
        if "rngs" not in path:
            assert leaf is flatten_paths(state)[path]


def test_a_key_of_another_implementation_is_refused():
    rng = nnx.state(dropout_model(ListModel), nnx.RngState)
    with pytest.raises(ValueError, match="rbg.*fry"):
        set_dropout_keys(rng, jax.random.key(0, impl="rbg"))


# ----------------------------------------------------------------------- merging


@pytest.mark.parametrize("make", MODELS)
def test_a_dense_merge_is_a_plain_model_that_says_the_same(make):
    base, x = base_of(make), inputs()
    model = perturb(apply_qlora(base, rank=4, rngs=nnx.Rngs(1)))
    merged, report = merge_model(model)
    assert nnx.graphdef(merged) == nnx.graphdef(base) and shapes(merged) == shapes(base)
    assert list(report) == linear_paths(base, "all-linear")
    np.testing.assert_allclose(call(merged, x), call(model, x), rtol=2e-4, atol=2e-4)
    leading = (LAYERS,) if make is StackedModel else ()
    assert all(error.max_abs.shape == leading for error in report.values())
    assert isinstance(model.layers, type(base.layers))


def test_a_requantized_merge_keeps_the_format_and_reports_its_error():
    base = quantize_model(base_of(StackedModel))
    merged, report = merge_model(
        perturb(apply_qlora(base, rank=4, rngs=nnx.Rngs(1))), requantize=True
    )
    assert shapes(merged) == shapes(base)
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    for error in report.values():
        assert (0.01 < error.relative_frobenius).all() and (error.relative_frobenius < 0.2).all()


def test_requantizing_leaves_a_dense_base_dense():
    model = perturb(apply_qlora(MLP(nnx.Rngs(0)), rank=2, quant_type=None, rngs=nnx.Rngs(1)))
    merged, _ = merge_model(model, requantize=True)
    assert isinstance(merged.up, nnx.Linear)
    np.testing.assert_allclose(merged(inputs()), model(inputs()), rtol=1e-4, atol=1e-4)


def test_merging_what_has_no_adapters_is_refused():
    with pytest.raises(ConfigError, match="no QLoRALinear"):
        merge_model(MLP(nnx.Rngs(0)))
