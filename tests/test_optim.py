import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.errors import ConfigError
from qlora_jax.optim import make_optimizer, make_schedule
from qlora_jax.optim.recipe import OPTIMIZERS


def rates(steps, **options):
    schedule = make_schedule(0.5, **options)
    return np.array([float(schedule(step)) for step in range(steps)])


def test_constant_is_constant():
    np.testing.assert_array_equal(rates(5), 0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_never_starts_at_zero(schedule):
    got = rates(5, schedule=schedule, warmup_steps=4, total_steps=100)
    np.testing.assert_allclose(got, [0.125, 0.25, 0.375, 0.5, 0.5], rtol=1e-6)


def test_linear_and_cosine_fall_to_zero_at_the_end():
    linear = rates(11, schedule="linear", warmup_steps=2, total_steps=10)
    np.testing.assert_allclose(linear[2:], 0.5 * np.maximum(8 - np.arange(9), 0) / 8, atol=1e-7)
    cosine = rates(11, schedule="cosine", warmup_steps=2, total_steps=10)
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(cosine[2:], expected, atol=1e-7)


def test_schedules_refuse_what_they_cannot_do():
    with pytest.raises(ConfigError, match="'sawtooth'.*constant, linear, cosine"):
        make_schedule(0.1, schedule="sawtooth")
    with pytest.raises(ConfigError, match="warmup_steps=10.*run of 10 steps"):
        make_schedule(0.1, schedule="cosine", warmup_steps=10, total_steps=10)


def adamw_by_hand(params, grads, learning_rate, b1, b2, eps, decay, max_norm):
    mean, square = np.zeros_like(params), np.zeros_like(params)
    for step, grad in enumerate(grads, start=1):
        grad = grad * min(1.0, max_norm / np.linalg.norm(grad))
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        direction = (mean / (1 - b1**step)) / (np.sqrt(square / (1 - b2**step)) + eps)
        params = params - learning_rate * (direction + decay * params)
    return params


def test_optimizer_is_clipped_adamw():
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=6), rng.normal(size=(5, 6))
    tx = make_optimizer(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=0.3)
    params = jnp.asarray(start, jnp.float32)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    expected = adamw_by_hand(start, grads, 1e-2, 0.8, 0.95, 1e-6, 0.1, 0.3)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_zero_max_grad_norm_turns_clipping_off():
    grad = {"lora_a": jnp.full((3,), 100.0)}
    first_moments = []
    for max_grad_norm in (0.0, 0.3):
        tx = make_optimizer(1.0, max_grad_norm=max_grad_norm)
        _, state = tx.update(grad, tx.init(grad), grad)
        first_moments += [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)][:1]
    np.testing.assert_allclose(first_moments[0], 10.0, rtol=1e-5)
    assert float(jnp.linalg.norm(first_moments[1])) == pytest.approx(0.03, rel=1e-5)


def test_moments_of_16_bit_adapters_are_in_float32_and_do_not_stand_still():
    tx = make_optimizer(1e-3, max_grad_norm=0)
    params = {"lora_b": jnp.ones((4, 8), jnp.bfloat16)}
    state = tx.init(params)
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    for _ in range(30):
        updates, state = tx.update(gradient, state, params)
    assert updates["lora_b"].dtype == jnp.bfloat16
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    second = min(moments, key=lambda x: float(x.max()))
    np.testing.assert_allclose(second, 0.25 * (1 - 0.999**30), rtol=1e-4)


def test_float32_adapters_get_the_updates_of_adamw_to_the_bit():
    ours = make_optimizer(1e-3, max_grad_norm=0)
    theirs = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    params = {"lora_a": jax.random.normal(jax.random.key(0), (8, 16))}
    states = ours.init(params), theirs.init(params)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(states[0])) == jax.tree.map(
        jnp.shape, jax.tree.leaves(states[1])
    )
    for seed in range(3):
        gradient = jax.tree.map(lambda x, s=seed: jnp.sin(x + s), params)
        (mine, a), (its, b) = (
            tx.update(gradient, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        )
        states = a, b
        np.testing.assert_array_equal(mine["lora_a"], its["lora_a"])


def test_an_optimizer_has_a_name():
    params = {"lora_a": jnp.ones((2, 4096), jnp.bfloat16)}
    gradient = {"lora_a": jnp.full((2, 4096), 0.5, jnp.bfloat16)}
    sizes = {}
    for name in OPTIMIZERS:
        tx = make_optimizer(1e-2, name=name, max_grad_norm=1.0)
        state = tx.init(params)
        updates, _ = tx.update(gradient, state, params)
        assert updates["lora_a"].dtype == jnp.bfloat16
        # The first step of each is the rate, against the gradient.
        np.testing.assert_allclose(updates["lora_a"].astype(np.float32), -1e-2, rtol=1e-2)
        sizes[name] = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) / 8192
    assert sizes == {"adamw": 8, "adamw8bit": 2 + 8 / 256, "lion": 4}
    with pytest.raises(ConfigError, match="'adam'.*adamw, adamw8bit, lion"):
        make_optimizer(name="adam")
