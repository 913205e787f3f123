"""Embeddings and head in 8 bits: values, gradients, memory, loading, and who refuses what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_wheels import needs_cuda_wheels
from flax import nnx
from synthetic_checkpoint import CONFIG, write_checkpoint
from tiny_run import quiet_report, tiny_config, write_data, write_model

from qlora_jax import config as config_lib
from qlora_jax import planning, training, vocabulary
from qlora_jax.errors import ConfigError, TrainingError
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.generation import generate_ids
from qlora_jax.loading import base_fingerprint, load_model, stored_fingerprint
from qlora_jax.losses import chunked_cross_entropy
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.report import measure
from qlora_jax.targets import compile_for, find_target
from qlora_jax.vocabulary import (
    Int8Embed,
    Int8Head,
    Int8Rows,
    dequantize_rows,
    look_up,
    quantize_rows,
    quantize_vocabulary,
    rows_product,
)
from qlora_jax.weights import open_checkpoint

RNG = np.random.default_rng(0)
SHAPE = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    head_dim=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def table_of(count=50, features=24):
    """Rows of very different sizes, one of them zero."""
    table = RNG.normal(size=(count, features)) * 10.0 ** RNG.uniform(-3, 1, size=(count, 1))
    table[7] = 0.0
    return table.astype(np.float32)


@pytest.fixture(params=[1, 50, 24 * 50, 24 * 17, 24 * 10])
def piece_elements(request, monkeypatch):
    """Pieces of one row, of all rows, of a number that divides them, and of one that does not."""
    monkeypatch.setattr(vocabulary, "_PIECE_ELEMENTS", request.param)
    return request.param


def llama(tied, dtype=jnp.float32, remat="full"):
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    return Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=remat)


# ------------------------------------------------------------------------------------- the format


def test_a_row_is_its_codes_times_its_scale():
    table = table_of()
    rows = quantize_rows(jnp.asarray(table))
    absmax = np.abs(table).max(axis=1)
    np.testing.assert_allclose(rows.scale, absmax / 127, rtol=1e-6)
    assert np.abs(np.asarray(rows.codes)).max() == 127
    error = np.abs(np.asarray(dequantize_rows(rows)) - table)
    assert (error <= 0.501 * np.asarray(rows.scale)[:, None]).all()
    assert not np.asarray(rows.codes)[7].any() and rows.scale[7] == 0


def test_quantizing_what_was_quantized_changes_nothing():
    rows = quantize_rows(jnp.asarray(table_of()))
    again = quantize_rows(dequantize_rows(rows))
    np.testing.assert_array_equal(again.codes, rows.codes)


def test_a_table_counts_its_weights_and_its_bytes():
    rows = quantize_rows(jnp.asarray(table_of()))
    assert rows.shape == (50, 24) and rows.size == 1200
    size = measure({}, {"embed": rows, "norm": jnp.ones(3, jnp.bfloat16)})
    assert (size.dense, size.dense_bytes) == (1203, 1200 + 50 * 4 + 6)


# ----------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_looking_up_gives_the_row(dtype):
    rows = quantize_rows(jnp.asarray(table_of()))
    tokens = jnp.array([[3, 49], [7, 3]])
    found = look_up(rows, tokens, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, dequantize_rows(rows, dtype)[tokens])
    assert np.isnan(np.asarray(look_up(rows, jnp.array([50]), jnp.float32))).all()


def test_the_product_and_its_gradient_are_those_of_the_dense_table(piece_elements):
    rows = quantize_rows(jnp.asarray(table_of()))
    dense = dequantize_rows(rows)
    hidden = jnp.asarray(RNG.normal(size=(2, 3, 24)), jnp.float32)
    weight = jnp.asarray(RNG.normal(size=(2, 3, 50)), jnp.float32)

    def value(product):
        return jax.value_and_grad(lambda h: jnp.sum(jnp.sin(product(h)) * weight))(hidden)

    ours, expected = value(lambda h: rows_product(h, rows)), value(lambda h: h @ dense.T)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, expected
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_only_the_factors_are_rounded(dtype, piece_elements):
    rows = quantize_rows(jnp.asarray(table_of()))
    hidden = jnp.asarray(RNG.normal(size=(5, 24)), dtype)
    logits = rows_product(hidden, rows)
    assert logits.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(dequantize_rows(rows), np.float64).T
    # The codes are exact in 16 bits: what is left is the rounding of float32.
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    _, backward = jax.vjp(lambda h: rows_product(h, rows), hidden)
    gradient = jnp.asarray(RNG.normal(size=(5, 50)), jnp.float32)
    (found,) = backward(gradient)
    assert found.dtype == dtype
    exact = np.asarray(gradient, np.float64) @ np.asarray(dequantize_rows(rows), np.float64)
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


def test_small_gradients_do_not_vanish_in_float16():
    # As in a trained head: weights of 0.02, and a token that was given a probability of 1e-5.
    rows = quantize_rows(jnp.asarray(0.02 * RNG.normal(size=(64, 16)), jnp.float32))
    _, backward = jax.vjp(lambda h: rows_product(h, rows), jnp.ones((1, 16), jnp.float16))
    (found,) = backward(jnp.full((1, 64), 1e-4))
    exact = 1e-4 * np.asarray(dequantize_rows(rows)).sum(axis=0)
    np.testing.assert_allclose(found[0], exact, atol=0.02 * np.abs(exact).max())


@needs_cuda_wheels
def test_no_dense_table_exists_while_the_loss_is_computed():
    """The table would take 512 MiB in 16 bits; neither all of it nor all its pieces are there."""
    tokens, features, count = 256, 2048, 128 * 1024
    rows = Int8Rows(
        jax.ShapeDtypeStruct((count, features), jnp.int8),
        jax.ShapeDtypeStruct((count,), jnp.float32),
    )
    hidden = jax.ShapeDtypeStruct((1, 4 * tokens, features), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((1, 4 * tokens), jnp.int32)

    @jax.jit
    def gradient(hidden, rows, targets):
        def loss(h):
            head = lambda chunk: rows_product(chunk, rows)  # noqa: E731
            return chunked_cross_entropy(
                head, h, targets, jnp.ones_like(targets), chunk_size=tokens
            )

        return jax.grad(loss)(hidden)

    compiled = compile_for(gradient, hidden, rows, targets, target="h100")
    # As with a dense table: a chunk's logits, twice as much for their gradient, little else.
    logits = 4 * tokens * count
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * logits + 2**26


# --------------------------------------------------------------------------------------- surgery


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_what_its_rounded_tables_say(tied):
    model = llama(tied)
    small = quantize_vocabulary(model)
    embed = quantize_rows(model.embed_tokens.embedding[...])
    rounded = nnx.clone(model)
    rounded.embed_tokens.embedding[...] = dequantize_rows(embed)
    if not tied:
        head = dequantize_rows(quantize_rows(model.lm_head.kernel[...].T)).T
        rounded.lm_head.kernel[...] = head
    tokens = jnp.array([[1, 2, 3, 49]])
    np.testing.assert_allclose(small(tokens), rounded(tokens), rtol=1e-5, atol=1e-5)
    assert isinstance(small.embed_tokens, Int8Embed)
    assert isinstance(small.lm_head, type(None) if tied else Int8Head)
    assert type(model.embed_tokens) is nnx.Embed


def test_surgery_twice_is_surgery_once():
    once = quantize_vocabulary(llama(tied=False))
    twice = quantize_vocabulary(once)
    assert jax.tree.structure(nnx.state(once)) == jax.tree.structure(nnx.state(twice))
    assert base_fingerprint(once) == base_fingerprint(twice)


def test_an_adapted_head_is_left_to_its_adapter():
    model = apply_qlora(llama(tied=False), where=".*lm_head", rank=2, rngs=nnx.Rngs(1))
    model = quantize_vocabulary(model)
    assert isinstance(model.embed_tokens, Int8Embed) and model.lm_head.rank == 2


def test_a_head_keeps_its_bias():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(4, 9, rngs=rngs)

    model = Model(nnx.Rngs(0))
    model.head.bias[...] = jnp.arange(9.0)
    small = quantize_vocabulary(model)
    np.testing.assert_allclose(small.head(jnp.zeros((2, 4)))[1], jnp.arange(9.0))


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="no embedding"):
        quantize_vocabulary(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_the_surgery_works_without_values():
    model = nnx.eval_shape(lambda: llama(tied=False))
    small = quantize_vocabulary(model)
    value = small.lm_head.kernel.get_value()
    assert value.codes == jax.ShapeDtypeStruct((50, 16), jnp.int8)
    assert value.scale == jax.ShapeDtypeStruct((50,), jnp.float32)


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("tied", [True, False])
def test_loading_quantizes_what_is_in_the_file(tmp_path, tied):
    write_checkpoint(tmp_path, {**CONFIG, "tie_word_embeddings": tied}, shard_bytes=8_000)
    checkpoint = open_checkpoint(tmp_path)
    model, _ = load_model(tmp_path, vocab_quant_type="int8", quant_type=None)
    names = {"model.embed_tokens.weight": model.embed_tokens.embedding}
    if not tied:
        names["lm_head.weight"] = model.lm_head.kernel
    for name, variable in names.items():
        expected = quantize_rows(jnp.asarray(checkpoint.read(name)))
        np.testing.assert_array_equal(variable.get_value().codes, expected.codes)
        np.testing.assert_array_equal(variable.get_value().scale, expected.scale)
    assert np.isfinite(np.asarray(model(jnp.array([[1, 2]])))).all()
    assert generate_ids(model, [[1, 2, 3]], max_new_tokens=3)


def test_the_fingerprint_knows_the_vocabulary_but_not_the_compute_dtype(tmp_path):
    write_checkpoint(tmp_path, CONFIG, shard_bytes=8_000)

    def fingerprint(**options):
        return base_fingerprint(load_model(tmp_path, **options)[0])

    dense, small = fingerprint(), fingerprint(vocab_quant_type="int8")
    assert dense != small
    assert small == fingerprint(vocab_quant_type="int8", dtype=jnp.bfloat16)


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_a_packed_model_has_the_same_vocabulary(tmp_path, format):
    """Also in bfloat16: the codes are made of what is stored, not of what it is rounded to."""
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", CONFIG, shard_bytes=8_000)
    quantize_checkpoint(tmp_path / "model", tmp_path / "packed", block_size=32, format=format)
    options = dict(vocab_quant_type="int8", block_size=32, dtype=jnp.bfloat16)
    expected, _ = load_model(tmp_path / "model", **options)
    found, _ = load_model(tmp_path / "packed", **options)
    assert base_fingerprint(found) == base_fingerprint(expected)
    if format == "qlora_jax":
        stored = open_checkpoint(tmp_path / "packed")
        assert stored_fingerprint(found, stored) == stored.fingerprint


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vocab_quant_type='int4' is none of none, int8"):
        load_model(tmp_path, vocab_quant_type="int4")


# --------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_trains_and_refuses_another_setting(tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    config, run = tiny_config(model, data), tmp_path / "run"
    config.model.vocab_quant_type = "int8"
    result = training.train(config, run, report=quiet_report()[0])
    assert result.heldout_after < result.heldout_before
    trained, _ = training.load_trained(run)
    assert isinstance(trained.embed_tokens, Int8Embed)
    other = config.copy_and_resolve_references()
    other.model.vocab_quant_type = "none"
    with pytest.raises(ConfigError, match="model.vocab_quant_type: was 'int8', is 'none'"):
        training.train(other, run, report=quiet_report()[0])
    # Nor is an adapter put on another base behind the configuration's back.
    text = (run / "config.json").read_text()
    text = text.replace('"vocab_quant_type": "int8"', '"vocab_quant_type": "none"')
    (run / "config.json").write_text(text)
    with pytest.raises(TrainingError, match="fingerprint"):
        training.load_trained(run)


def test_a_plan_counts_the_bytes_that_are_saved():
    config = config_lib.get_config()
    config.model.path, config.data.path = "huggyllama/llama-7b", "not looked at"
    sizes = []
    for config.model.vocab_quant_type in ("none", "int8"):
        run = planning.abstract_run(config, find_target("h100"))
        sizes.append(measure(run.state.lora, run.frozen))
    dense, small = sizes
    assert dense.frozen == small.frozen and dense.quantized_bytes == small.quantized_bytes
    weights = 2 * 32000 * 4096
    assert dense.dense_bytes - small.dense_bytes == weights - 2 * 32000 * 4


def test_logits_of_a_real_shape_are_close():
    """Rows of normal weights: the codes cost about one percent of a logit's size."""
    table = jnp.asarray(0.02 * RNG.normal(size=(512, 576)), jnp.float32)
    hidden = jnp.asarray(RNG.normal(size=(64, 576)), jnp.float32)
    exact = hidden @ table.T
    error = rows_product(hidden, quantize_rows(table)) - exact
    assert float(jnp.std(error) / jnp.std(exact)) < 0.01
