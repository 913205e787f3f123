"""The engine: replies of requests that come and go, against whole-sequence recomputation."""

import re

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from flax import nnx
from llama_models import golden_tiny, smollm2, smollm2_path

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.generation import (
    Delta,
    Engine,
    Request,
    Sampling,
    generate_ids,
    slots,
    stream,
)
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
