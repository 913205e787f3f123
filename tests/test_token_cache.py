"""The cache of tokens: the same tokens or none, whatever happens to its files."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run
from fake_tokenizer import GUANACO, FakeTokenizer

from qlora_jax.data import token_cache
from qlora_jax.data.batches import BatchIterator
from qlora_jax.data.example_arrays import Examples
from qlora_jax.data.masking import tokenize_each
from qlora_jax.data.records import read_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.token_cache import default_cache_dir, load_tokenized
from qlora_jax.errors import DataError
from qlora_jax.training.data import load_training_data

OPTIONS = dict(max_len=200, train_on="assistant", on_bad_record="skip")
PAIRS = [{"prompt": f"What is {i}?", "completion": "It is " + "x" * i} for i in range(1, 9)]
LINES = [*map(json.dumps, PAIRS), "broken", json.dumps({"prompt": "y" * 300, "completion": "z"})]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def load(tmp_path, file):
    """Loads the file with some options changed, into one cache."""

    def run(tokenizer=None, path=file, format="auto", **options):
        options = {"cache_dir": tmp_path / "cache", **OPTIONS, **options}
        return load_tokenized(path, format, tokenizer or FakeTokenizer(), **options)

    return run


def contents(found):
    examples = Examples([found.table])
    return (
        [(e.record_id, e.tokens.tolist(), e.loss_mask.tolist(), e.truncated) for e in examples],
        [found.table.question(i) for i in range(len(found.table))],
        found.table.records.tolist(),
        found.report,
        found.fingerprint,
    )


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_the_second_start_reads_no_record_and_finds_the_same(load, tmp_path, monkeypatch):
    in_memory = load(cache_dir=None)
    first = load()
    assert not first.cached and first.table.folder is not None and in_memory.table.folder is None
    assert contents(first) == contents(in_memory)
    assert first.report.records == 9 and first.report.skipped == first.report.dropped == 1
    monkeypatch.setattr(FakeTokenizer, "encode", None)
    monkeypatch.setattr(token_cache, "read_records", None)
    second = load()
    assert second.cached and contents(second) == contents(first)
    assert len(entries(tmp_path)) == 1


def twice_as_long(*args, **options):
    for record, example in tokenize_each(*args, **options):
        tokens = np.concatenate([example.tokens, example.tokens])
        mask = np.concatenate([example.loss_mask, example.loss_mask])
        yield record, dataclasses.replace(example, tokens=tokens, loss_mask=mask)


def test_whatever_decides_the_tokens_is_in_the_key(load, tmp_path, file, monkeypatch):
    load()
    renamed = tmp_path / "b.jsonl"  # its name is in the ids of the records
    shutil.copy(file, renamed)
    for options in (
        {"path": renamed},
        {"tokenizer": FakeTokenizer(GUANACO)},
        {"tokenizer": FakeTokenizer(words=["What"])},
        {"max_len": 199},
        {"train_on": "all"},
        {"source_max_len": 20},
        {"literal": True},
        {"max_records": 3},
        {"format": "prompt_completion"},
        {"tokenize": twice_as_long},
    ):
        assert not load(**options).cached and load(**options).cached
    assert load().cached
    file.write_text("\n".join(LINES[:-1]) + "\n")
    assert not load().cached
    monkeypatch.setattr(token_cache, "_code_version", lambda: "another")
    assert not load().cached
    with pytest.raises(DataError, match="a.jsonl:9"):
        load(on_bad_record="error")
    assert len(entries(tmp_path)) == 13  # a reading that failed left nothing


def cut(folder):
    with (folder / "tokens").open("r+b") as file:
        file.truncate(40)


def flip(folder):
    with (folder / "loss_mask").open("r+b") as file:
        file.seek(30)
        file.write(b"\x07")


def empty_about(folder):
    (folder / "about.json").write_text("")


def other_about(folder):
    (folder / "about.json").write_text('{"files": []}')


def lose_ids(folder):
    (folder / "ids").unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty_about, other_about, lose_ids])
def test_a_damaged_entry_is_noticed_and_made_again(load, tmp_path, caplog, damage):
    expected = contents(load())
    (name,) = entries(tmp_path)
    damage(tmp_path / "cache" / name)
    made_again = load()
    assert not made_again.cached and contents(made_again) == expected
    assert "damaged" in caplog.text and name in caplog.text
    assert load().cached and entries(tmp_path) == [name]


def test_of_two_that_make_the_same_entry_the_first_wins(load, tmp_path):
    inner = []

    @functools.wraps(tokenize_each)  # its name is in the key
    def slow(*args, **options):
        yield from tokenize_each(*args, **options)
        inner.append(load())  # another start, faster than this one

    outer = load(tokenize=slow)
    assert not inner[0].cached and outer.table.folder == inner[0].table.folder
    assert contents(outer) == contents(inner[0])
    assert len(entries(tmp_path)) == 1


def _load_many(folder, barrier, damaged):
    path = pathlib.Path(folder) / "a.jsonl"
    for _ in range(10):
        barrier.wait()
        if damaged:
            shutil.rmtree(pathlib.Path(folder) / "cache", ignore_errors=True)
        load_tokenized(
            path, "auto", FakeTokenizer(), cache_dir=pathlib.Path(folder) / "cache", **OPTIONS
        )


def test_processes_that_start_at_the_same_time(load, tmp_path):
    expected = contents(load(cache_dir=None))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_load_many, args=(str(tmp_path), barrier, i == 0)) for i in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = load()
    assert contents(found) == expected and found.table.folder is not None
    assert len(entries(tmp_path)) == 1


def test_what_stops_in_the_middle_leaves_nothing(load, tmp_path):
    def interrupted(*args, **options):
        yield from itertools.islice(tokenize_each(*args, **options), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(tokenize=interrupted)
    assert entries(tmp_path) == []
    killed, running = (tmp_path / "cache" / f".aa.{i}.bb" for i in range(2))
    for folder, age in ((killed, 2 * 24 * 3600), (running, 60)):
        folder.mkdir()
        (folder / "tokens").write_bytes(b"1234")
        for path in (folder / "tokens", folder):
            then = path.stat().st_mtime - age
            os.utime(path, (then, then))
    load()
    assert not killed.exists() and running.exists()


def test_where_nothing_can_be_written_the_tokens_are_in_memory(load, tmp_path, caplog):
    place = tmp_path / "file"
    place.write_text("in the way")
    found = load(cache_dir=place)
    assert contents(found) == contents(load(cache_dir=None)) and found.table.folder is None
    assert str(place) in caplog.text and "data.cache_dir" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(load, file, tmp_path):
    def append(*args, **options):
        yield from tokenize_each(*args, **options)
        file.write_text(LINES[0])

    with pytest.raises(DataError, match="changed while it was read"):
        load(tokenize=append)
    assert entries(tmp_path) == []


def test_records_are_read_as_they_are_asked_for(file):
    records = read_records(file, "auto", "error", 0, DataReport())
    assert next(records).record_id == "a.jsonl:1"
    assert [record.record_id for record in itertools.islice(records, 7)][-1] == "a.jsonl:8"
    with pytest.raises(DataError, match="a.jsonl:9"):
        next(records)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config = tiny_run.tiny_config(tmp_path, tiny_run.write_data(tmp_path / "sums.jsonl", 40))
    config.data.max_len, config.data.cache_dir = 200, "auto"
    return config


def test_a_run_is_the_same_with_and_without_its_cache(config):
    def start():
        data = load_training_data(config, FakeTokenizer())
        batches = BatchIterator(data.train, batch_size=2, seq_len=200, seed=config.seed)
        heldout = [example.record_id for example in data.heldout]
        return data.cached, (data.question, heldout, next(batches).record_ids, batches.state())

    config.data.cache_dir = "none"
    cached, expected = start()
    assert not cached and not default_cache_dir().exists()
    config.data.cache_dir = "auto"
    assert start() == (False, expected)
    assert start() == (True, expected)
    assert default_cache_dir().stat().st_mode & 0o077 == 0
    config.data.cache_dir = str(default_cache_dir())
    assert start() == (True, expected)
    config.seed, config.data.eval_fraction = 1, 0.5  # decided after the tokens
    cached, other = start()
    assert cached and other[1] != expected[1]


def test_every_source_of_a_mixture_has_an_entry_of_its_own(config, tmp_path):
    other = tiny_run.write_data(tmp_path / "b.jsonl", 7)
    config.data.update({"mixture": f"auto={config.data.path}", "path": "", "name": ""})
    load_training_data(config, FakeTokenizer())
    config.data.mixture += f"*2, auto={other}"
    assert not load_training_data(config, FakeTokenizer()).cached
    assert len(list(default_cache_dir().iterdir())) == 2
    data = load_training_data(config, FakeTokenizer())
    assert data.cached and len(np.unique(data.train.chosen)) < len(data.train)
