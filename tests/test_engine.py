"""The engine: replies of requests that come and go, against whole-sequence recomputation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from llama_models import golden_tiny, random_model, smollm2, smollm2_path, tiny_config

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import apply_qlora, without_adapters
from qlora_jax.generation import (
    Delta,
    Engine,
    Request,
    Sampling,
    dense,
    generate_ids,
    slots,
    stream,
)
from qlora_jax.generation.adapters import merge_for_rows, serve_adapters
from qlora_jax.generation.slots import Slots, decode
from qlora_jax.models.kv_cache import dequantize_heads, quantize_heads
from qlora_jax.models.llama import Llama
from qlora_jax.models.t5 import T5
from qlora_jax.placement import tree_bytes
from qlora_jax.weights import open_checkpoint

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [2, 7]]
SAMPLED = Sampling(temperature=1.0, top_k=20, top_p=0.9)


def words_tokenizer(size: int, end: int | None = None) -> Tokenizer:
    """Token i is the text "<i>"; none is special but the end token."""
    vocabulary = {f"<{i}>": i for i in range(size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"<\d+>"), behavior="isolated"
    )
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, eos_token_ids=[] if end is None else [end])


@pytest.fixture(scope="module")
def model() -> Llama:
    return golden_tiny("qwen3")[0]


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return words_tokenizer(model.config.vocab_size)


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Engine:
    """Shared by tests that leave it idle."""
    return Engine(model, tokenizer, slots=3, max_len=64)


def finish(engine: Engine) -> dict[int, tuple[str, Delta]]:
    """Runs until nothing is left; the text and the last `Delta` of every request."""
    texts, last = {}, {}
    while engine.busy:
        for delta in engine.step():
            assert delta.request_id not in last or last[delta.request_id].finish_reason is None
            texts[delta.request_id] = texts.get(delta.request_id, "") + delta.text
            last[delta.request_id] = delta
    return {key: (texts[key], last[key]) for key in last}


def replies(engine: Engine, requests: list[Request]) -> list[str]:
    ids = [engine.submit(request) for request in requests]
    done = finish(engine)
    return [done[key][0] for key in ids]


def text_of(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


forward = nnx.jit(lambda model, ids: model(ids))


def assert_greedy(model: Llama, prompt: list[int], text: str) -> None:
    """Every token is the likeliest one after the whole text before it, without a cache."""
    new = [int(token) for token in re.findall(r"\d+", text)]
    ids = [*prompt, *new]
    logits = forward(model, jnp.array([ids + [0] * (64 - len(ids))]))[0]
    assert new == logits[len(prompt) - 1 : len(ids) - 1].argmax(-1).tolist()


def test_greedy_replies_are_those_of_whole_batches(engine, model):
    """Four requests for three slots: the last one waits."""
    whole = generate_ids(model, PROMPTS, max_new_tokens=12)
    ours = replies(engine, [Request(prompt, max_new_tokens=12) for prompt in PROMPTS])
    assert ours == [text_of(ids) for ids in whole]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_a_reply_depends_on_its_request_alone(engine, sampling):
    requests = [Request(p, 10, sampling, seed=i) for i, p in enumerate(PROMPTS)]
    together = replies(engine, requests)
    alone = [replies(engine, [request])[0] for request in reversed(requests)]
    assert together == alone[::-1]
    if not sampling.greedy:
        other = replies(engine, [Request(PROMPTS[0], 10, sampling, seed=9)])
        assert other[0] != together[0]
        greedy_beside = [requests[0], Request(PROMPTS[1], 10)]
        assert replies(engine, greedy_beside)[0] == together[0]


@pytest.mark.parametrize("outputs", [1, 2, 5, 191, 385])
def test_a_product_in_pieces_is_the_product(outputs):
    keys = jax.random.split(jax.random.key(0))
    stack = jax.random.normal(keys[0], (3, outputs, 7)).astype(jnp.bfloat16)
    row = jax.random.normal(keys[1], (1, 7)).astype(jnp.bfloat16)
    for layer in range(3):
        ours = jax.jit(dense.row_product)(row, dense.Matrices(stack).at(jnp.int32(layer)))
        exact = np.float64(row) @ np.float64(stack[layer]).T
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_prompts_that_wait_together_are_read_in_one_pass(engine, sampling, monkeypatch):
    """Three at first; later two, beside a reply that goes on and keeps what it has read."""
    requests = [Request(p, 10, sampling, seed=i) for i, p in enumerate(PROMPTS)]
    alone = [replies(engine, [request])[0] for request in requests]
    calls = []

    def reading(name: str):
        program = getattr(slots, name)

        def call(*args, **kwargs):
            calls.append(name)
            return program(*args, **kwargs)

        return call

    for name in ("admit", "admit_all"):
        monkeypatch.setattr(slots, name, reading(name))
    assert replies(engine, requests[:3]) == alone[:3] and calls == ["admit_all"]
    first = engine.submit(requests[3])
    engine.step()
    ids = [first, *(engine.submit(request) for request in requests[:2])]
    done = finish(engine)
    assert [done[i][1].tokens for i in ids] == [10] * 3
    assert [done[i][0] for i in ids[1:]] == alone[:2]
    assert alone[3].endswith(done[first][0])
    assert calls[1:] == ["admit", "admit_all"]


def test_ends_and_reasons(model):
    (free,) = generate_ids(model, [PROMPTS[0]], max_new_tokens=12)
    end = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    engine = Engine(model, words_tokenizer(model.config.vocab_size, end), slots=3, max_len=64)
    first = engine.submit(Request(PROMPTS[0], 12))
    short = engine.submit(Request(PROMPTS[0], 2))
    # A stop string over the border of two tokens, in the middle of each.
    stop = text_of(free[1:3])[2:-1]
    stopped = engine.submit(Request(PROMPTS[0], 12, stop=["no such thing", stop]))
    done = finish(engine)
    before = free[: free.index(end)]
    assert done[first][0] == text_of(before)
    assert (done[first][1].tokens, done[first][1].finish_reason) == (len(before), "stop")
    assert done[short][0] == text_of(free[:2]) and done[short][1].finish_reason == "length"
    assert done[short][1].tokens == 2
    assert done[stopped][0] == text_of(free[:3]).split(stop)[0]
    assert done[stopped][1].finish_reason == "stop"


def test_what_could_begin_a_stop_string_is_held_back(engine, model):
    (free,) = generate_ids(model, [PROMPTS[0]], max_new_tokens=6)
    never = text_of(free[1:3]) + "!"
    key = engine.submit(Request(PROMPTS[0], 6, stop=[never]))
    assert finish(engine)[key][0] == text_of(free)


def test_cancelling_frees_the_slot_and_leaves_the_others_alone(engine, model):
    whole = generate_ids(model, PROMPTS, max_new_tokens=12)
    ids = [engine.submit(Request(prompt, 12)) for prompt in PROMPTS]
    first = {delta.request_id: delta.text for delta in engine.step()}
    assert first == {key: text_of(row[:1]) for key, row in zip(ids[:3], whole[:3], strict=True)}
    engine.cancel(ids[1])
    engine.cancel(ids[3])  # still waiting
    engine.cancel(10_000)  # nobody
    done = finish(engine)
    assert [done[key][1].finish_reason for key in ids] == [
        "length", "cancelled", "length", "cancelled",
    ]  # fmt: skip
    for i in (0, 2):
        assert first[ids[i]] + done[ids[i]][0] == text_of(whole[i])
    assert not engine.busy and engine.step() == []


def test_what_was_read_is_not_read_again(model, tokenizer):
    """A conversation: each turn repeats the last one's prompt and reply."""
    engine = Engine(model, tokenizer, slots=3, max_len=64)
    prompt = PROMPTS[2]
    for turn in range(2):
        read = engine.prompt_tokens
        (text,) = replies(engine, [Request(prompt, 8)])
        (expected,) = generate_ids(model, [prompt], max_new_tokens=8)
        assert text == text_of(expected)
        assert engine.prompt_tokens - read == (19 if turn == 0 else 4)
        # The reply's last token was chosen, and never read.
        prompt = [*prompt, *expected, 3, 1, 4]
    assert engine.cached_tokens == 19 + 7
    # Another beginning, and a prompt that is wholly known.
    assert replies(engine, [Request([8, *PROMPTS[2]], 4)])[0] == text_of(
        generate_ids(model, [[8, *PROMPTS[2]]], max_new_tokens=4)[0]
    )
    read = engine.prompt_tokens
    replies(engine, [Request(PROMPTS[2], 4)])
    assert engine.prompt_tokens - read == 1


