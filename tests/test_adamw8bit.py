"""AdamW in 8 bits: against bitsandbytes, against NumPy, against its own pieces."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from pallas_kernels.formats import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.optim.adamw8bit import _SIGNED, _UNSIGNED, Moment8bit, _nearest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adamw8bit.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def apply(tx, jit=True):
    def step(grad, state, params):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step) if jit else step


def random(seed, shape, dtype=jnp.float32, decades=4):
    """Numbers whose sizes differ by decades within a block."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-decades, 0, shape)
    return jnp.asarray(x, dtype)


# -------------------------------------------------------------------------------------- the maps


def test_the_maps_are_those_of_bitsandbytes(golden):
    np.testing.assert_array_equal(DYNAMIC_MAP, golden["qmap1"])
    np.testing.assert_array_equal(UNSIGNED_DYNAMIC_MAP, golden["qmap2"])


@pytest.mark.parametrize("codebook", [_SIGNED, _UNSIGNED], ids=["signed", "unsigned"])
def test_a_code_is_that_of_the_nearest_value(codebook):
    rng = np.random.default_rng(0)
    ties = codebook.midpoints[:-1]
    near = [np.nextafter(ties, np.float32(to)) for to in (-1, 2)]
    x = np.concatenate([rng.uniform(0, 1, 10**5), 10 ** rng.uniform(-9, 0, 10**5), *near, [0, 1]])
    x = np.float32(np.concatenate([x, -x]) if codebook.zero else x)
    values = codebook.values.astype(np.float64)
    right = np.clip(np.searchsorted(values, x), 1, 255)
    want = np.where(x - values[right - 1] <= values[right] - x, right - 1, right)
    if codebook.zero == 0:  # what is above zero stays above it
        want = np.maximum(want, x > 0)
    got = np.asarray(jax.jit(lambda x: _nearest(x, codebook))(x))
    distance = np.abs(values[got] - x) - np.abs(values[want] - x)
    # A midpoint rounded to float32 may fall to the other side of itself.
    assert distance.max() < 1e-8 and np.mean(got != want) < 1e-3
    np.testing.assert_array_equal(_nearest(jnp.asarray(codebook.values), codebook), np.arange(256))


# ------------------------------------------------------------------------------------ parity


def test_20_steps_are_those_of_bitsandbytes(golden):
    """Within the bounds of bitsandbytes' own test of its optimizer: means of 6e-5 and 6e-4."""
    tx = ql.adamw8bit(1e-2, weight_decay=0.1, min_8bit_size=256)
    step, params = apply(tx), jnp.asarray(golden["start"])
    state, kept = tx.init(params), []
    for i, grad in enumerate(golden["grads"]):
        params, state = step(jnp.asarray(grad, jnp.float32), state, params)
        if i in (0, 9, 19):
            kept.append(params)
    theirs = golden["params"]
    np.testing.assert_allclose(kept[0], theirs[0], rtol=1e-6, atol=3e-7)
    error = np.abs(np.stack(kept) - theirs)
    assert error.mean() < 6e-5 and (error / np.abs(theirs)).mean() < 6e-4
    # Much nearer to them than float32 moments would be: what is tested is not AdamW alone.
    assert error[-1].mean() < 0.05 * np.abs(float32_steps(golden) - theirs[-1]).mean()
    used = np.delete(np.arange(18), 9 + 3)  # block 3 of row 1 has no gradients
    for name, moment, values in (
        ("1", state.mu, DYNAMIC_MAP),
        ("2", state.nu, UNSIGNED_DYNAMIC_MAP),
    ):
        scales = np.asarray(moment.scales).ravel()
        np.testing.assert_allclose(scales, golden[f"absmax{name}"], rtol=1e-6)
        ours = np.asarray(moment.codes).reshape(18, 256)[used]
        theirs = golden[f"state{name}"].reshape(18, 256)[used]
        assert np.mean(ours != theirs) < 0.02
        # Nowhere further apart than two neighbours in the map.
        assert np.abs(values[ours] - values[theirs]).max() < 1.01 * np.diff(values).max()
        assert scales[9 + 3] == 0


def float32_steps(golden):
    tx, params = optax.adamw(1e-2, weight_decay=0.1), jnp.asarray(golden["start"])
    step, state = apply(tx), tx.init(params)
    for grad in golden["grads"]:
        params, state = step(jnp.asarray(grad, jnp.float32), state, params)
    return np.asarray(params)


