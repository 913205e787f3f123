"""A tokenizer and chat templates small enough to check by eye."""

import re

from qlora_jax.data.chat_template import render_chat_template

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n"
    "{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>"
    "{% else %}{{ m.content }} USER: {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GUANACO = (
    "{% for m in messages %}### {{ 'Assistant' if m.role == 'assistant' else 'Human' }}: "
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)
# As Qwen3: the last answer gets an empty reasoning block, earlier ones do not.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing in it stays where it was once a message is added.
UNSTABLE = "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
# The prompt ends with a space, which tokenizers like to join with the word after it.
TRAILING_SPACE = (
    "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


class FakeTokenizer:
    """One token a character, save for special tokens and the given longer words.

    With `dummy_prefix` every text it is given gets a space in front, as SentencePiece does it.
    """

    def __init__(self, chat_template=CHATML, words=(), dummy_prefix=False, add_bos_token=False):
        self.chat_template = chat_template
        self.bos_token_id, self.eos_token_id = 0, 3
        self.eos_token_ids = (3, 1, 4)
        self.add_bos_token = add_bos_token
        self.dummy_prefix = dummy_prefix
        self.vocabulary = [*SPECIAL, *words]
        longest_first = sorted(self.vocabulary, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) + "|.", re.DOTALL)

    @property
    def fingerprint(self):
        return repr(sorted((k, v) for k, v in vars(self).items() if k != "pattern"))

    def encode(self, text):
        if self.dummy_prefix and text and not text.startswith(tuple(SPECIAL)):
            text = " " + text
        pieces = self.pattern.findall(text)
        offset = len(self.vocabulary)
        return [
            self.vocabulary.index(p) if p in self.vocabulary else ord(p) + offset for p in pieces
        ]

    def decode(self, ids, skip_special_tokens=True):
        offset = len(self.vocabulary)
        pieces = [self.vocabulary[i] if i < offset else chr(i - offset) for i in map(int, ids)]
        text = "".join(p for p in pieces if not (skip_special_tokens and p in SPECIAL))
        return text.removeprefix(" ") if self.dummy_prefix else text

    def apply_chat_template(self, messages, add_generation_prompt=False):
        return render_chat_template(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt
        )
