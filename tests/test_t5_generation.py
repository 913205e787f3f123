"""Answers of an encoder-decoder against transformers, in batches, drawn, and through the script."""

import numpy as np
import pytest
import t5_models

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError
from qlora_jax.generation import encode_prompt, generate, generate_ids
from qlora_jax.loading import load_model
from qlora_jax.sampling import Sampling


def sources(found):
    rows = zip(found["source"], found["source_mask"], strict=True)
    return [row[mask == 1].tolist() for row, mask in rows]


@pytest.mark.parametrize("case", ["gated", "classic"])
def test_greedy_answers_are_those_of_transformers(case):
    """Sources of different lengths, padded on the left here and on the right there."""
    _, _, found = t5_models.golden(case)
    ours = generate_ids(t5_models.fill(case), sources(found), max_new_tokens=24)
    assert ours == found["greedy"].tolist()


def test_an_answer_ends_with_its_end_token():
    _, _, found = t5_models.golden("gated")
    wanted = found["greedy"].tolist()
    end = wanted[0][4]
    ours = generate_ids(t5_models.fill(), sources(found), max_new_tokens=24, eos_token_ids=[end])
    assert ours == [row[: row.index(end)] if end in row else row for row in wanted]


@pytest.mark.slow
def test_a_drawn_answer_depends_on_the_seed_and_its_prompt_alone():
    _, _, found = t5_models.golden("gated")
    model, sampling = t5_models.fill(), Sampling(temperature=1.0, top_k=20)
    prompts = sources(found)
    both = generate_ids(model, prompts, max_new_tokens=8, sampling=sampling, seed=1)
    (alone,) = generate_ids(model, prompts[:1], max_new_tokens=8, sampling=sampling, seed=1)
    other = generate_ids(model, prompts, max_new_tokens=8, sampling=sampling, seed=2)
    assert both[0] == alone and both != other
    greedy = generate_ids(model, prompts, max_new_tokens=8)
    narrow = Sampling(temperature=1.0, top_k=1)
    assert generate_ids(model, prompts, max_new_tokens=8, sampling=narrow) == greedy != both


def test_there_is_no_longest_prompt():
    prompt = np.random.default_rng(0).integers(2, 64, 700).tolist()
    assert len(generate_ids(t5_models.fill(), [prompt], max_new_tokens=2)[0]) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5_models.write_folder(tmp_path_factory.mktemp("t5") / "model")


def test_texts_and_conversations_end_with_the_end_token(folder):
    model, tokenizer = load_model(folder, block_size=32)
    ids = tokenizer.encode("what is one and two")
    conversation = [{"role": "user", "content": "what is one and two"}]
    for prompt in ("what is one and two ", conversation):
        assert encode_prompt(tokenizer, prompt, for_encoder=True) == [*ids, 1]
    text, conversation = generate(
        model, tokenizer, ["what is one and two", conversation], max_new_tokens=6
    )
    assert text == conversation
    (new,) = generate_ids(model, [[*ids, 1]], max_new_tokens=6, eos_token_ids=[1])
    assert text == tokenizer.decode(new)


def test_a_tokenizer_without_an_end_token_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("</s>", "end")
    )
    tokenizer = Tokenizer.from_file(tmp_path)
    with pytest.raises(DataError, match="names no end token"):
        encode_prompt(tokenizer, "what is", for_encoder=True)
