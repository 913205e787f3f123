"""The Linen twin: existing models by interception, new ones with QLoRADense."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import ConfigError
from qlora_jax.flax_linen import QLoRADense, apply_qlora
from qlora_jax.lora import merge_lora
from qlora_jax.lora_init import init_lora
from qlora_jax.quantized import QuantizedTensor, quantize_params

WHERE = r".*(up|down)/kernel"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(24, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, use_bias=False, name="down")(h)


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layer_{i}")(x)
        return nn.Dense(11, name="head")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Block)
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "qlora_dropout": True},
            length=2,
        )
        x, _ = scan(layer(name="layers"), x, None)
        return nn.Dense(11, name="head")(x)


def prepared(make, seed=0):
    model, x = make(), jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    params = model.init(jax.random.key(seed), x)["params"]
    frozen = quantize_params(params, where=WHERE)
    return model, x, frozen, init_lora(jax.random.key(1), frozen, rank=4)


def trained(lora):
    def moved(leaf):
        return leaf + 0.05 * np.random.default_rng(leaf.size).normal(size=leaf.shape)

    return jax.tree.map(moved, lora)


@pytest.mark.parametrize("make", [Loop, Scanned])
def test_a_new_adapter_changes_no_bit_of_an_existing_model(make):
    model, x, frozen, lora = prepared(make)
    base = jax.jit(lambda x: apply_qlora(model, frozen, {}, x))(x)
    adapted = jax.jit(lambda lora, x: apply_qlora(model, frozen, lora, x))(lora, x)
    assert (adapted == base).all() and base.shape == (3, 11)


@pytest.mark.parametrize("make", [Loop, Scanned])
def test_merged_parameters_are_plain_ones_that_say_the_same(make):
    model, x, frozen, lora = prepared(make)
    lora = trained(lora)
    merged, report = merge_lora(frozen, lora, alpha=8.0)
    y = apply_qlora(model, frozen, lora, x, alpha=8.0)
    np.testing.assert_allclose(y, model.apply({"params": merged}, x), rtol=1e-4, atol=1e-4)
    assert len(report) == (4 if make is Loop else 2)
    assert not np.allclose(y, apply_qlora(model, frozen, {}, x))


@pytest.mark.parametrize("make", [Loop, Scanned])
def test_gradients_reach_every_adapter(make):
    model, x, frozen, lora = prepared(make)
    grads = jax.jit(jax.grad(lambda lora: apply_qlora(model, frozen, lora, x).sum()))(trained(lora))
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads))


def test_adapters_on_a_dense_base():
    model, x, _, _ = prepared(Loop)
    params = model.init(jax.random.key(0), x)["params"]
    lora = init_lora(jax.random.key(1), params, rank=2, where=WHERE)
    y = apply_qlora(model, params, lora, x)
    np.testing.assert_allclose(y, model.apply({"params": params}, x), rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_differs_between_layers():
    model, x, frozen, lora = prepared(Loop)
    lora = trained(lora)

    def run(key=None, rate=0.5):
        return apply_qlora(model, frozen, lora, x, dropout=rate, dropout_key=key)

    assert (run() == run(rate=0.0)).all()
    assert (run(jax.random.key(0)) == run(jax.random.key(0))).all()
    assert (run(jax.random.key(0)) != run(jax.random.key(1))).any()


def test_another_method_and_other_modules_work():
    class Attention(nn.Module):
        def setup(self):
            self.attention = nn.MultiHeadDotProductAttention(2)
            self.up = nn.Dense(5)

        def run(self, x):
            return self.up(self.attention(x))

    model, x = Attention(), jnp.ones((2, 3, 8))
    params = model.init(jax.random.key(0), x, method="run")["params"]
    frozen = quantize_params(params, where="up/kernel")
    lora = init_lora(jax.random.key(0), frozen, rank=2)
    assert apply_qlora(model, frozen, lora, x, method="run").shape == (2, 3, 5)
    frozen = quantize_params(params, where="attention/out/kernel")
    with pytest.raises(ConfigError, match="attention/out is a DenseGeneral"):
        apply_qlora(model, frozen, {}, x, method="run")


def test_adapters_of_another_model_are_refused():
    model, x, frozen, lora = prepared(Loop)
    with pytest.raises(ConfigError, match="'layer_7'.*layer_0, layer_1"):
        apply_qlora(model, frozen, {"layer_7": lora["layer_0"]}, x)


def test_the_layer_trains_its_lora_collection_alone():
    layer = QLoRADense(6, rank=3, dropout=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert isinstance(variables["quantized"]["kernel"], QuantizedTensor)
    assert jax.tree.map(jnp.shape, variables["lora"]) == {"lora_a": (8, 3), "lora_b": (3, 6)}
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    rest = {name: variables[name] for name in ("params", "quantized")}
    grads = jax.grad(lambda lora: layer.apply({"lora": lora, **rest}, x).sum())(variables["lora"])
    assert grads["lora_b"].any() and not grads["lora_a"].any()
    lora = trained(variables["lora"])
    training = layer.clone(deterministic=False)
    dropped = training.apply({"lora": lora, **rest}, x, rngs={"dropout": jax.random.key(1)})
    assert (dropped != layer.apply({"lora": lora, **rest}, x)).any()
