"""LoRA against its meaning in float64, and the promises of its pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.errors import ConfigError
from qlora_jax.lora import lora_delta, lora_matmul, lora_scaling, merge_lora, merge_weight
from qlora_jax.lora_init import init_adapter, init_lora
from qlora_jax.quantized import QuantizedTensor, dequantize, matmul, quantize


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def trained_adapter(in_features, out_features, rank, leading=(), seed=7):
    return {
        "lora_a": jnp.asarray(normal(seed, *leading, in_features, rank)),
        "lora_b": jnp.asarray(normal(seed + 1, *leading, rank, out_features) * 0.1),
    }


def stack_quantized(w, **options):
    return jax.tree.map(lambda *x: jnp.stack(x), *[quantize(m, **options) for m in w])


def reference(x, w, adapter, alpha, use_rslora=False):
    """The formula of the module docstring in float64; w is (out, in)."""
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, w, adapter["lora_a"], adapter["lora_b"]))
    rank = a.shape[1]
    return x @ w.T + (x @ a @ b) * (alpha / (np.sqrt(rank) if use_rslora else rank))


def test_scaling():
    assert lora_scaling(8, 16.0) == 2.0
    assert lora_scaling(16, 8.0, use_rslora=True) == 2.0


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8"])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ConfigError, match="rank="):
        init_adapter(jax.random.key(0), 4, 4, rank=rank)


def test_init_is_pefts():
    adapter = init_adapter(jax.random.key(0), 400, 30, rank=64, leading_shape=(2,))
    a = np.asarray(adapter["lora_a"])
    assert a.shape == (2, 400, 64) and adapter["lora_b"].shape == (2, 64, 30)
    assert not adapter["lora_b"].any()
    # kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(fan_in): std bound / sqrt(3)
    assert 0.049 < np.abs(a).max() <= 0.05
    assert abs(a.std() * np.sqrt(3) - 0.05) < 5e-4
    assert not np.array_equal(a[0], a[1])


def test_the_tree_of_adapters_as_one_literal():
    params = {
        "embed": {"embedding": jnp.ones((11, 8))},
        "layers": {
            "q_proj": {"kernel": stack_quantized(normal(0, 3, 4, 8)), "bias": jnp.ones((3, 4))},
            "mlp": [{"kernel": quantize(normal(1, 6, 8))}, {"kernel": quantize(normal(2, 8, 6))}],
        },
    }
    lora = init_lora(jax.random.key(0), params, rank=2, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), lora) == {
        "layers": {
            "q_proj": {
                "lora_a": ((3, 8, 2), "bfloat16"),
                "lora_b": ((3, 2, 4), "bfloat16"),
            },
            "mlp": {
                0: {"lora_a": ((8, 2), "bfloat16"), "lora_b": ((2, 6), "bfloat16")},
                1: {"lora_a": ((6, 2), "bfloat16"), "lora_b": ((2, 8), "bfloat16")},
            },
        }
    }


def test_where_takes_dense_kernels_and_narrows_quantized_ones():
    params = {"q": {"kernel": jnp.ones((5, 8, 4))}, "k": {"kernel": quantize(normal(0, 4, 8))}}
    both = init_lora(jax.random.key(0), params, rank=1, where=".*/kernel")
    assert both["q"]["lora_a"].shape == (5, 8, 1) and both["k"]["lora_b"].shape == (1, 4)
    assert list(init_lora(jax.random.key(0), params, rank=1)) == ["k"]
    assert list(init_lora(jax.random.key(0), params, rank=1, where="q/kernel")) == ["q"]


def test_init_works_on_shapes_alone():
    params = {"q": {"kernel": quantize(normal(0, 4, 8))}}
    lora = jax.eval_shape(lambda p: init_lora(jax.random.key(0), p, rank=2), params)
    assert lora["q"]["lora_a"].shape == (8, 2)


@pytest.mark.parametrize(
    ("params", "where", "message"),
    [
        ({"q": {"kernel": jnp.ones((2, 2))}}, None, "no QuantizedTensor.*q/kernel"),
        ({"q": {"kernel": jnp.ones((2, 2))}}, "v/.*", r"'v/\.\*' matches no weight.*q/kernel"),
        ({"q": {"bias": jnp.ones(2)}}, ".*", r"'q/bias' of shape \(2,\)"),
        ({"q": {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}}, ".*", "two weights.*parent 'q'"),
    ],
)
def test_a_choice_that_cannot_be_adapted_is_refused(params, where, message):
    with pytest.raises(ConfigError, match=message):
        init_lora(jax.random.key(0), params, rank=2, where=where)


@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 40),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 16.0, 5.5]),
    use_rslora=st.booleans(),
    quantized=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_lora_matmul_means_its_formula(
    batch, in_features, out_features, rank, alpha, use_rslora, quantized
):
    x = normal(0, *batch, in_features)
    w = jnp.asarray(normal(1, out_features, in_features))
    adapter = trained_adapter(in_features, out_features, rank)
    weight = quantize(w) if quantized else w
    dense = dequantize(weight, jnp.float32) if quantized else w
    y = lora_matmul(jnp.asarray(x), weight, adapter, alpha=alpha, use_rslora=use_rslora)
    expected = reference(x, dense, adapter, alpha, use_rslora)
    assert y.dtype == jnp.float32 and y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-4 * max(1.0, alpha))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_compute_keeps_the_input_dtype(dtype):
    x, q = jnp.asarray(normal(0, 5, 64), dtype), quantize(normal(1, 32, 64))
    adapter = trained_adapter(64, 32, 4)
    y = lora_matmul(x, q, adapter, alpha=4.0)
    expected = reference(x, dequantize(q, dtype), adapter, 4.0)
    assert y.dtype == dtype
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_a_new_adapter_changes_no_bit(dtype, jit):
    x, q = jnp.asarray(normal(0, 7, 96), dtype), quantize(normal(1, 33, 96))
    adapter = init_adapter(jax.random.key(0), 96, 33, rank=8)
    base, adapted = matmul, lora_matmul
    if jit:
        base, adapted = jax.jit(base), jax.jit(adapted)
    y, expected = adapted(x, q, adapter), base(x, q)
    assert (y == expected).all() and y.dtype == expected.dtype


def test_gradients_reach_the_adapter_and_the_input():
    x, q = jnp.asarray(normal(0, 6, 16)), quantize(normal(1, 10, 16))
    adapter = trained_adapter(16, 10, 3)
    weights = normal(2, 6, 10)

    def loss(x, adapter):
        return jnp.sum(lora_matmul(x, q, adapter, alpha=6.0) * weights)

    grad_x, grads = jax.grad(loss, argnums=(0, 1))(x, adapter)
    a, b = (np.asarray(adapter[name], np.float64) for name in ("lora_a", "lora_b"))
    dense = np.asarray(dequantize(q, jnp.float32), np.float64)
    np.testing.assert_allclose(grads["lora_a"], 2.0 * x.T @ (weights @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"], 2.0 * (x @ a).T @ weights, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_x, weights @ (dense + 2.0 * (a @ b).T), rtol=1e-4, atol=1e-4)


def test_gradients_have_the_adapters_dtype():
    x, q = jnp.asarray(normal(0, 6, 16), jnp.bfloat16), quantize(normal(1, 10, 16))
    adapter = trained_adapter(16, 10, 3)
    grads = jax.grad(lambda a: lora_matmul(x, q, a).astype(jnp.float32).sum())(adapter)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_dropout_is_on_the_adapters_input_only_and_needs_a_key():
    x, q = jnp.ones((400, 64)), quantize(normal(1, 8, 64))
    adapter = {"lora_a": jnp.eye(64), "lora_b": jnp.ones((64, 8)) / 64}
    run = jax.jit(lambda key: lora_matmul(x, q, adapter, alpha=64.0, dropout=0.25, key=key))
    delta = run(jax.random.key(0)) - matmul(x, q)
    # delta is the mean of 64 inputs, each 0 or 1 / 0.75
    np.testing.assert_allclose(delta * 48, np.round(delta * 48), atol=1e-3)
    np.testing.assert_allclose(delta.mean(), 1.0, atol=0.01)
    np.testing.assert_allclose(delta.std(), np.sqrt(1 / 3 / 64), rtol=0.1)
    assert (run(jax.random.key(0)) == run(jax.random.key(0))).all()
    assert (run(jax.random.key(0)) != run(jax.random.key(1))).any()
    evaluation = lora_matmul(x, q, adapter, alpha=64.0, dropout=0.25)
    assert (evaluation == lora_matmul(x, q, adapter, alpha=64.0)).all()


def test_dropout_keeps_the_dtype():
    x, adapter = jnp.ones((3, 8), jnp.bfloat16), trained_adapter(8, 4, 2)
    assert lora_delta(x, adapter, dropout=0.5, key=jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ConfigError, match="dropout="):
        lora_delta(jnp.ones((1, 8)), trained_adapter(8, 4, 2), dropout=dropout)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_shapes_that_do_not_fit_are_shown(leading):
    with pytest.raises(ValueError, match=r"lora_a \(.*8, 2\).*expected \[9, r\]"):
        lora_delta(jnp.ones((1, 9)), trained_adapter(8, 4, 2, leading))


def test_stacked_layers_run_under_scan_and_vmap():
    w, x = normal(0, 3, 8, 8) * 0.3, jnp.asarray(normal(1, 4, 8))
    q, adapter = stack_quantized(w), trained_adapter(8, 8, 2, leading=(3,))
    scanned, _ = jax.lax.scan(lambda h, s: (lora_matmul(h, *s), None), x, (q, adapter))
    mapped = jax.vmap(lora_matmul, in_axes=(None, 0, 0))(x, q, adapter)
    h = x
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], (q, adapter))
        np.testing.assert_allclose(mapped[i], lora_matmul(x, *layer), rtol=1e-4, atol=1e-4)
        h = lora_matmul(h, *layer)
    np.testing.assert_allclose(scanned, h, rtol=1e-3, atol=1e-3)


def residual_sizes(w, x, adapter):
    """Elements of each float array that the backward pass of a layer keeps."""

    def backward(w, x, adapter):
        return jax.vjp(lambda adapter, x: lora_matmul(x, w, adapter), adapter, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, w, x, adapter))
    return [leaf.size for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_no_dense_base_weight_is_a_residual():
    x, q, adapter = jnp.ones((5, 64)), quantize(normal(1, 48, 64)), trained_adapter(64, 48, 4)
    assert max(residual_sizes(q, x, adapter)) < 48 * 64
    # the same question about a dense weight finds it
    assert 48 * 64 in residual_sizes(dequantize(q), x, adapter)


@given(
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    rank=st.integers(1, 5),
    leading=st.sampled_from([(), (2,), (2, 2)]),
    use_rslora=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_merging_dense_means_its_formula(in_features, out_features, rank, leading, use_rslora):
    w = normal(0, *leading, in_features, out_features)
    adapter = trained_adapter(in_features, out_features, rank, leading)
    merged, error = merge_weight(jnp.asarray(w), adapter, alpha=3.0, use_rslora=use_rslora)
    a, b = (np.asarray(adapter[name], np.float64) for name in ("lora_a", "lora_b"))
    exact = w + a @ b * 3.0 / (np.sqrt(rank) if use_rslora else rank)
    np.testing.assert_allclose(merged, exact, rtol=1e-5, atol=1e-5)
    assert error.max_abs.shape == error.relative_frobenius.shape == leading
    # nothing is rounded but float32 itself
    assert not error.max_abs.any()


def quantized_params(dtype=jnp.bfloat16):
    w = jnp.asarray(normal(0, 2, 32, 64) * 0.05, dtype)
    params = {
        "layers": {"q_proj": {"kernel": stack_quantized(w), "bias": jnp.ones((2, 32))}},
        "lm_head": {"kernel": jnp.ones((32, 7))},
    }
    lora = {"layers": {"q_proj": trained_adapter(64, 32, 4, leading=(2,))}}
    q = params["layers"]["q_proj"]["kernel"]
    a, b = (np.asarray(lora["layers"]["q_proj"][n], np.float64) for n in ("lora_a", "lora_b"))
    dense = np.asarray(jax.vmap(lambda m: dequantize(m, jnp.float32))(q), np.float64)
    return params, lora, np.swapaxes(dense, 1, 2) + a @ b * 0.5


def check_report(error, merged, exact):
    difference = np.asarray(merged, np.float64) - exact
    np.testing.assert_allclose(error.max_abs, np.abs(difference).max((1, 2)), rtol=1e-3)
    relative = np.linalg.norm(difference, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    np.testing.assert_allclose(error.relative_frobenius, relative, rtol=1e-3)
    return relative


def test_merge_to_dense_reports_the_rounding_per_layer():
    params, lora, exact = quantized_params()
    merged, report = merge_lora(params, lora, alpha=2.0)
    kernel = merged["layers"]["q_proj"]["kernel"]
    assert kernel.shape == (2, 64, 32) and kernel.dtype == jnp.bfloat16
    assert list(report) == ["layers/q_proj/kernel"]
    relative = check_report(report["layers/q_proj/kernel"], kernel, exact)
    assert (relative > 0).all() and (relative < 2**-8).all()
    assert merged["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert merged["layers"]["q_proj"]["bias"] is params["layers"]["q_proj"]["bias"]


def test_merge_requantized_reports_what_four_bits_cost():
    params, lora, exact = quantized_params()
    merged, report = merge_lora(params, lora, alpha=2.0, requantize=True)
    kernel, old = merged["layers"]["q_proj"]["kernel"], params["layers"]["q_proj"]["kernel"]
    assert isinstance(kernel, QuantizedTensor)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kernel) == jax.tree.map(
        lambda x: (x.shape, x.dtype), old
    )
    stored = np.swapaxes(jax.vmap(lambda m: dequantize(m, jnp.float32))(kernel), 1, 2)
    relative = check_report(report["layers/q_proj/kernel"], stored, exact)
    assert (relative > 0.01).all() and (relative < 0.2).all()


def test_merging_a_new_adapter_into_quantized_weights_costs_nothing():
    params, _, _ = quantized_params(jnp.float32)
    lora = init_lora(jax.random.key(0), params, rank=4)
    _, report = merge_lora(params, lora, alpha=2.0)
    assert not report["layers/q_proj/kernel"].max_abs.any()


def test_merging_zeros_reports_zero_not_nan():
    adapter = init_adapter(jax.random.key(0), 4, 4, rank=1)
    _, error = merge_weight(jnp.zeros((4, 4)), adapter, alpha=1.0)
    assert error.relative_frobenius == 0


@pytest.mark.parametrize("rank_in_out", [(4, 63, 32), (4, 64, 31)])
def test_an_adapter_without_its_weight_is_refused(rank_in_out):
    rank, in_features, out_features = rank_in_out
    params, _, _ = quantized_params()
    lora = {"layers": {"q_proj": trained_adapter(in_features, out_features, rank, (2,))}}
    with pytest.raises(ConfigError, match="belong to no weight.*layers/q_proj"):
        merge_lora(params, lora, alpha=2.0)
