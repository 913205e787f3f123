"""Chat formats: what each writes, what is learned of it, and what ends a reply."""

import fake_tokenizer as fake
import numpy as np
import pytest
import tokenizers

from qlora_jax.data.chat_formats import CHAT_FORMATS, cut_at_stop
from qlora_jax.data.formats import Record
from qlora_jax.data.masking import tokenize_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError

DIALOGUE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Oh"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ah"},
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
TEXTS = {
    "guanaco": "### Human: Hi### Assistant: Oh</s>### Human: Bye### Assistant: Ah</s>",
    "alpaca": ALPACA + "### Instruction:\nHi\n\n### Response: Oh</s>\n\n### Instruction:\nBye\n\n"
    "### Response: Ah</s>",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOh<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nAh<|im_end|>\n",
    "vicuna": VICUNA + " USER: Hi ASSISTANT: Oh</s> USER: Bye ASSISTANT: Ah</s>",
    "llama2": "<s>[INST] Hi [/INST] Oh </s><s>[INST] Bye [/INST] Ah </s>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nOh<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nAh<|eot_id|>",
    "hh": "\n\nHuman: Hi\n\nAssistant: Oh</s>\n\nHuman: Bye\n\nAssistant: Ah</s>",
    "plain": "HiOh</s>ByeAh</s>",
}
SYSTEM = {
    "guanaco": "Be kind.\n### Human: Hi",
    "alpaca": "Be kind.\n\n### Instruction:\nHi",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
    "vicuna": "Be kind. USER: Hi",
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
    "hh": "Be kind.\n\nHuman: Hi",
    "plain": "Be kind.\n\nHi",
}


def make_tokenizer(add_bos_token=False):
    """Every character is a token, and the special tokens are one each."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    backend.add_special_tokens([*special, "<|start_header_id|>", "<|end_header_id|>"])
    bos, eos = (backend.token_to_id(token) for token in special[:2])
    return Tokenizer(
        backend,
        bos_token_id=bos,
        eos_token_ids=[eos],
        add_bos_token=add_bos_token,
        chat_template="x",
    )


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_conversation_is_written_in_the_format(name):
    tokenizer = make_tokenizer().with_chat_format(name)
    assert tokenizer.apply_chat_template(DIALOGUE) == TEXTS[name]
    prompt = tokenizer.apply_chat_template(DIALOGUE[:1], add_generation_prompt=True)
    assert TEXTS[name].startswith(prompt)
    assert TEXTS[name][len(prompt) :].lstrip(" ").startswith("Oh")
    system = ({"role": "system", "content": "Be kind."}, *DIALOGUE)
    assert tokenizer.apply_chat_template(system).startswith(SYSTEM[name])


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_answers_and_their_ends_are_learned_in_every_format(name):
    tokenizer = make_tokenizer().with_chat_format(name)
    record = Record("a.jsonl:1", "messages", DIALOGUE)
    example = tokenize_records([record], tokenizer, max_len=1000)[0]
    runs = np.split(np.arange(len(example.tokens)), np.flatnonzero(np.diff(example.loss_mask)) + 1)
    learned = [
        tokenizer.decode(example.tokens[run], skip_special_tokens=False)
        for run in runs
        if example.loss_mask[run[0]]
    ]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    assert [text.replace(" ", "") for text in learned] == [f"Oh{end}", f"Ah{end}"]


def test_bos_stands_once_at_the_beginning_for_models_that_want_it():
    for name in CHAT_FORMATS:
        written = make_tokenizer(add_bos_token=True).with_chat_format(name)
        text = written.apply_chat_template(DIALOGUE)
        assert text == TEXTS[name] if name in ("llama2", "llama3") else f"<s>{TEXTS[name]}"


def test_a_chat_format_makes_another_tokenizer():
    tokenizer = make_tokenizer()
    before = tokenizer.fingerprint
    other = tokenizer.with_chat_format("guanaco")
    assert tokenizer.stop_strings == () and tokenizer.chat_template == "x"
    assert other.stop_strings == ("### Human:",)
    assert other.fingerprint != before == tokenizer.fingerprint
    assert tokenizer.with_chat_format("model") is tokenizer
    with pytest.raises(ConfigError, match="chat format 'guanako' is not one of .* mean guanaco"):
        tokenizer.with_chat_format("guanako")


def test_a_text_is_cut_at_the_first_stop_string():
    assert cut_at_stop("a USER: b ### c", ("###", " USER:")) == "a"
    assert cut_at_stop("nothing to stop at", ("###",)) == "nothing to stop at"
    assert cut_at_stop("no strings", ()) == "no strings"


def test_the_fake_templates_of_other_tests_agree():
    """The two definitions of ChatML are independent of each other."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = fake.CHATML
    other = make_tokenizer().with_chat_format("chatml")
    for prompt in (False, True):
        texts = [t.apply_chat_template(DIALOGUE[:3], prompt) for t in (tokenizer, other)]
        assert texts[0] == texts[1]