def test_a_prompt_may_fill_the_cache(engine, model):
    """The padded rest of a prompt must not be written over the beginning."""
    prompt = [11, *PROMPTS[2] * 4][:61]
    for length in (20, 37, 52, 61):
        (text,) = replies(engine, [Request(prompt[:length], 3)])
        assert_greedy(model, prompt[:length], text)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 60, 5), "the prompt has 60 tokens; with max_new_tokens=5 that is more than"),
        (Request([], 5), "no tokens"),
        (Request([1], 0), "max_new_tokens must be at least 1, got 0"),
        (Request([1, 4000], 5), "ids outside"),
        (Request([1], 5, adapter="x"), "there is no adapter 'x'; there are: none"),
        (Request([1], 5, Sampling(min_p=2.0)), "min_p"),
    ],
)
def test_what_cannot_be_replied_to_is_refused(engine, request_, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(request_)
    assert not engine.busy


def test_impossible_engines_are_refused(model, tokenizer):
    for settings, message in [
        (dict(max_len=65), "max_len must be 2 to 64"),
        (dict(slots=0), "slots=0"),
        (dict(kv_dtype="fp8"), "kv_dtype must be None or 'int8'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Engine(model, tokenizer, **settings)
    with pytest.raises(ConfigError, match="serves decoders, got a T5"):
        Engine(T5.__new__(T5), tokenizer)


def test_a_stream_is_the_reply_in_pieces(engine, model):
    expected = text_of(generate_ids(model, PROMPTS[2:3], max_new_tokens=12)[0])
    pieces = list(stream(engine, text_of(PROMPTS[2]), max_new_tokens=12))
    assert "".join(pieces) == expected and len(pieces) > 1
    begun = stream(engine, text_of(PROMPTS[2]), max_new_tokens=12)
    assert expected.startswith(next(begun)) and engine.busy
    begun.close()
    assert not engine.busy
    engine.submit(Request(PROMPTS[0], 2))
    with pytest.raises(ConfigError, match="has other requests"):
        stream(engine, "<1>")
    finish(engine)


ANSWER = "The capital of France is Paris."
REPEATING = [5, 9, 2, 6, 5, 3, 8] * 3


def test_guessing_changes_the_passes_and_not_the_text(model, tokenizer):
    """Beside a row that draws at random and one that is penalized, which do not guess."""
    requests = [
        Request(REPEATING, 24),
        Request(PROMPTS[0], 10, SAMPLED, seed=3),
        Request(REPEATING, 10, Sampling(repetition_penalty=1.5)),
    ]
    plain = Engine(model, tokenizer, slots=3, max_len=64)
    guessing = Engine(model, tokenizer, slots=3, max_len=64, lookup=4)
    assert replies(guessing, requests) == replies(plain, requests)
    before = plain.passes, guessing.passes
    (expected,) = replies(plain, requests[:1])
    assert replies(guessing, requests[:1]) == [expected]
    passes = plain.passes - before[0], guessing.passes - before[1]
    assert passes[0] == 23 and passes[1] < 16, f"{passes}: {expected}"
    # An end token among the guesses ends the reply there.
    end = int(expected.split("><")[12].strip("<>"))
    ended = Engine(
        model, words_tokenizer(model.config.vocab_size, end), max_len=64, slots=3, lookup=4
    )
    assert replies(ended, requests[:1]) == [expected.split(f"<{end}>")[0]]


def test_keys_and_values_in_8_bits(model, tokenizer):
    """Half the memory and less; each number is off by at most half a scale, the logits hardly."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))
    codes, scale = quantize_heads(x)
    error = jnp.abs(dequantize_heads(codes, scale, jnp.float32) - x)
    assert (error <= 0.5001 * scale[..., None]).all() and codes.dtype == jnp.int8
    tokens = jnp.array([PROMPTS[2]])
    cache = model.init_cache(1, 24, ragged=True, dtype=jnp.int8)
    logits, cache = nnx.jit(lambda model, ids, cache: model(ids, cache=cache))(model, tokens, cache)
    exact = forward(model, jnp.pad(tokens, ((0, 0), (0, 64 - tokens.shape[1]))))[:, :19]
    error = jnp.abs(logits - exact)
    assert 0 < error.max() < 0.05 * jnp.abs(exact).max() and cache.length.tolist() == [19]
    sizes = [
        Engine(model, tokenizer, slots=3, max_len=64, kv_dtype=dtype).cache_bytes
        for dtype in ("int8", None)
    ]
    assert sizes[0] < 0.5 * sizes[1]


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


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_the_cache_is_written_in_place(model, tokenizer, slots):
    """A copy of it in every step would cost more than the step."""
    empty = jax.eval_shape(lambda: model.init_cache(slots, 4096, ragged=True))
    state = jax.eval_shape(lambda: Slots.empty(model.init_cache(slots, 4096, ragged=True), 64))
    graphdef, weights = nnx.split(model)
    rest = jnp.ones(slots, bool), jnp.array([0]), jnp.int32(1)
    compiled = decode.lower(
        graphdef, weights, state, *rest, span=64, chunk=8, greedy=True
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tree_bytes(empty) / 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}, {"lookup": 3}, {"dense": False}])
def test_smollm2_answers(settings):
    tokenizer = Tokenizer.from_gguf(open_checkpoint(smollm2_path()).config)
    engine = Engine(smollm2(), tokenizer, slots=1, max_len=128, **settings)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "".join(stream(engine, question, max_new_tokens=40)) == ANSWER
    assert engine.cached_tokens == 0
    assert "".join(stream(engine, question, max_new_tokens=40)) == ANSWER
    assert engine.cached_tokens > 10


# -------------------------------------------------------------------------------------- adapters


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
