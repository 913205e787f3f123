"""Patterns that come with a model or adapter mean what they mean elsewhere, and take no hours."""

import itertools
import pathlib
import re
import time

import pytest
from flax import nnx

from qlora_jax.errors import WeightsError
from qlora_jax.layer_formats import is_skipped, said_formats
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.weights import foreign_expressions
from qlora_jax.weights.peft_config import PeftConfig

MODULES = [
    "lm_head",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.2.self_attn.o_proj",
    "language_model.model.layers.1.mlp.gate_proj",
]
NAMES = [
    "lm_head",
    "model.layers.1",
    "model.layers.1.",
    "mlp",
    "up_proj",
    "proj",
    "model",
    "o_proj",
]
PATTERNS = [
    *(
        "model.layers.*",
        "model.layers.*.mlp",
        ".*up_proj",
        "model.*proj",
        ".*",
        r"model\.layers\.1",
    ),
    *(
        ".*.*up",
        ".*mlp.*_proj",
        "^model.layers.1$",
        "^lm_head$",
        ".*layers.1.*down_proj",
        "x.*",
        "",
    ),
]


def transformers_does(module: str, key: str) -> bool:
    """`should_convert_module` of transformers 5, turned around."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return bool(re.match(rf"(?:{key}){boundary}", module)) or module.endswith(key)


@pytest.mark.parametrize("key", NAMES + PATTERNS)
def test_names_and_wildcards_as_in_transformers(key):
    for module in MODULES:
        assert is_skipped(module, [key]) == transformers_does(module, key), (module, key)


def test_all_short_patterns_as_in_transformers():
    for parts in itertools.product(("a", ".*", r"\.", "."), repeat=5):
        key = "".join(parts)
        for module in ("aabb", "a.b", "ab.ab.a", "b", "a.a.b.ba"):
            assert is_skipped(module, [key]) == transformers_does(module, key), (module, key)


@pytest.mark.parametrize("key", ["(", "(a+)+$", "a{1000}{1000}", "[", "a|b", "(?R)", "\\", "a*"])
def test_other_regular_expressions_are_refused(key):
    with pytest.raises(WeightsError, match="Write out the names"):
        is_skipped("model.layers.1", [key])


def test_many_wildcards_take_no_time():
    started = time.monotonic()
    assert not is_skipped("a" * 200, [".*a" * 60 + ".*b"])
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("skip", ["lm_head", [3], [["a"]], {"a": 1}, ["a" * 300], ["a"] * 10_001])
def test_what_is_no_list_of_names_is_refused(skip):
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    model = nnx.eval_shape(lambda: Llama(LlamaConfig(**sizes), rngs=nnx.Rngs(0)))
    said = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skip}
    config = {"model_type": "llama", "quantization_config": said}
    with pytest.raises(WeightsError, match="llm_int8_skip_modules that are no list"):
        said_formats(config, model)
    said["llm_int8_skip_modules"] = ["mlp"]
    assert "layers/mlp/up_proj" in said_formats(config, model)
    said["llm_int8_skip_modules"] = ["model.layers.*.mlp"]
    assert "layers/mlp/up_proj" not in said_formats(config, model)


ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
LAYERS = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qkvo"]
PATH = pathlib.Path("adapter_config.json")
# As a tool that trains language and vision writes it.
REAL = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|q_proj)))"
)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*.*)*x"},
        {"target_modules": "(?:(?:[a-z_.0-9]+)+)+!"},
        {"rank_pattern": {"(.*.*)*x": 4}},
        {"alpha_pattern": {"(.*.*)*x": 4.0}},
        {"exclude_modules": "(.*.*)*x"},
        {"layers_to_transform": [1], "layers_pattern": ["(.*.*)*x"]},
    ],
)
def test_expressions_of_an_adapter_that_take_years_are_refused(monkeypatch, change):
    monkeypatch.setattr(foreign_expressions, "SECONDS", 0.5)
    config = PeftConfig.from_json(ADAPTER | change, PATH)
    with pytest.raises(WeightsError, match="cannot be compared with the names.*within 0.5 s"):
        foreign_expressions.try_expressions(config.expressions(), LAYERS, PATH)


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999999}", "a" * 5000])
def test_expressions_of_an_adapter_that_cannot_be_compiled_are_refused(pattern):
    with pytest.raises(WeightsError, match="rank_pattern is .*, expected is a regular expression"):
        PeftConfig.from_json(ADAPTER | {"rank_pattern": {pattern: 4}}, PATH)


def test_real_expressions_of_adapters_are_used():
    change = {"target_modules": REAL, "rank_pattern": {".*layers.1.*q_proj": 4, "k_proj": 2}}
    config = PeftConfig.from_json(ADAPTER | change, PATH)
    assert len(config.expressions()) == 2
    foreign_expressions.try_expressions(config.expressions(), LAYERS, PATH)
    assert [name for name in LAYERS if config.targets(name)] == [
        name for name in LAYERS if name.endswith(("q_proj", "k_proj"))
    ]
    ranks = {name: config.rank_of(name) for name in LAYERS[4:7]}
    assert list(ranks.values()) == [4, 2, 8]
