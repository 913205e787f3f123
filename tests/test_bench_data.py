"""The data benchmark: the jobs of its processes, and what is made of their reports."""

import importlib
import json
import pathlib
import random

import pytest
from fake_tokenizer import FakeTokenizer

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("bench_data")
    tokenizer = FakeTokenizer()
    tokenizer.vocab_size = 2**20
    monkeypatch.setattr(module, "load_tokenizer", lambda: tokenizer)
    return module


@pytest.fixture
def folders(tmp_path):
    rng = random.Random(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(300):
            record = {"prompt": f"Question {i}?", "completion": "a" * rng.randint(1, 300)}
            file.write(json.dumps(record) + "\n")
    return str(tmp_path / "data.jsonl"), str(tmp_path / "tokens")


def test_two_starts_do_the_same_but_for_the_tokens(bench, folders):
    first, second = bench.start(*folders), bench.start(*folders)
    assert not first["cached"] and second["cached"]
    assert first["tokens"] == second["tokens"] > 300 and first["examples"] == 297
    for report in (first, second):
        parts = sum(report[name] for name in ("tokenize", "pack", "batch", "checksum"))
        assert parts == pytest.approx(report["seconds"])


def test_feeding_counts_tokens_without_padding(bench, folders, capsys):
    bench.main("feed", *folders, "0", "0.05")
    report = json.loads(capsys.readouterr().out)
    assert report["workers"] == 0 and report["seconds"] >= 0.05
    assert 0 < report["tokens"] and 0 < report["private"] <= report["peak_rss"]


def test_records_are_the_same_in_every_run_and_have_words(bench, tmp_path, monkeypatch):
    record = type("Record", (), {"messages": ({"content": "one two three"},)})
    monkeypatch.setattr(bench, "load_records", lambda *_: [record])
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        bench.write_records(path, 50)
    lines = paths[0].read_text().splitlines()
    assert paths[0].read_text() == paths[1].read_text() and len(lines) == 50
    counts = [len(json.loads(line)["completion"].split()) for line in lines]
    assert 5 <= min(counts) < max(counts) <= 40


def test_the_summary_compares_with_what_the_training_step_consumes(bench, tmp_path, monkeypatch):
    start = {"seconds": 8.0, "tokenize": 4.0, "tokens": 1000, "private": 5, "peak_rss": 7}
    fast = start | {"seconds": 2.0, "peak_rss": 9}
    feed = [{"workers": n, "tokens": 900 * (n + 1), "seconds": 3.0} for n in bench.WORKERS]
    samples = {"first": start, "second": fast, "feed": feed}
    summary = bench.summarize(samples | {"consumed": {"tokens_per_second": 10.0, "file": "a"}})
    assert summary == {
        "tokenized_per_second": 250.0,
        "first_over_second": 4.0,
        "fed_per_second": {0: 300.0, 1: 600.0, 2: 900.0},
        "fed_over_consumed": 30.0,
        "peak_rss": 9,
        "private": 5,
    }
    assert bench.summarize(samples | {"consumed": None})["fed_over_consumed"] is None


def test_the_newest_results_of_this_kind_of_processor_count(bench, tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    if "model name" not in cpu:
        pytest.skip("this machine does not name its processor")
    cpu = next(line for line in cpu.splitlines() if "model name" in line).split(":", 1)[1].strip()
    assert bench.consumed_speed() is None

    def write(name, cpu, speed, part="train"):
        summary = {"settings": {"qlora_jax": {"tokens_per_second": speed}}}
        result = {"machine": {"cpu": cpu}, part: {"summary": summary}}
        (results / name).write_text(json.dumps(result))

    write("cpu_1.json", cpu, 100.0)
    write("cpu_2.json", cpu, 200.0)
    write("cpu_3.json", "another", 300.0)
    write("cpu_4.json", cpu, 400.0, part="loading")
    assert bench.consumed_speed() == {"file": "cpu_2.json", "tokens_per_second": 200.0}
