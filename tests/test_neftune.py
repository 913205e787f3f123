"""NEFTune: noise of the right size in every microbatch, and none in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx
from llama_models import golden_tiny

from qlora_jax import training
from qlora_jax.flax_nnx import apply_qlora, set_dropout_keys
from qlora_jax.metrics import read_metrics
from qlora_jax.neftune import NoisyEmbed, add_embedding_noise
from qlora_jax.training.building import split_model
from qlora_jax.training.step import init_state, make_train_step
from qlora_jax.vocabulary import quantize_vocabulary

TOKENS = jnp.arange(12).reshape(2, 6)


def noisy(alpha=5.0, dtype=jnp.float32):
    embed = nnx.Embed(16, 8, dtype=dtype, rngs=nnx.Rngs(0))
    return NoisyEmbed(embed, alpha=alpha, rngs=nnx.Rngs(dropout=1))


def test_noise_is_uniform_and_scaled_by_the_row():
    embed = NoisyEmbed(nnx.Embed(4, 64, rngs=nnx.Rngs(0)), alpha=10.0, rngs=nnx.Rngs(dropout=1))
    tokens = jnp.zeros((4, 256), jnp.int32)
    noise = np.asarray(embed(tokens) - embed.inner(tokens))
    bound = 10.0 / np.sqrt(256 * 64)
    assert np.abs(noise).max() <= bound + 1e-6 and np.abs(noise).max() > 0.99 * bound
    assert abs(noise.mean()) < 0.01 * bound
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not np.array_equal(noise[0], noise[1])


def test_evaluation_and_the_dtype_are_left_alone():
    embed = noisy(dtype=jnp.bfloat16)
    assert embed(TOKENS).dtype == jnp.bfloat16
    embed.eval()
    np.testing.assert_array_equal(embed(TOKENS), embed.inner(TOKENS))


def test_a_model_with_a_tied_head_trains_with_noise_and_evaluates_without():
    model = golden_tiny("qwen3")[0]
    plain = model(TOKENS)
    model = apply_qlora(model, rank=2, alpha=4, rngs=nnx.Rngs(0))
    add_embedding_noise(model, 5.0, seed=0)
    model.eval()
    without = model(TOKENS)
    np.testing.assert_allclose(without, plain, rtol=0.5, atol=1.0)  # the base is in 4 bits now
    model.train()
    first = model(TOKENS)
    assert float(jnp.max(jnp.abs(first - without))) > 1e-4
    assert isinstance(add_embedding_noise(golden_tiny("qwen3")[0], 0.0, 0).embed_tokens, nnx.Embed)


def test_a_steps_noise_is_a_function_of_its_key():
    model = golden_tiny("qwen3")[0]
    model = apply_qlora(model, rank=2, alpha=4, rngs=nnx.Rngs(0))
    add_embedding_noise(model, 15.0, seed=0)
    model.train()
    graphdef, lora, frozen = split_model(model)
    batch = {
        "tokens": TOKENS[None],
        "loss_mask": jnp.ones_like(TOKENS)[None],
        "segment_ids": jnp.ones_like(TOKENS)[None],
        "positions": jnp.broadcast_to(jnp.arange(6), TOKENS.shape)[None],
    }
    step = make_train_step(graphdef, optax.sgd(0.0))
    state = init_state(jax.tree.map(jnp.copy, lora), optax.sgd(0.0), 0)  # a step takes its state
    losses = []
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]  # nothing was learned; only the noise is another
    key = jax.random.key(3)
    models = [nnx.merge(graphdef, lora, set_dropout_keys(frozen, key)) for _ in range(2)]
    outputs = [model.embed_tokens(TOKENS) for model in models]
    np.testing.assert_array_equal(*outputs)
    again = init_state(lora, optax.sgd(0.0), 0)
    assert float(step(again, frozen, batch)[1]["loss"]) == losses[0]


@pytest.mark.slow
def test_a_run_with_noise_measures_and_answers_without(tmp_path):
    model = tiny_run.write_model(tmp_path / "model")
    config = tiny_run.tiny_config(model, tiny_run.write_data(tmp_path / "sums.jsonl"))
    config.train.steps, config.sample.enabled = 2, False
    losses, heldout = [], []
    for alpha in (0.0, 40.0):
        config.train.neftune_alpha = alpha
        report, _ = tiny_run.quiet_report()
        result = training.train(config, tmp_path / str(alpha), report=report)
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(alpha)) if "loss" in row])
        heldout.append(result.heldout_before)
    assert heldout[0] == heldout[1] and losses[0] != losses[1]


def test_a_vocabulary_in_8_bits_gets_noise_too():
    model = golden_tiny("qwen3")[0]
    model = quantize_vocabulary(model)
    model.eval()
    before = model(TOKENS)
    add_embedding_noise(model, 15.0, seed=0)
    model.eval()
    np.testing.assert_array_equal(model(TOKENS), before)
    model.train()
    assert float(jnp.max(jnp.abs(model(TOKENS) - before))) > 1e-4