def rounded_to(values, x):
    """`x`, in blocks of 256, as the nearest values of a map times the block's maximum."""
    blocks = x.reshape(-1, 256)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    unit = blocks / np.where(scale > 0, scale, 1)
    code = np.abs(unit[..., None] - values).argmin(axis=-1)
    if values[0] == 0:
        code = np.maximum(code, unit > 0)
    return (values[code] * scale).reshape(x.shape)


def test_it_is_adamw_with_moments_rounded_after_every_step():
    shape, rate, b1, b2, eps, decay = (2, 4, 256), 1e-2, 0.8, 0.95, 1e-6, 0.1
    tx = ql.adamw8bit(rate, b1, b2, eps, decay, min_8bit_size=1024)
    params = random(0, shape)
    state, step = tx.init(params), apply(tx)
    want = np.asarray(params, np.float64)
    m, v = np.zeros(shape), np.zeros(shape)
    for t in range(1, 6):
        grad = random(t, shape)
        params, state = step(grad, state, params)
        g = np.asarray(grad, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        want = want - rate * (direction + decay * want)
        m, v = rounded_to(DYNAMIC_MAP, m), rounded_to(UNSIGNED_DYNAMIC_MAP, v)
    error = np.abs(np.asarray(params) - want)
    # float32 sums put a few values on the other side of a midpoint
    assert np.quantile(error, 0.99) < 1e-6 and error.max() < 1e-3
    assert np.abs(want - np.asarray(random(0, shape))).mean() > 0.01


def test_float32_leaves_are_adamw():
    params = {"short rows": random(0, (5, 12)), "one axis": random(1, (5000,))}
    ours, theirs = ql.adamw8bit(1e-3, weight_decay=0.1), optax.adamw(1e-3, weight_decay=0.1)
    states = [ours.init(params), theirs.init(params)]
    both = [params, params]
    for seed in range(5):
        grads = jax.tree.map(lambda x, s=seed: jnp.sin(3 * x + s), params)
        for i, tx in enumerate((ours, theirs)):
            both[i], states[i] = apply(tx)(grads, states[i], both[i])
    assert {x.dtype for x in jax.tree.leaves(states[0].mu)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *both)


# ------------------------------------------------------------------------- memory and pieces


def test_moments_take_a_quarter():
    params = {"lora_a": jnp.zeros((4, 64, 512)), "lora_b": jnp.zeros((4, 512, 64), jnp.bfloat16)}
    state = ql.adamw8bit(1e-3).init(params)
    size = sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu)))
    assert size == (2 + 8 / 256) * 2 * 4 * 64 * 512
    for param, moment in zip(params.values(), state.mu.values(), strict=True):
        assert moment.codes.shape == param.shape and moment.scales.shape == (4, 128)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 8, 100), (6, 8, 128), (6, 300), (6, 7), (40,)])
def test_pieces_along_axis_0_get_the_results_of_the_whole_to_the_bit(shape, weight_decay, dtype):
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    tx = ql.adamw8bit(schedule, weight_decay=weight_decay, min_8bit_size=300)

    def step(grad, state, params):
        # What stands around the update invites other roundings in a piece than in the whole.
        updates, state = tx.update(grad / 3.0, state, params)
        return optax.apply_updates(params, updates), state

    def cut(tree, i, j):
        return jax.tree.map(lambda x: x[i:j] if x.ndim else x, tree)

    def in_pieces(*arguments):
        done = [step(*cut(arguments, i, j)) for i, j in ((0, 1), (1, 3), (3, shape[0]))]
        return jax.tree.map(lambda *x: jnp.concatenate(x) if x[0].ndim else x[0], *done)

    params = random(0, shape, dtype)
    whole = pieces = params, tx.init(params)
    step_whole, step_pieces = jax.jit(step), jax.jit(in_pieces)
    for seed in range(8):
        grad = random(seed, shape, dtype)
        whole = step_whole(grad, whole[1], whole[0])
        pieces = step_pieces(grad, pieces[1], pieces[0])
        jax.tree.map(np.testing.assert_array_equal, whole, pieces)
    assert isinstance(whole[1].mu, Moment8bit) == (len(shape) > 1 and shape[1] > 7)


