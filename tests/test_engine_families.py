"""The engine's text of every family, against whole sequences without a cache."""

import family_models
import jax.numpy as jnp
import pytest
from flax import nnx
from llama_models import golden_tiny
from test_engine import replies, text_of, words_tokenizer

from qlora_jax.generation import Engine, Request
from qlora_jax.models.llama import Llama

LLAMAS = ("llama2", "llama3", "llama_biased", "mistral", "qwen2", "qwen2_windowed", "qwen3")
# Windows shorter than the text, in some layers only, with rotations of their own.
QUICK = ("gemma3",)
CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for case in (*family_models.CASES, *LLAMAS)
]
PROMPTS = [[3, 1, 4], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]


def load(case: str, folder) -> Llama:
    return golden_tiny(case)[0] if case in LLAMAS else family_models.golden_family(case, folder)[0]


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_the_argmax_of_whole_sequences(case, tmp_path):
    """Also in the second turn of a conversation, whose first turn is in the cache."""
    model = load(case, tmp_path)
    forward = nnx.jit(lambda model, ids: model(ids))
    engine = Engine(model, words_tokenizer(model.config.vocab_size), slots=2, max_len=40)

    def recompute(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            padded = jnp.array([ids + [0] * (40 - len(ids))])
            ids.append(int(forward(model, padded)[0, len(ids) - 1].argmax()))
        return ids[len(prompt) :]

    expected = [recompute(prompt, 8) for prompt in PROMPTS]
    assert replies(engine, [Request(p, 8) for p in PROMPTS]) == [text_of(e) for e in expected]
    second = [*PROMPTS[1], *expected[1], 7, 1]
    assert replies(engine, [Request(second, 6)]) == [text_of(recompute(second, 6))]
    assert engine.cached_tokens == len(PROMPTS[1]) + 7
