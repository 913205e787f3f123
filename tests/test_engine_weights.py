"""The weights of the engine: adapters of each row, and dense copies for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_models import random_model, tiny_config
from test_engine import PROMPTS, assert_greedy, replies, words_tokenizer

from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import apply_qlora, without_adapters
from qlora_jax.generation import Engine, Request, dense
from qlora_jax.generation.adapters import merge_for_rows, serve_adapters
from qlora_jax.models.llama import Llama


def with_adapter(base: Llama, seed: int, **options) -> Llama:
    """The base with random adapters; arrays of the base are shared."""
    options = dict(quant_type=None, rngs=nnx.Rngs(seed)) | options
    model = apply_qlora(base, **options)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            key = jax.random.key(seed)
            variable.set_value(0.3 * jax.random.normal(key, variable.shape))
    return model


@pytest.fixture(scope="module")
def base() -> Llama:
    plain = random_model(tiny_config(hidden_size=32, head_dim=8, qkv_bias=True))
    return without_adapters(apply_qlora(plain, rank=1, block_size=32, rngs=nnx.Rngs(0)))


def test_every_row_has_its_own_adapter(base):
    """One of DoRA, and one of another rank and scaling, on partly the same layers."""
    models = {
        "one": with_adapter(base, 1, rank=4, alpha=8.0, use_dora=True, where=".*/(q|up)_proj"),
        "two": with_adapter(base, 2, rank=2, alpha=2.0, where=".*/(q|down)_proj"),
    }
    tokenizer = words_tokenizer(base.config.vocab_size)
    engine = Engine(base, tokenizer, adapters=models, slots=3, max_len=64)
    assert engine.adapters == ("one", "two")
    models[None] = base
    names, prompts = ["one", None, "two", "one"], [prompt[:16] for prompt in PROMPTS]
    requests = [Request(p, 12, adapter=n) for p, n in zip(prompts, names, strict=True)]
    for request, text in zip(requests, replies(engine, requests), strict=True):
        assert_greedy(models[request.adapter], request.prompt_ids, text)
    # The same prompt with another adapter is another text, whatever the cache holds.
    texts = [replies(engine, [Request(prompts[2], 12, adapter=name)])[0] for name in models]
    for name, text in zip(models, texts, strict=True):
        assert_greedy(models[name], prompts[2], text)
    assert len(set(texts)) == 3


def test_without_adapter_the_logits_are_the_bases(base):
    adapted = with_adapter(base, 1, rank=4, alpha=8.0)
    served, names = serve_adapters(adapted, None)
    assert names == ("adapter",)
    graphdef, state = nnx.split(served)
    tokens = jnp.array(PROMPTS[2])[None].repeat(2, axis=0)
    logits = jax.jit(lambda s, r: merge_for_rows(graphdef, s, r)(tokens))
    rows = logits(state, jnp.array([0, 1]))
    np.testing.assert_array_equal(rows[0], nnx.jit(lambda m: m(tokens))(base)[0])
    np.testing.assert_allclose(rows[1], nnx.jit(lambda m: m(tokens))(adapted)[1], atol=1e-5)
    assert not np.allclose(rows[0], rows[1], atol=1e-2)


def test_the_state_of_an_adapter_is_enough(base):
    adapted, other = (with_adapter(base, seed, rank=4) for seed in (1, 2))
    states = {"one": nnx.state(adapted, nnx.LoRAParam), "two": nnx.state(other, nnx.LoRAParam)}
    by_state, names = serve_adapters(adapted, states)
    by_model, _ = serve_adapters(base, {"one": adapted, "two": other})
    assert names == ("one", "two") and nnx.graphdef(by_state) == nnx.graphdef(by_model)
    equal = jax.tree.map(
        lambda a, b: bool((a == b).all()), nnx.state(by_state), nnx.state(by_model)
    )
    assert all(jax.tree.leaves(equal))
    tokenizer = words_tokenizer(base.config.vocab_size)
    with pytest.raises(ConfigError, match="adapter 'one' has other parts or ranks"):
        Engine(base, tokenizer, adapters=states)
    wider = with_adapter(random_model(tiny_config(hidden_size=16, head_dim=8)), 1, rank=4)
    with pytest.raises(ConfigError, match="adapter 'x' does not belong to this base"):
        Engine(base, tokenizer, adapters={"x": wider})


@pytest.mark.parametrize("outputs", [1, 2, 5, 191, 385])
def test_a_product_in_pieces_is_the_product(outputs):
    keys = jax.random.split(jax.random.key(0))
    stack = jax.random.normal(keys[0], (3, outputs, 7)).astype(jnp.bfloat16)
    row = jax.random.normal(keys[1], (1, 7)).astype(jnp.bfloat16)
    for layer in range(3):
        ours = jax.jit(dense.row_product)(row, dense.Matrices(stack).at(jnp.int32(layer)))
        exact = np.float64(row) @ np.float64(stack[layer]).T
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("one_row", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dense_copy_has_the_same_logits(base, one_row, monkeypatch):
    """For one row, for few and for many; with adapters, and a vocabulary in several pieces."""
    monkeypatch.setattr(dense, "_PIECE", 12)
    monkeypatch.setattr(dense, "_VOCABULARY_PIECE", 12)
    monkeypatch.setattr(dense, "_FEW_ROWS", 16)
    adapted = with_adapter(base, 1, rank=4)
    served, _ = serve_adapters(adapted, None)
    copied = dense.with_dense_copy(serve_adapters(adapted, None)[0], one_row=one_row)
    assert isinstance(copied.lm_head, dense.DenseHead) and served.lm_head is None
    tokens = jnp.array(PROMPTS[2][:12])[None].repeat(2, axis=0)

    def logits(model: nnx.Module, tokens: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(model)
        numbers = jnp.array([0, 1])[-tokens.shape[0] :]
        return jax.jit(lambda state: merge_for_rows(graphdef, state, numbers)(tokens))(state)

    packed = logits(served, tokens)
    for width in (3, 12):
        ours = logits(copied, tokens[:, :width])
        np.testing.assert_allclose(ours, packed[:, :width], rtol=0, atol=1e-5)
    ours = logits(copied, tokens[1:, :1])
    np.testing.assert_allclose(ours, packed[1:, :1], rtol=0, atol=1e-5)
    assert not np.allclose(packed[0], packed[1], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_a_dense_copy_changes_nothing_but_speed(base, count):
    adapted = with_adapter(base, 1, rank=4)
    tokenizer = words_tokenizer(base.config.vocab_size)
    packed, copied = (
        Engine(adapted, tokenizer, slots=count, max_len=64, dense=copy) for copy in (False, True)
    )
    requests = [Request(p, 8, adapter=a) for p in PROMPTS for a in (None, "adapter")]
    assert replies(copied, requests) == replies(packed, requests)
