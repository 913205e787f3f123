"""Long rows: layers in chunks, inputs in the host's memory, no mask. Same values, less memory."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_models import random_model
from llama_models import tiny_config as tiny_llama
from tiny_run import quiet_report, tiny_config, write_data, write_model

from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.models.attention import attend
from qlora_jax.models.long_rows import attend_by_heads, fold_streams, map_tokens
from qlora_jax.training import train
from qlora_jax.training.building import split_model
from qlora_jax.training.step import next_token_loss

LENGTH, ROWS = 24, 2


def adapted(dropout=0.0, lora_dtype=jnp.float32, shape=(), **options):
    """A tiny model with adapters that have an effect: B is not zero."""
    shape = dict(hidden_size=32, intermediate_size=64, head_dim=8) | dict(shape)
    model = random_model(tiny_llama(**shape), **options)
    model = apply_qlora(
        model,
        rank=4,
        block_size=32,
        dropout=dropout,
        lora_dtype=lora_dtype,
        rngs=nnx.Rngs(1),
    )
    model.train()
    graphdef, lora, frozen = split_model(model)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    lora = jax.tree.map(
        lambda x: x + (0.05 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), lora
    )
    return graphdef, lora, frozen


def rows(segments=1):
    """Two rows, the second padded; with more segments, packed."""
    rng = np.random.default_rng(0)
    shape = ROWS, LENGTH
    real = np.arange(LENGTH) < np.array([LENGTH, LENGTH - 7])[:, None]
    segment_ids = np.where(real, 1 + np.arange(LENGTH) * segments // LENGTH, 0)
    starts = np.diff(segment_ids, axis=1, prepend=0) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), axis=1)
    return {
        "tokens": (rng.integers(1, 32, shape) * real).astype(np.int32),
        "loss_mask": (rng.random(shape) < 0.7).astype(np.int32) * real,
        "segment_ids": segment_ids.astype(np.int32),
        "positions": ((np.arange(LENGTH) - first) * real).astype(np.int32),
    }


def loss_and_gradient(batch, packed=True, **options):
    graphdef, lora, frozen = adapted(**options)

    def loss(lora):
        model = nnx.merge(graphdef, lora, frozen)
        return next_token_loss(model, batch, chunk_size=8, packed=packed)[0]

    return jax.jit(jax.value_and_grad(loss))(lora)


@functools.cache
def plain(segments=1, **shape):
    return loss_and_gradient(rows(segments), remat="full", shape=tuple(shape.items()))


def assert_close(actual, expected, tolerance):
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert one.dtype == other.dtype
        scale = float(jnp.abs(other).max())
        assert scale > 0
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance)


# ------------------------------------------------------------------------------ values, whole model


@pytest.mark.slow
def test_inputs_in_the_hosts_memory_change_no_bit():
    assert_close(loss_and_gradient(rows(), remat="offload"), plain(), tolerance=0)


def test_rows_of_one_segment_need_no_mask():
    """What is padded sees more than before, but nothing of that reaches a loss."""
    assert_close(loss_and_gradient(rows(), packed=False), plain(), tolerance=0)


@pytest.mark.parametrize(
    ("chunk", "remat"), [(8, "offload"), (7, "full"), (LENGTH * ROWS - 1, "none")]
)
def test_chunks_change_nothing(chunk, remat):
    """7 divides neither the rows nor all tokens: there is a last, padded chunk."""
    options = dict(sequence_chunk=chunk, remat=remat, packed=False)
    assert_close(loss_and_gradient(rows(), **options), plain(), tolerance=1e-5)


def test_chunks_of_packed_rows():
    actual = loss_and_gradient(rows(segments=3), sequence_chunk=8)
    assert_close(actual, plain(segments=3), tolerance=1e-5)
    assert not np.allclose(actual[0], plain()[0])


@pytest.mark.parametrize(
    "shape",
    [
        dict(sliding_window=5, full_attention_layers=(1,)),
        dict(qk_norm=True, qkv_bias=True, tie_word_embeddings=False),
        dict(num_key_value_heads=4, sliding_window=5),
    ],
    ids=lambda shape: "+".join(shape),
)
def test_chunks_of_other_architectures(shape):
    options = dict(sequence_chunk=8, packed=False, shape=tuple(shape.items()))
    assert_close(loss_and_gradient(rows(), **options), plain(**shape), tolerance=1e-5)


def test_as_many_tokens_as_a_chunk_are_computed_as_ever():
    whole = loss_and_gradient(rows(), sequence_chunk=LENGTH * ROWS)
    assert_close(whole, plain(), tolerance=0)


def test_gradients_of_16_bit_adapters_are_summed_in_float32():
    """Twelve sums rounded to bfloat16 would be off by more than one rounding."""
    options = dict(lora_dtype=jnp.bfloat16, packed=False)
    _, whole = loss_and_gradient(rows(), **options)
    _, chunked = loss_and_gradient(rows(), sequence_chunk=4, **options)
    for one, other in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        assert one.dtype == jnp.bfloat16
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.slow
def test_dropout_in_chunks():
    """The backward pass drops what the forward pass dropped: a difference quotient agrees."""
    graphdef, lora, frozen = adapted(dropout=0.5, sequence_chunk=8)
    batch = rows()

    @jax.jit
    def loss(lora):
        return next_token_loss(nnx.merge(graphdef, lora, frozen), batch, packed=False)[0]

    gradient = jax.grad(loss)(lora)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    step = jax.tree.map(lambda g: 1e-2 * g / norm, gradient)
    ahead = loss(jax.tree.map(jnp.add, lora, step))
    behind = loss(jax.tree.map(jnp.subtract, lora, step))
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)


def test_every_chunk_drops_other_places():
    model = apply_qlora(
        nnx.Linear(4, 64, rngs=nnx.Rngs(0)), where=".*", rank=64, dropout=0.5, rngs=nnx.Rngs(1)
    )
    model.kernel.set_value(jax.tree.map(jnp.zeros_like, model.kernel.get_value()))
    model.lora_a.set_value(jnp.ones((4, 64)))
    model.lora_b.set_value(jnp.eye(64))
    graphdef, state = nnx.split(model)

    def apply(state, index, x):
        from_chunk = nnx.merge(graphdef, fold_streams(state, index))
        return x, from_chunk(x)

    x = jnp.ones((64, 4))
    _, y = map_tokens(apply, 16, state, x, keeps_x=True)
    chunks = np.asarray(y).reshape(4, 16, 64)
    assert all((chunks[0] != chunk).any() for chunk in chunks[1:])


# -------------------------------------------------------------------------------------- the loops


def test_map_tokens_differentiates_like_the_function():
    def function(scale, index, x, other, count):
        return jnp.sin(x * scale) + other, other * x, count + 1

    rng = np.random.default_rng(0)
    scale, x, other = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [3, (6, 3), (6, 3)])
    count = jnp.arange(6)

    def in_chunks(scale, x, other):
        x, y, counted = map_tokens(function, 2, scale, x, other, count)
        return jnp.sum(x**2) + jnp.sum(y**3) + jnp.sum(counted)

    def whole(scale, x, other):
        x, y, counted = function(scale, 0, x, other, count)
        return jnp.sum(x**2) + jnp.sum(y**3) + jnp.sum(counted)

    for argnums in [(0, 1, 2), (1,), (0,)]:
        expected = jax.value_and_grad(whole, argnums)(scale, x, other)
        actual = jax.value_and_grad(in_chunks, argnums)(scale, x, other)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


def test_what_is_frozen_gets_no_gradient():
    """Not even one that is thrown away: nothing of its shape is summed over the chunks."""
    frozen, x = jnp.ones((3, 5)), jnp.ones((8, 3))

    def loss(scale):
        def function(state, index, x):
            return (x * state[0] + (x @ state[1]).sum(-1, keepdims=True),)

        return jnp.sum(map_tokens(function, 2, (scale, frozen), x)[0])

    text = str(jax.make_jaxpr(jax.grad(loss))(2.0))
    assert "f32[3,5]" in text
    assert not re.search(r"f32\[3,5\]\S* = (broadcast_in_dim|add)", text)


def _flash(q, k, v):
    """Attention, its logsumexp, and a tangent that occurs nowhere else in the program."""
    scores = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return attend(q, k, v, None) + 1e-30 * jnp.tan(q), jax.nn.logsumexp(scores, -1), scores


@jax.custom_vjp
def flash(q, k, v):
    return _flash(q, k, v)[0]


def _flash_forward(q, k, v):
    y, logsumexp, _ = _flash(q, k, v)
    return y, (q, k, v, logsumexp, y)


def _flash_backward(residuals, dy):
    q, k, v, logsumexp, y = residuals
    weights = jnp.exp(_flash(q, k, v)[2] - logsumexp[..., None])
    dv = jnp.einsum("bnts,btnh->bsh", weights, dy)[:, :, None]
    delta = jnp.einsum("btnh,btnh->bnt", y, dy)[..., None]
    d_scores = weights * (jnp.einsum("btnh,bsh->bnts", dy, v[:, :, 0]) - delta)
    d_scores *= q.shape[-1] ** -0.5
    dq = jnp.einsum("bnts,bsh->btnh", d_scores, k[:, :, 0])
    return dq, jnp.einsum("bnts,btnh->bsh", d_scores, q)[:, :, None], dv


flash.defvjp(_flash_forward, _flash_backward)


@pytest.mark.parametrize(("stores", "forward_passes"), [(True, 1), (False, 2)])
def test_attention_by_heads(stores, forward_passes):
    """With `stores`, the backward pass has output and logsumexp from the forward pass."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, n, 8)), jnp.float32) for n in (4, 2, 2))

    def whole(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, None)))

    def by_heads(q, k, v):
        y = attend_by_heads(lambda q, k, v, mask: flash(q, k, v), q, k, v, None, stores=stores)
        return jnp.sum(jnp.sin(y))

    gradient = jax.jit(jax.grad(by_heads, (0, 1, 2)))
    for one, other in zip(gradient(q, k, v), jax.grad(whole, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    text = gradient.lower(q, k, v).compile().as_text()
    assert len(re.findall(r"= f32\[[\d,]*\]\S* tan\(", text)) == forward_passes


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_some_queries_at_a_time(window, masked):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 11, n, 8)), jnp.float32) for n in (4, 2, 2))
    mask = jnp.asarray(rng.random((2, 1, 11, 11)) < 0.5) | jnp.eye(11, dtype=bool)
    mask = mask if masked else None

    def loss(query_chunk, q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, window, query_chunk)))

    expected = jax.value_and_grad(functools.partial(loss, 0), (0, 1, 2))(q, k, v)
    actual = jax.value_and_grad(functools.partial(loss, 4), (0, 1, 2))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), actual, expected)


