"""Generated text against transformers and llama2.c, and the properties of batches and buckets."""

import json

import jax
import jax.numpy as jnp
import pytest
import safetensors
from flax import nnx
from llama_models import (
    GOLDEN,
    SHARED_MODELS,
    golden_tiny,
    random_model,
    smollm2,
    smollm2_path,
    stories260k,
    tiny_config,
)

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.generation import batches, encode_prompt, generate, generate_ids
from qlora_jax.models.llama import Llama
from qlora_jax.sampling import Sampling
from qlora_jax.weights import open_checkpoint

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [2, 7]]


@pytest.fixture(scope="module")
def model() -> Llama:
    return golden_tiny("qwen3")[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(open_checkpoint(smollm2_path()).config)


def golden_records() -> list[dict]:
    with safetensors.safe_open(GOLDEN / "smollm2.safetensors", "np") as file:
        return json.loads(file.metadata()["records"])


def test_smollm2_writes_what_transformers_writes(tokenizer):
    records = golden_records()
    prompts = [record["prompt"] for record in records]
    assert [encode_prompt(tokenizer, p) for p in prompts] == [
        tokenizer.encode(record["text"]) for record in records
    ]
    replies = generate(smollm2(), tokenizer, prompts, max_new_tokens=40)
    assert replies == [record["reply"] for record in records]


def test_stories260k_writes_its_expected_text():
    model, pieces = stories260k()
    (ids,) = generate_ids(model, [[1]], max_new_tokens=200, eos_token_ids=[1])
    text = b"".join(pieces[token] for token in ids).removeprefix(b" ")
    assert text == (SHARED_MODELS / "stories260K.expected_greedy.txt").read_bytes()


@pytest.mark.parametrize("case", ["qwen3", "mistral", "qwen2_windowed", "llama3"])
def test_a_batch_writes_what_its_prompts_write_alone(case):
    model = golden_tiny(case)[0]
    together = generate_ids(model, PROMPTS, max_new_tokens=12, eos_token_ids=[7])
    alone = [generate_ids(model, [p], max_new_tokens=12, eos_token_ids=[7])[0] for p in PROMPTS]
    assert together == alone


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    (new,) = generate_ids(model, [PROMPTS[0]], max_new_tokens=10)
    ids, forward = list(PROMPTS[0]), nnx.jit(lambda model, ids: model(ids))
    for token in new:
        padded = jnp.array([ids + [0] * (16 - len(ids))])
        assert token == int(forward(model, padded)[0, len(ids) - 1].argmax())
        ids.append(token)
    assert len(new) == 10


def test_a_reply_ends_at_any_end_token(model):
    free = generate_ids(model, PROMPTS, max_new_tokens=40)
    ends = [free[0][5], free[1][9]]
    for row, whole in zip(
        generate_ids(model, PROMPTS, max_new_tokens=40, eos_token_ids=ends), free, strict=True
    ):
        first = min([whole.index(end) for end in ends if end in whole], default=40)
        assert row == whole[:first]


def test_generation_stops_early_and_can_be_longer_than_a_chunk(model, monkeypatch):
    chunks = []
    original = batches._decode_chunk
    monkeypatch.setattr(
        batches, "_decode_chunk", lambda *a, **k: chunks.append(1) or original(*a, **k)
    )
    (free,) = generate_ids(model, [[3]], max_new_tokens=50)
    assert len(free) == 50 and len(chunks) == 2
    first_end = free[0]
    assert generate_ids(model, [[3]], max_new_tokens=50, eos_token_ids=[first_end]) == [[]]
    assert len(chunks) == 2


def test_a_reply_ends_at_a_stop_string_of_the_chat_format(tokenizer):
    """SmolLM2 counts; what ends the reply is cut away, and nothing more is computed after it."""
    prompt = "One, two, three, four,"
    (free,) = generate(smollm2(), tokenizer, [prompt], max_new_tokens=24)
    stop = free[8:14]
    stopping = tokenizer.with_chat_format("plain")
    stopping.stop_strings = (stop,)
    assert generate(smollm2(), stopping, [prompt], max_new_tokens=24) == [free[: free.index(stop)]]


def test_no_chunk_is_computed_once_all_replies_are_over(model, monkeypatch):
    chunks = []
    original = batches._decode_chunk
    monkeypatch.setattr(
        batches, "_decode_chunk", lambda *a, **k: chunks.append(1) or original(*a, **k)
    )
    (free,) = generate_ids(model, [[3]], max_new_tokens=60)
    assert len(chunks) == 2
    (over,) = generate_ids(model, [[3]], max_new_tokens=60, is_over=lambda ids: len(ids) > 20)
    assert len(chunks) == 3 and over == free[: 1 + batches.CHUNK]


def test_one_compilation_for_each_shape_bucket(model):
    def count():
        return batches._prefill._cache_size(), batches._decode_chunk._cache_size()

    jax.clear_caches()
    generate_ids(model, [[1, 2], [3]], max_new_tokens=8, eos_token_ids=[0])
    assert count() == (1, 1)
    # Other prompts, lengths, limits and an equal model: the same buckets.
    generate_ids(model, [[1] * 16, [3] * 9], max_new_tokens=40, eos_token_ids=[5])
    generate_ids(nnx.clone(model), [[4], [3]], max_new_tokens=1, eos_token_ids=[0])
    assert count() == (1, 1)
    generate_ids(model, [[1] * 17, [3]], max_new_tokens=8, eos_token_ids=[0])
    assert count() == (2, 1)
    generate_ids(model, [[1], [3]], max_new_tokens=49, eos_token_ids=[0])
    assert count() == (3, 2)
    for settings in (Sampling(0.7), Sampling(1, top_k=5), Sampling(2.0, top_p=0.5)):
        generate_ids(model, [[1], [3]], max_new_tokens=8, eos_token_ids=[0], sampling=settings)
    assert count() == (4, 3)


def test_random_replies_depend_on_seed_row_and_prompt(model):
    settings = dict(max_new_tokens=16, sampling=Sampling(temperature=1.0))
    replies = generate_ids(model, PROMPTS, **settings)
    assert generate_ids(model, PROMPTS, **settings) == replies
    assert generate_ids(model, PROMPTS[:2], **settings) == replies[:2]
    assert generate_ids(model, PROMPTS, seed=1, **settings) != replies
    same = generate_ids(model, [[3], [3]], **settings)
    assert same[0] != same[1]


def test_top_k_of_one_is_greedy(model):
    sampling = Sampling(temperature=3.0, top_k=1)
    assert generate_ids(model, PROMPTS, max_new_tokens=8, sampling=sampling) == generate_ids(
        model, PROMPTS, max_new_tokens=8
    )


def test_adapters_are_used_and_dropout_is_off():
    config = tiny_config(hidden_size=32, head_dim=8)
    plain = random_model(config)
    adapted = apply_qlora(
        plain, rank=4, dropout=0.5, quant_type=None, rngs=nnx.Rngs(params=1, dropout=2)
    )
    base = generate_ids(adapted, PROMPTS, max_new_tokens=16)
    for path, variable in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            variable.set_value(jax.random.normal(jax.random.key(3), variable.shape))
    adapted.train()
    before = jax.tree.map(jnp.copy, nnx.state(adapted))
    replies = generate_ids(adapted, PROMPTS, max_new_tokens=16)
    assert replies != base
    assert replies == generate_ids(adapted, PROMPTS, max_new_tokens=16)
    adapted.eval()
    assert replies == generate_ids(adapted, PROMPTS, max_new_tokens=16)
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(adapted))
    assert all(jax.tree.leaves(unchanged))


