"""Makes tokenizer.json: ids and rendered conversations as transformers gives them.

Run in an environment with transformers 5 (no GPU, no network):

    python tests/golden/make_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf tok512.bin

transformers' own conversion of this GGUF has a fault: it does not know the rule "smollm"
(`tokenizer.ggml.pre`) and cuts text like GPT-2. SmolLM2's published tokenizer.json first splits
off every digit (`Digits(individual_digits=True)`), and llama.cpp does the same for that name. So
the oracle here is transformers' tokenizer with that pre-tokenizer put right; how many of the
strings come out differently without the correction is recorded in the file. The rules "llama-bpe",
"qwen2" and "gpt-2" are tried on the same vocabulary: Llama 3's tokenizer.json sets `ignore_merges`,
and Qwen2's ids come from transformers' Qwen2Tokenizer class.
"""

import json
import pathlib
import random
import struct
import sys

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

FIXED = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "\n  \n", "a", " a", "a ",
    "  a  ", "Hello, world!", "hello world", "HELLO WORLD", "Hello  world", "don't", "DON'T",
    "I'll we've it's", "The capital of France is Paris.", "What is 2+2?", "0", "12", "123",
    "1234567890", " 12", "  12", "   12", "a1b2c3", "3.14159", "1,000,000", "1e-5", "v1.2.3",
    "2024-01-31", "12:34:56", "50%", "$9.99", "x²+y³", "½ ¼", "١٢٣", "१२३", "Ⅳ", "①②", "𝟘𝟙",
    "10\n20\n", "\t1\t2", "abc  123  def", "def f(x):\n    return x + 1\n",
    "for i in range(10):\n\tprint(i)\n", "if (a && b || !c) { d(); }", "#include <stdio.h>",
    "<div class=\"x\">hi</div>", "SELECT * FROM t WHERE id = 42;",
    "x = {'a': [1, 2], 'b': None}", "\\frac{1}{2} \\alpha", "C:\\Users\\x",
    "https://a.b/c?d=e&f=1#g", "user@example.com", "foo_bar_baz", "fooBarBaz", "__init__",
    "->", "!=", "===", "...", "…", "--", "—", "“quotes” ‘single’", "naïve café", "cafe\u0301",
    "Å Å", "ﬁ", "ẛ̣", "über straße", "Ελληνικά", "Привет, мир!", "你好，世界！",
    "日本語のテスト", "こんにちは", "한국어", "中文123中文", "東京2020", "مرحبا بالعالم",
    "שלום עולם", "हिन्दी", "ไทย", "Tiếng Việt", "👍", "😀😃",
    "👨\u200d👩\u200d👧\u200d👦", "🇫🇷", "🏳\ufe0f\u200d🌈",
    "a👍b", "❤\ufe0f", "\u200b", "\ufeff", "\u00a0", "a\u00a0b", "\u3000全角", "\x00", "\x01\x02",
    "\x7f", "\u2028", "�", "𐍈", "\U0001f9ff", "\u202eabc", "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>", " <|endoftext|> ", "a<|im_end|>b", "<|im_start|>", "<|im_end",
    "<|unknown|>", "<repo_name>x<file_sep>", "<s>", "</s>", "<unk>", "[INST] x [/INST]",
    "a" * 50, "ab" * 30, " " * 33, "\n" * 9, "!" * 20, "=" * 40, "_" * 17, ".-" * 10,
    "\t" * 5, "9" * 21, "word " * 12, "  indent\n    more\n        most", "trailing   ",
    "\n leading", "a\n\n\nb", "a \n b", "Mr. O'Neill's", "rock'n'roll", "y'all'd've", "'tis",
    "'s", " 's", "''", "e.g. i.e.", "U.S.A.", "antidisestablishmentarianism",
    "Donaudampfschifffahrtsgesellschaft", "qwertyuiop", "zzzzzz",
    "mixed 汉字 and العربية and 123", "# Title\n\n- item\n- item 2\n\n> quote\n",
    "| a | b |\n|---|---|\n", "Q: Why?\nA: Because.\n", "(A) yes (B) no",
    "The answer is (C).", "A: Let's think step by step.",
]  # fmt: skip

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! 👋"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "  spaces \n"},
        {"role": "assistant", "content": "<b>\"quoted\" & 'single'</b>"},
        {"role": "user", "content": "{{ not a template }}"},
    ],
]