# ------------------------------------------------------------------------------------------ memory


def temporaries(batch_options, **options):
    """Bytes that the gradient of a long row takes on this CPU beside its arguments."""
    length = 2048
    graphdef, lora, frozen = adapted(**options)
    one = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = dict.fromkeys(("tokens", "loss_mask", "segment_ids", "positions"), one)

    def loss(lora, frozen, batch):
        model = nnx.merge(graphdef, lora, frozen)
        return next_token_loss(model, batch, chunk_size=64, **batch_options)[0]

    compiled = jax.jit(jax.grad(loss)).lower(lora, frozen, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_chunks_need_less_memory_on_a_cpu():
    """2048 x 2048 scores of four heads in float32 are 64 MiB; in chunks of 64, 2 MiB."""
    whole = temporaries(dict(packed=False), remat="full")
    chunked = temporaries(dict(packed=False), remat="full", sequence_chunk=64)
    assert whole > 128 * 2**20
    assert chunked < 16 * 2**20


# ------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return write_model(folder / "model"), write_data(folder / "data.jsonl")


def run(material, workdir, **fields):
    config = tiny_config(*material)
    config.model.compute_dtype = "float32"
    config.lora.dropout = 0.0
    config.data.packing = False
    config.update_from_flattened_dict(fields)
    train(config, workdir, report=quiet_report()[0])
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


@pytest.mark.slow
def test_a_run_with_everything_on_learns_the_same(material, tmp_path):
    long = {"model.remat": "offload", "model.sequence_chunk": 16}
    losses = run(material, tmp_path / "plain")
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(run(material, tmp_path / "long", **long), losses, rtol=1e-5)
