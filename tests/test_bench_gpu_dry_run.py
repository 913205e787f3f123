"""The GPU benchmark's parts from beginning to end, without a GPU."""

import dataclasses
import importlib
import json
import pathlib

import jax
import pytest
from rich.console import Console

from pallas_kernels import triton_call
from pallas_kernels.matmul_4bit import api as matmul_api

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def dry_run(load, parts, **sizes):
    sizes = dataclasses.replace(load("bench_gpu_cases").DRY_RUN, **sizes)
    saved = []
    result = load("bench_gpu").run(
        parts=parts,
        dry_run=True,
        rival_python=None,
        budget_s=1200.0,  # the machine may be busy
        console=Console(quiet=True),
        save=lambda found: saved.append(json.loads(json.dumps(found))),
        sizes=sizes,
    )
    assert saved[-1] == json.loads(json.dumps(result)) and len(saved) == len(parts) + 1
    return result


def assert_everything_ran(result, names):
    absent = {"triton"} if triton_call.triton is None else set()
    names = [name for name in names if name not in absent]
    rows = result["check"]
    verdicts = {(row["operation"], row["implementation"]): row["verdict"] for row in rows}
    for operation in ("dequantize", "matmul", "matmul_transposed", "quantize"):
        for name in names:
            assert verdicts[operation, name] == "ok", rows
    assert {row["verdict"] for row in rows} <= {"ok", "unsupported"}, rows
    cases_timed = {row["case"]["operation"] for row in result["kernels"]["rows"]}
    assert cases_timed == {"dequantize", "matmul", "matmul_transposed", "quantize"}
    for row in result["kernels"]["rows"]:
        assert len(row["seconds"].get("default", [])) == 2, row["not"]
        assert set(row["not"]) <= absent, row["not"]
    assert len(result["goals"]) == 13 and {goal["met"] for goal in result["goals"]} == {None}


def test_a_reduced_dry_run(load, monkeypatch):
    # Seconds a call in the interpreter; what is not among the names here is not asked for.
    # A new table: an entry that is taken out and put back would come last, and order is preference.
    table = {n: f for n, f in matmul_api.IMPLEMENTATIONS.items() if n != "mosaic_gpu"}
    monkeypatch.setattr(matmul_api, "IMPLEMENTATIONS", table)
    sizes = dict(rows=(1,), warm_up=0, check_formats=1)
    result = dry_run(load, ["check", "kernels"], **sizes)
    assert_everything_ran(result, ["xla", "default"])


@pytest.mark.slow
def test_a_dry_run_of_all_kernels(load):
    implementations = load("bench_gpu_check").APIS["quantize"].IMPLEMENTATIONS
    result = dry_run(load, ["check", "kernels"])
    assert_everything_ran(result, [*implementations, "default"])


@pytest.mark.slow
def test_a_dry_run_of_whole_steps(load):
    steps = dry_run(load, ["steps"])["steps"]
    trainings = [f"ours train {remat}" for remat in ("full", "projections", "none")]
    paged = ["ours paged 100", "ours paged 50"]
    short = ["ours short 100", "ours short 0"]
    assert list(steps) == ["ours decode", *paged, *trainings, *short, "ours decode large"]
    for name in short:  # a CPU does not count its memory
        assert "skipped" in steps.pop(name)
    for name, answer in steps.items():
        assert "error" not in answer, (name, answer)
    assert len({steps[name]["digest"] for name in [*paged, "ours train full"]}) == 1
    assert steps["ours train full"]["losses"] == pytest.approx(steps["ours train none"]["losses"])
    predicted = [steps[name]["predicted_bytes"] for name in trainings]
    assert 0 < predicted[0] < predicted[1] < predicted[2]


@pytest.mark.slow
def test_a_step_short_of_memory(load, monkeypatch):
    module = load("bench_gpu_steps")
    bench = module.StepBench(load("bench_gpu_cases").DRY_RUN)
    ask = {"run": "short", "setting": "100"}
    assert "skipped" in bench.answer(ask)
    answers = [bench.answer({"run": "paged", "setting": "100"})]
    answers.append(bench.answer({"run": "train", "setting": "full"}))
    plans = sorted(answer["predicted_bytes"] for answer in answers)
    assert "skipped" in bench.answer(ask)  # a CPU does not count its memory
    monkeypatch.setattr(module, "memory_stats", lambda: {"bytes_limit": plans[1] + (9 << 20)})
    found = bench.answer(ask)
    assert found["digest"] == answers[0]["digest"] == answers[1]["digest"]
    assert plans[0] <= found["room_bytes"] <= plans[1]

    class Exhausted:
        memory_analysis = bench._compiled["full", 0.0].memory_analysis

        def __call__(self, *args):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 2.0GiB")

    bench._compiled["full", 0.0] = Exhausted()
    assert "RESOURCE_EXHAUSTED" in bench.answer(ask | {"setting": "0"})["ran_out"]
