"""The server and the chat with the real engine: a tiny model with a PEFT adapter, from folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from running_server import client, running
from tiny_run import tiny_config, write_model

from qlora_jax import apply_qlora, chat_models
from qlora_jax import config as config_lib
from qlora_jax.chat import Chat, Settings
from qlora_jax.chat_models import keep_compiled, load_engine, warm_up
from qlora_jax.errors import ConfigError
from qlora_jax.generation import generate
from qlora_jax.loading import load_model
from qlora_jax.peft import load_adapter, save_adapter

QUESTION = [{"role": "user", "content": "what is one and two"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and an adapter with another opinion."""
    base = write_model(tmp_path_factory.mktemp("tiny") / "base")
    model, _ = load_model(str(base))
    model = apply_qlora(model, rank=2, alpha=4, quant_type=None, rngs=nnx.Rngs(0))
    noise = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape, a.dtype),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, noise)
    return base, save_adapter(model, base.parent / "mine", base_model=str(base))


@pytest.fixture(scope="module")
def loaded(folders):
    base, adapter = folders
    with pytest.MonkeyPatch.context() as patch:  # 16 bits would make ties of a tiny model's logits
        patch.setattr(chat_models, "choose_compute_dtype", lambda *_: (jnp.float32, "a test"))
        return load_engine(model=str(base), adapters=[f"mine={adapter}"], slots=3, max_len=96)


@pytest.fixture(scope="module")
def expected(folders):
    """What generation without an engine says, for the base and the adapter."""
    model, tokenizer = load_model(str(folders[0]))
    both = {"base": model, "mine": load_adapter(model, folders[1])}
    return {
        name: generate(one, tokenizer, [QUESTION], max_new_tokens=12)[0]
        for name, one in both.items()
    }


@pytest.mark.slow
def test_the_server_says_what_the_model_says_with_and_without_adapter(loaded, expected):
    assert expected["base"] != expected["mine"]
    engine, tokenizer, name = loaded
    engine.tokenizer = tokenizer
    with running(engine) as (url, service), client(url) as http:
        assert (name, service.adapters) == ("base", ("mine",))
        ask = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
        for model, speaker in [("tiny", "base"), ("mine", "mine"), (None, "mine")]:
            body = http.post("/v1/chat/completions", json={**ask, "model": model}).json()
            assert body["choices"][0]["message"]["content"] == expected[speaker]
        prompt = [tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)] * 2
        fields = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "model": "tiny"}
        choices = http.post("/v1/completions", json=fields).json()["choices"]
        assert [one["text"].strip() for one in choices] == [expected["base"].strip()] * 2
        long = http.post("/v1/completions", json={"prompt": "one " * 200})
        assert long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.slow
def test_the_chat_compares_both_in_one_batch(loaded, expected):
    engine, tokenizer, _ = loaded
    warm_up(engine, tokenizer)
    chat = Chat(engine, tokenizer, settings=Settings(temperature=0, max_new_tokens=12))
    *_, replies = chat.compare(QUESTION[0]["content"], (None, "mine"))
    assert [reply.text for reply in replies] == [expected["base"], expected["mine"]]
    *_, reply = chat.say(QUESTION[0]["content"])
    assert reply.text == expected["mine"] and not engine.busy


def test_runs_of_different_bases_are_not_served_together(tmp_path):
    for name, model in [("a", "one.gguf"), ("b", "two.gguf")]:
        (tmp_path / name).mkdir()
        config = tiny_config(tmp_path / model, tmp_path / "data.jsonl")
        (tmp_path / name / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(ConfigError, match="runs a and b have different bases"):
        load_engine(workdirs=[str(tmp_path / "a"), str(tmp_path / "b")])


def test_the_adapters_of_several_runs_share_one_base(folders):
    first, second = (load_adapter(load_model(str(folders[0]))[0], folders[1]) for _ in range(2))
    noise = jax.tree.map(lambda a: a * 2, nnx.state(second, nnx.LoRAParam))
    nnx.update(second, noise)
    shared = chat_models._on_base(second, first)
    arrays = {id(leaf) for leaf in jax.tree.leaves(nnx.state(first))}
    own = [leaf for leaf in jax.tree.leaves(nnx.state(shared)) if id(leaf) not in arrays]
    assert len(own) == len(jax.tree.leaves(nnx.state(second, nnx.LoRAParam)))
    ids = jnp.arange(8)[None]
    np.testing.assert_array_equal(shared(ids), second(ids))


def test_compiled_programs_have_a_folder_for_each_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        folder = keep_compiled()
        assert folder.parent == tmp_path / "qlora_jax" / "compiled"
        assert jax.config.jax_compilation_cache_dir == str(folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