def test_it_works_under_jit_vmap_and_scan():
    tx = ql.adamw8bit(1e-2, min_8bit_size=256)
    params = random(0, (3, 2, 300))
    grads = jnp.stack([random(seed, params.shape) for seed in range(4)])

    def train(params, grads):
        def body(carry, grad):
            return apply(tx, jit=False)(grad, carry[1], carry[0]), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

    eager = params, tx.init(params)
    for grad in grads:
        eager = apply(tx, jit=False)(grad, eager[1], eager[0])
    scanned = jax.jit(train)(params, grads)
    jax.tree.map(np.testing.assert_array_equal, scanned, eager)
    many = jax.jit(jax.vmap(train))(jnp.stack([params, 2 * params]), jnp.stack([grads, -grads]))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), many, scanned)


# ---------------------------------------------------------------------------- what may come up


def one_step(grad, **options):
    params = jnp.ones_like(grad)
    tx = ql.adamw8bit(1e-2, min_8bit_size=256, **options)
    return apply(tx)(grad, tx.init(params), params)


def test_gradients_of_zero_change_nothing():
    params, state = one_step(jnp.zeros((2, 512)))
    np.testing.assert_array_equal(params, 1.0)
    np.testing.assert_array_equal(state.nu.scales, 0.0)
    decayed, _ = one_step(jnp.zeros((2, 512)), weight_decay=0.5)
    np.testing.assert_allclose(decayed, 1 - 1e-2 * 0.5)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-12, 1e15])
def test_huge_and_tiny_gradients_give_finite_steps(size):
    grad = jnp.full((2, 512), size)
    params = jnp.ones_like(grad)
    tx = ql.adamw8bit(1e-2, min_8bit_size=256)
    state = tx.init(params)
    for _ in range(5):
        params, state = apply(tx)(grad, state, params)
    assert np.isfinite(params).all()
    # Below eps a step is smaller than the rate, above it is the rate.
    assert np.abs(1 - params).max() <= 5 * 1.01e-2
    if size > 1:
        np.testing.assert_allclose(params, 0.95, rtol=1e-4)


def test_a_second_moment_above_zero_stays_above_zero():
    """Else the next gradient of zero would be divided by eps."""
    grad = jnp.full((1, 256), 1e-4).at[0, 0].set(1.0)
    params, state = one_step(grad)
    assert np.asarray(state.nu.codes)[0, 1] == 1
    tx = ql.adamw8bit(1e-2, min_8bit_size=256)
    after, _ = apply(tx)(jnp.zeros_like(grad), state, params)
    assert np.abs(after - params).max() < 0.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_shows(bad):
    """1e30 has a square that is not."""
    grad = jnp.ones((2, 512)).at[1, 300].set(bad)
    params, state = one_step(grad)
    tx = ql.adamw8bit(1e-2, min_8bit_size=256)
    params, state = apply(tx)(jnp.ones_like(grad), state, params)
    params = np.asarray(params)
    assert np.isnan(params[1, 256:]).any()
    # Blocks beside it go on.
    assert np.isfinite(params[0]).all() and np.isfinite(params[1, :256]).all()


def test_updates_have_the_gradients_dtype():
    tx = ql.adamw8bit(1e-2)
    params = {"lora_a": random(0, (2, 16, 256), jnp.bfloat16, decades=1)}
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["lora_a"].dtype == jnp.bfloat16
    assert state.mu["lora_a"].scales.dtype == jnp.float32
    np.testing.assert_allclose(np.abs(updates["lora_a"].astype(np.float32)), 1e-2, rtol=1e-2)


def test_weight_decay_without_parameters_is_refused():
    tx = ql.adamw8bit(1e-2, weight_decay=0.1)
    grads = jnp.ones((2, 4096))
    with pytest.raises(ValueError, match="params"):
        tx.update(grads, tx.init(grads))
    updates, _ = ql.adamw8bit(1e-2).update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, -1e-2, rtol=1e-5)


def test_leaves_that_are_masked_out_stay_out():
    params = {"a": jnp.ones((2, 4096)), "b": jnp.ones((2, 4096))}
    tx = optax.masked(ql.adamw8bit(1e-2), {"a": True, "b": False})
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"], 1.0)
    assert np.all(np.asarray(updates["a"]) < 0)
    empty = ql.adamw8bit(1e-2)
    assert empty.update({}, empty.init({}), {})[0] == {}


def test_a_checkpoint_brings_the_state_back(tmp_path):
    tx = ql.adamw8bit(1e-2)
    params = {"a": random(0, (2, 4096)), "b": random(1, (2, 8))}
    _, state = apply(tx)(params, tx.init(params), params)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        found, _ = checkpoints.restore(1, jax.eval_shape(tx.init, params))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
