"""DoRA against its formula in float64, and the same function in every coat."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_models import random_model, tiny_config
from tiny_run import quiet_report, write_data, write_model
from tiny_run import tiny_config as run_config

import qlora_jax as ql
from qlora_jax import flax_linen
from qlora_jax.dora import adapted_norm
from qlora_jax.lora import merge_weight

K, N, RANK, ALPHA = 128, 48, 4, 6.0


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def trained(leading=(), seed=3):
    return {
        "lora_a": normal(seed, *leading, K, RANK),
        "lora_b": normal(seed + 1, *leading, RANK, N),
        "lora_magnitude": jnp.abs(normal(seed + 2, *leading, N)) + 0.5,
    }


def exact(x, w, lora):
    """Equation 5 of the paper in float64; w is (out, in)."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    a, b, m = (np.asarray(v, np.float64) for v in lora.values())
    direction = w + ALPHA / RANK * (a @ b).T
    norm = np.linalg.norm(direction, axis=1)
    return x @ (direction * (m / norm)[:, None]).T, norm


@pytest.mark.parametrize("quantized", [False, True])
def test_value_and_gradient_are_those_of_the_formula(quantized):
    x, w, lora = normal(0, 5, K), normal(1, N, K), trained()
    weight = ql.quantize(w) if quantized else w
    dense = ql.dequantize(weight) if quantized else w
    y, norm = exact(x, dense, lora)
    np.testing.assert_allclose(
        ql.lora_matmul(x, weight, lora, alpha=ALPHA), y, rtol=1e-4, atol=1e-4
    )

    pull = normal(2, 5, N)
    grads = jax.grad(lambda lora: (pull * ql.lora_matmul(x, weight, lora, alpha=ALPHA)).sum())(lora)
    # The norm is a constant: an output's gradient is that of LoRA, times m / n.
    a, b, m = (np.asarray(v, np.float64) for v in lora.values())
    scaled = np.asarray(pull) * m / norm
    s = ALPHA / RANK
    expected = {
        "lora_a": s * np.asarray(x).T @ scaled @ b.T,
        "lora_b": s * (np.asarray(x) @ a).T @ scaled,
        "lora_magnitude": (np.asarray(pull) * y / m).sum(0),
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-3, atol=1e-3, err_msg=name)


def test_16_bit_weights_give_a_norm_of_16_bits_accuracy():
    w, lora = normal(1, N, K), trained()
    a, b = lora["lora_a"], lora["lora_b"]
    exactly = adapted_norm(ql.quantize(w), a, b, 1.5)
    coarse = adapted_norm(ql.quantize(w), a, b, 1.5, jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, exactly, rtol=4e-3)


def test_an_output_of_zeros_stays_zero():
    w = normal(1, N, K).at[3].set(0.0)
    lora = ql.init_lora(jax.random.key(0), {"q": {"kernel": ql.quantize(w)}}, rank=2, use_dora=True)
    y = ql.lora_matmul(normal(0, 2, K), ql.quantize(w), lora["q"])
    assert np.isfinite(y).all() and (y[:, 3] == 0).all() and lora["q"]["lora_magnitude"][3] < 1e-18


def test_it_starts_as_plain_lora_with_a_magnitude_beside_each_weight():
    params = {"layers": {"q": {"kernel": jax.vmap(ql.quantize)(normal(0, 3, N, K))}}}
    lora = ql.init_lora(jax.random.key(0), params, rank=2, use_dora=True)
    shapes = {"lora_a": (3, K, 2), "lora_b": (3, 2, N), "lora_magnitude": (3, N)}
    assert jax.tree.map(jnp.shape, lora) == {"layers": {"q": shapes}}
    abstract = jax.eval_shape(
        lambda params: ql.init_lora(jax.random.key(0), params, rank=2, use_dora=True), params
    )
    assert jax.tree.map(lambda x: x.shape, abstract) == {"layers": {"q": shapes}}
    plain = ql.init_lora(jax.random.key(0), params, rank=2)
    x = normal(1, 4, K)

    def run(lora):
        def body(x, layer):
            kernel, adapter = layer
            return jnp.tanh(ql.lora_matmul(x, kernel, adapter) @ jnp.ones((N, K))), None

        return jax.lax.scan(body, x, (params["layers"]["q"]["kernel"], lora["layers"]["q"]))[0]

    np.testing.assert_allclose(run(lora), run(plain), atol=1e-5)


def test_a_model_without_values_gets_magnitudes_without_values():
    model = nnx.eval_shape(lambda: random_model(tiny_config()))
    model = ql.apply_qlora(model, rank=2, use_dora=True, rngs=nnx.Rngs(0))
    magnitude = model.layers.mlp.up_proj.lora_magnitude.get_value()
    assert magnitude == jax.ShapeDtypeStruct((3, 24), jnp.float32)


def test_dropout_leaves_the_base_alone():
    x, w, lora = normal(0, 5, K), normal(1, N, K), trained()
    key = jax.random.key(1)
    got = ql.lora_matmul(x, w, lora, alpha=ALPHA, dropout=0.5, key=key)
    plain = {name: lora[name] for name in ("lora_a", "lora_b")}
    scale = lora["lora_magnitude"] / exact(x, w, lora)[1]
    expected = ql.lora_matmul(x, w, plain, alpha=ALPHA, dropout=0.5, key=key) * scale
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_merging_means_the_same_function(quantized):
    kernel, lora, x = normal(1, 2, K, N), trained((2,)), normal(0, 5, K)
    weight = jax.vmap(ql.quantize)(kernel.swapaxes(1, 2)) if quantized else kernel
    merged, error = merge_weight(weight, lora, alpha=ALPHA)
    assert merged.shape == (2, K, N) and error.max_abs.shape == (2,)
    for layer in range(2):
        one = jax.tree.map(lambda v, layer=layer: v[layer], (weight, lora))
        w = one[0] if quantized else one[0].T
        y = ql.lora_matmul(x, w, one[1], alpha=ALPHA)
        np.testing.assert_allclose(x @ merged[layer], y, rtol=1e-3, atol=1e-3)


