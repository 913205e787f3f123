"""The GPU benchmark's whole steps, in this process."""

import importlib
import pathlib

import jax
import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


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