def test_the_mode_of_the_model_stays(model):
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    holder = nnx.clone(model)
    holder.extra = dropout
    generate_ids(holder, [[1]], max_new_tokens=1)
    assert dropout.deterministic is False


def test_an_empty_prompt_begins_a_text(model, tokenizer):
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    assert generate_ids(model, [], max_new_tokens=3) == []


def test_bos_is_put_before_a_text_where_the_model_expects_it(tokenizer):
    with_bos = Tokenizer(tokenizer.backend, bos_token_id=1, add_bos_token=True)
    assert encode_prompt(with_bos, "Hi") == [1, *tokenizer.encode("Hi")]
    assert encode_prompt(with_bos, "<|im_start|>Hi") == [1, *tokenizer.encode("Hi")]
    assert encode_prompt(tokenizer, "Hi") == tokenizer.encode("Hi")


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        (
            [[1], [2] * 60],
            dict(max_new_tokens=5),
            ConfigError,
            "prompt 1 has 60 tokens; with max_new_tokens=5 that is more than the 64 tokens",
        ),
        ([[1]], dict(max_new_tokens=0), ConfigError, "max_new_tokens must be at least 1, got 0"),
        ([[1], []], dict(max_new_tokens=5), DataError, "prompt 1 has no tokens"),
        ([[1]], dict(sampling=Sampling(top_p=2.0)), ConfigError, "top_p"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, prompts, settings, error, message):
    with pytest.raises(error, match=message):
        generate_ids(model, prompts, **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", "prompts must be a list"),
        ({"role": "user", "content": "Hello"}, "prompts must be a list"),
        ([{"role": "user", "content": "Hello"}], "got one message"),
        ([[]], "at least one message"),
    ],
)
def test_misshapen_prompts_are_refused(model, tokenizer, prompts, message):
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, prompts)


def test_an_empty_text_without_bos_is_refused(tokenizer):
    without_bos = Tokenizer(tokenizer.backend)
    with pytest.raises(DataError, match="no BOS token"):
        encode_prompt(without_bos, "")
