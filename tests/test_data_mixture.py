"""Mixtures, duplicates and overlap, alone and as a run reads them."""

import collections
import json

import pytest
import tiny_run
from fake_tokenizer import FakeTokenizer

from qlora_jax.data.formats import Record, pair
from qlora_jax.data.mixture import Source, parse_mixture, repeat
from qlora_jax.data.overlap import drop_duplicates, measure_overlap
from qlora_jax.data.report import DataReport
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.training.data import describe_data, load_portions, load_training_data


def texts(*contents, name="a.jsonl"):
    return [Record(f"{name}:{i}", "text", text=text) for i, text in enumerate(contents, 1)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def config(tmp_path):
    config = tiny_run.tiny_config(tmp_path / "model", tmp_path / "unused")
    config.data.update({"path": "", "eval_fraction": 0.0, "max_len": 400})
    return config


def test_a_mixture_is_read_part_by_part():
    assert parse_mixture("oasst1*2, alpaca=/my data/a,b.json*.5".replace("a,b", "ab")) == [
        Source("oasst1", "timdettmers/openassistant-guanaco", 2.0),
        Source("alpaca", "/my data/ab.json", 0.5),
    ]
    for text in ("", "oasst1,", "a b", "oasst1*-1", "oasst1*1.2.3", "nosuch=x"):
        with pytest.raises(ConfigError):
            parse_mixture(text)


def test_weights_are_copies_and_a_fixed_random_part():
    items = [f"a:{i}" for i in range(100)]
    counts = collections.Counter(repeat(items, 2.25, seed=3))
    assert collections.Counter(counts.values()) == {2: 75, 3: 25}
    assert repeat(items, 0.5, seed=3) == repeat(items, 0.5, seed=3) != repeat(items, 0.5, seed=4)
    assert repeat(items, 1.0, seed=3) == items


def test_each_set_of_a_mixture_keeps_its_mapping_and_its_loss(config, tmp_path):
    alpaca = [{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(10)]
    dialogues = [{"text": f"### Human: Hi {i}### Assistant: Oh {i}"} for i in range(4)]
    a, b = write(tmp_path / "a.jsonl", alpaca), write(tmp_path / "b.jsonl", dialogues)
    config.data.mixture = f"alpaca={a}*0.5, oasst1={b}*2"
    data = load_training_data(config, FakeTokenizer())
    by_file = collections.Counter(example.record_id.split(":")[0] for example in data.train)
    assert by_file == {"a.jsonl": 5, "b.jsonl": 8}
    shares = {e.record_id.split(":")[0]: e.loss_mask.mean() for e in data.train}
    assert shares["a.jsonl"] < 0.2 and shares["b.jsonl"] > 0.9
    assert describe_data(config) == f"{a} (0.5 times), {b} (2 times)"
    assert data.fingerprint.count("+") == 1


def test_held_out_records_of_a_mixture_are_not_repeated(config, tmp_path):
    records = [{"text": f"text number {i}"} for i in range(10)]
    path = write(tmp_path / "a.jsonl", records)
    config.data.update({"mixture": f"text={path}*3", "eval_fraction": 0.2})
    data = load_training_data(config, FakeTokenizer())
    assert len(data.train) == 24 and len(data.heldout) == 2
    assert not {e.record_id for e in data.train} & {e.record_id for e in data.heldout}


def test_duplicates_are_counted_and_left_out_when_asked(config, tmp_path):
    records = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": " 4"}]
    records += [{"prompt": "3+3?", "completion": "6"}, {"prompt": "2+2?", "completion": "5"}]
    config.data.path = str(write(tmp_path / "a.jsonl", records))
    report = DataReport()
    (portion,) = load_portions(config, report)
    assert len(portion.train) == 4
    assert report.lines()[0].endswith("; 1 duplicate kept (data.deduplicate=True drops them)")
    config.data.deduplicate, report = True, DataReport()
    (portion,) = load_portions(config, report)
    assert [record.record_id for record in portion.train] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert report.lines()[0].endswith("; 1 duplicate left out")


def test_no_record_of_the_evaluation_file_is_trained_on_when_deduplicating(config, tmp_path):
    train = [{"text": text} for text in ("one", "two", "three")]
    config.data.path = str(write(tmp_path / "a.jsonl", train))
    config.data.eval_path = str(write(tmp_path / "b.jsonl", [{"text": "TWO "}]))
    config.data.deduplicate = True
    train, evaluation = load_portions(config, DataReport())
    assert [record.text for record in train.train] == ["one", "three"] and not train.heldout
    assert [record.text for record in evaluation.heldout] == ["TWO "] and not evaluation.train


def test_duplicates_are_the_same_words_in_all_messages():
    records = [Record("a:1", "x", **pair("A b", "c")), Record("a:2", "x", **pair("a  B", "C"))]
    records += [Record("a:3", "x", **pair("a b", "d")), Record("a:4", "text", text="a b c")]
    kept = drop_duplicates(records)
    assert [record.record_id for record in kept] == ["a:1", "a:3"]


def test_overlap_counts_records_by_their_shared_words_in_a_row():
    known = " ".join(f"w{i}" for i in range(16))
    train = texts("x " + known + " y", "nothing to see here")
    heldout = texts(
        known,  # all of it
        known.upper() + " new words that nobody wrote before this",  # 9 of 17 8-grams
        "w0 w1 w2 w3 w4 w5 w6 w7 " + " ".join(f"v{i}" for i in range(20)),  # 1 of 21
        " ".join(f"v{i}" for i in range(9)),
        "too short",
        name="b.jsonl",
    )
    overlap = measure_overlap(train, heldout)
    assert (overlap.records, overlap.any, overlap.half) == (4, 3, 2)
    assert overlap.examples == ("b.jsonl:1", "b.jsonl:2")
    assert "of 4 held-out records of at least 8 words, 3 share 8 words" in overlap.line()
    assert measure_overlap(train, []).records == 0


def test_a_token_without_a_row_in_the_embedding_is_refused(config, tmp_path):
    config.data.path = str(write(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "ab\u00e9"}]))
    tokenizer = FakeTokenizer()
    rows = tokenizer.encode("\u00e9")[0]
    with pytest.raises(
        DataError, match=f"a.jsonl:2: token {rows} .'\u00e9'. has no row in .* {rows};"
    ):
        load_training_data(config, tokenizer, vocab_size=rows)
    assert len(load_training_data(config, tokenizer, vocab_size=rows + 1).train) == 2