def test_the_backward_pass_keeps_no_dense_weight_and_decodes_one_at_a_time():
    x, weight = normal(0, 8, 1024), ql.quantize(normal(1, 1024, 1024))
    lora = ql.init_lora(jax.random.key(0), {"q": {"kernel": weight}}, rank=4, use_dora=True)["q"]

    def loss(lora, x, weight):
        return ql.lora_matmul(x, weight, lora).sum()

    _, vjp = jax.vjp(loss, lora, x, weight)
    assert max(leaf.size for leaf in jax.tree.leaves(vjp)) <= weight.codes.size
    step = jax.jit(jax.grad(loss)).lower(lora, x, weight).compile()
    dense = 1024 * 1024 * 4
    assert step.memory_analysis().temp_size_in_bytes < 1.5 * dense


def test_nnx_and_linen_compute_what_the_pure_function_does():
    x, w, lora = normal(0, 5, K), normal(1, N, K), trained()
    expected = ql.lora_matmul(x, ql.quantize(w), lora, alpha=ALPHA)
    options = dict(where=".*", rank=RANK, alpha=ALPHA, use_dora=True)
    plain = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    plain.kernel = nnx.Param(w.T)
    layer = ql.apply_qlora(plain, rngs=nnx.Rngs(0), **options)
    np.testing.assert_allclose(
        layer.lora_magnitude.get_value(),
        jnp.linalg.norm(ql.dequantize(ql.quantize(w)), axis=1),
        rtol=1e-5,
    )
    for name, value in lora.items():
        getattr(layer, name).set_value(value)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    merged, _ = ql.merge_model(layer)
    np.testing.assert_allclose(merged(x), expected, rtol=1e-3, atol=1e-3)

    frozen = {"kernel": ql.quantize(w)}
    linen = nn.Dense(N, use_bias=False)
    np.testing.assert_allclose(
        flax_linen.apply_qlora(linen, frozen, lora, x, alpha=ALPHA), expected, rtol=1e-6
    )
    dense = flax_linen.QLoRADense(N, rank=RANK, alpha=ALPHA, use_dora=True, use_bias=False)
    variables = dense.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        dense.apply(variables, x),
        ql.matmul(x, variables["quantized"]["kernel"]),
        rtol=1e-5,
        atol=1e-5,
    )
    variables["quantized"]["kernel"] = ql.quantize(w)
    np.testing.assert_allclose(dense.apply(variables | {"lora": lora}, x), expected, rtol=1e-6)


def test_a_bias_is_not_scaled():
    plain = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    plain.bias = nnx.Param(jnp.full(N, 7.0))
    layer = ql.apply_qlora(plain, where=".*", rank=2, use_dora=True, rngs=nnx.Rngs(0))
    layer.lora_magnitude.set_value(jnp.zeros(N))
    np.testing.assert_array_equal(layer(normal(0, 2, K)), jnp.full((2, N), 7.0))


def test_the_scanned_model_has_the_same_gradients_whatever_it_recomputes():
    ids = jnp.arange(6)[None]

    def gradients(remat):
        model = random_model(tiny_config(num_hidden_layers=2), remat=remat)
        model = ql.apply_qlora(model, where=".*/mlp/.*", rank=2, use_dora=True, rngs=nnx.Rngs(0))
        graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
        loss = jax.jit(lambda lora: nnx.merge(graphdef, lora, frozen)(ids)[..., 3].sum())
        return nnx.to_pure_dict(jax.grad(loss)(lora))

    kept, recomputed = gradients("projections"), gradients("full")
    assert np.abs(kept["layers"]["mlp"]["down_proj"]["lora_magnitude"]).max() > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, recomputed
    )


@pytest.mark.slow
def test_a_run_learns_magnitudes_and_comes_back(tmp_path):
    model = write_model(tmp_path / "model")
    config = run_config(model, write_data(tmp_path / "data.jsonl"))
    config.lora.use_dora, config.model.compute_dtype = True, "float32"
    config.train.steps, config.checkpoint.every = 4, 2
    result = ql.train(config, tmp_path / "run", report=quiet_report()[0])
    assert result.heldout_after < result.heldout_before
    trained, _ = ql.load_trained(tmp_path / "run")
    start, _ = ql.load_trained(tmp_path / "run", step=2)
    after, before = (m.layers.mlp.down_proj.lora_magnitude.get_value() for m in (trained, start))
    assert after.shape == before.shape == (2, trained.config.hidden_size)
    assert np.abs(after - before).max() > 1e-3
    adapter = ql.save_adapter(trained, tmp_path / "peft", base_model=str(model))
    base, _ = ql.load_model(model, block_size=32)
    ids = jnp.arange(8)[None]
    np.testing.assert_array_equal(ql.load_adapter(base, adapter)(ids), trained(ids))


def test_quantized_tensors_of_another_dtype_are_decoded_as_asked():
    w = dataclasses.replace(ql.quantize(normal(1, N, K)), dtype=jnp.float16)
    norm = adapted_norm(w, jnp.zeros((K, 1)), jnp.zeros((1, N)), 1.0)
    np.testing.assert_allclose(norm, jnp.linalg.norm(ql.dequantize(w, jnp.float32), axis=1), 1e-6)