# Other constructs that templates in circulation use, with what transformers makes of them.
TEMPLATES = {
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] "
    "+ ' ' + eos_token }}{% endif %}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {%- if loop.first and m.role == 'system' %}\n  <<{{ "
    "m.content | trim }}>>\n    {% continue %}\n    {%- endif %}\n{{ m | tojson }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}GO{% endif %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}{{ tools is none }}",
}


def make_strings() -> list[str]:
    """The fixed strings, filled up to 200 with random mixtures of their pieces."""
    rng = random.Random(0)
    strings = list(dict.fromkeys(FIXED))
    while len(strings) < 200:
        pieces = rng.sample(FIXED, rng.randint(2, 4))
        strings.append(rng.choice(["", " ", "\n", "  "]).join(piece[:24] for piece in pieces))
    return strings


def read_llama2c_vocabulary(path: pathlib.Path) -> tuple[list[str], list[float]]:
    """Reads llama2.c's tokenizer file: score, length and bytes of each token."""
    data = path.read_bytes()
    tokens, scores, at = [], [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[1:3] = ["<s>", "</s>"]
    return tokens, scores


def main(gguf: pathlib.Path, tok512: pathlib.Path) -> None:
    """Writes tokenizer.json beside this script."""
    strings = make_strings()

    def encode(tokenizer) -> list[list[int]]:
        return [tokenizer.encode(s, add_special_tokens=False) for s in strings]

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    faulty = encode(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    ids = {"smollm": encode(tokenizer), "gpt-2": faulty}
    decoded = [tokenizer.decode(i) for i in ids["smollm"]]

    architecture, description, _ = get_gguf_tokenizer(str(gguf))
    llama3 = description | {"pre_tokenizer_type": "llama-bpe"}
    backend, _ = convert_gguf_tokenizer(architecture, llama3)
    backend.model.ignore_merges = True
    ids["llama-bpe"] = [backend.encode(s, add_special_tokens=False).ids for s in strings]
    qwen = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(description["tokens"])},
        merges=[tuple(merge.split(" ")) for merge in description["merges"]],
    )
    typed = zip(description["tokens"], description["token_type"], strict=True)
    control = [token for token, kind in typed if kind == 3]
    qwen.add_special_tokens({"additional_special_tokens": control})
    ids["qwen2"] = encode(qwen)

    tokens, scores = read_llama2c_vocabulary(tok512)
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    backend, _ = convert_gguf_tokenizer(
        "llama",
        {"tokenizer_type": "llama", "tokens": tokens, "scores": scores, "token_type": types},
    )
    ids["stories260K"] = [backend.encode(s, add_special_tokens=False).ids for s in strings]
    stories_decoded = [backend.decode(i, skip_special_tokens=True) for i in ids["stories260K"]]

    chats = []
    for name, template in {"model": tokenizer.chat_template, **TEMPLATES}.items():
        for messages in CONVERSATIONS:
            for prompt in (False, True):
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                chats.append([name, messages, prompt, text])

    corrected = sum(a != b for a, b in zip(faulty, ids["smollm"], strict=True))
    golden = {
        "changed_by_the_correction": corrected,
        "strings": strings,
        "ids": ids,
        "decoded": decoded,
        "stories260K_decoded": stories_decoded,
        "templates": TEMPLATES,
        "chats": chats,
    }
    out = pathlib.Path(__file__).with_name("tokenizer.json")
    out.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{out}: {len(strings)} strings, {corrected} corrected")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
