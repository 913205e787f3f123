"""The GPU benchmark without a GPU: its checks find mistakes, its bookkeeping counts, it goes on."""

import dataclasses
import doctest
import importlib
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pallas_kernels import tuning
from pallas_kernels.dequantize_4bit import api as dequantize_api
from pallas_kernels.matmul_4bit import api as matmul_api
from qlora_jax.errors import UserError

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
CASE = {
    "operation": "dequantize",
    "implementation": "xla",
    "quant_type": "nf4",
    "double_quant": True,
    "block_size": 64,
    "dtype": "bfloat16",
    "shape": [130, 192],
    "rows": 0,
    "epilogue": False,
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def worker(load, tmp_path):
    """Makes a `Worker` of a Python program's text."""
    workers = []

    def make(text, **kwargs):
        path = tmp_path / "worker.py"
        path.write_text(text)
        workers.append(load("bench_workers").Worker([sys.executable, path], **kwargs))
        return workers[-1]

    yield make
    for one in workers:
        one.stop()


ECHO = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    if question.get("crash"):
        print("first line\\nthe reason", file=sys.stderr)
        os._exit(3)
    time.sleep(question.get("sleep", 0))
    print("noise")
    print(json.dumps(question | {"pid": os.getpid(), "env": os.environ.get("OF_TEST")}), flush=True)
"""


def test_a_worker_answers_in_one_process(worker):
    echo = worker(ECHO, env={"OF_TEST": "yes"})
    first, second = (echo.ask({"n": n}, timeout_s=30) for n in (1, 2))
    assert (first["n"], second["n"], first["env"]) == (1, 2, "yes")
    assert first["pid"] == second["pid"]


def test_a_crash_costs_one_answer(load, worker):
    echo, error = worker(ECHO), load("bench_workers").WorkerError
    before = echo.ask({}, timeout_s=30)
    with pytest.raises(error, match="ended with code 3: the reason"):
        echo.ask({"crash": True}, timeout_s=30)
    assert echo.ask({}, timeout_s=30)["pid"] != before["pid"]


def test_a_worker_that_hangs_is_ended(load, worker):
    echo = worker(ECHO)
    echo.ask({}, timeout_s=30)
    with pytest.raises(load("bench_workers").WorkerError, match="no answer within"):
        echo.ask({"sleep": 60}, timeout_s=0.2)
    assert "sleep" not in echo.ask({}, timeout_s=30)  # and not the late answer


@pytest.mark.parametrize("operation", ["dequantize", "matmul", "matmul_transposed", "quantize"])
def test_the_reference_agrees_with_the_plain_implementation(load, operation):
    case = CASE | {"operation": operation, "rows": 3 * operation.startswith("matmul")}
    answer = load("bench_gpu_check").check(case, interpret=False)
    assert answer["verdict"] == "ok", answer


def test_a_forgotten_bias_is_found(load, monkeypatch):
    right, transposed = matmul_api.IMPLEMENTATIONS["xla"]
    case = CASE | {"operation": "matmul", "rows": 3, "epilogue": True}
    check = load("bench_gpu_check").check
    assert check(case, interpret=False)["verdict"] == "ok"

    def wrong(*args, bias=None, lora=None, **static):
        return right(*args, bias=None, lora=lora, **static)

    monkeypatch.setitem(matmul_api.IMPLEMENTATIONS, "xla", (wrong, transposed))
    assert check(case, interpret=False)["verdict"] == "wrong"


def test_one_wrong_bit_is_found(load, monkeypatch):
    right = dequantize_api.IMPLEMENTATIONS["xla"]

    def wrong(*args, **static):
        y = right(*args, **static)
        return y.at[129, 191].set(jnp.nextafter(y[129, 191], jnp.bfloat16(9)))

    monkeypatch.setitem(dequantize_api.IMPLEMENTATIONS, "xla", wrong)
    answer = load("bench_gpu_check").check(CASE, interpret=False)
    assert answer["verdict"] == "wrong" and answer["detail"].startswith("[1] bytes differ")


@pytest.mark.parametrize("forgotten", ["column", "row", "nan"])
def test_a_wrong_product_is_found(load, monkeypatch, forgotten):
    right, transposed = matmul_api.IMPLEMENTATIONS["xla"]

    def wrong(x, *args, **static):
        if forgotten == "column":
            return right(x.at[:, 191].set(0), *args, **static)
        value = 0 if forgotten == "row" else jnp.nan
        return right(x, *args, **static).at[:, 129].set(value)

    monkeypatch.setitem(matmul_api.IMPLEMENTATIONS, "xla", (wrong, transposed))
    case = CASE | {"operation": "matmul", "rows": 3}
    assert load("bench_gpu_check").check(case, interpret=False)["verdict"] == "wrong"


def test_a_refusal_is_no_mistake(load, monkeypatch):
    def refuse(*args, **static):
        raise NotImplementedError("only square ones")

    monkeypatch.setitem(dequantize_api.IMPLEMENTATIONS, "xla", refuse)
    answer = load("bench_gpu_check").check(CASE, interpret=False)
    assert answer["verdict"] == "unsupported" and "only square ones" in answer["detail"]


def test_calls_go_through_all_copies_of_the_weight(load):
    ours = load("bench_gpu_ours")
    bench, used = ours.KernelBench(interpret=False), []
    case = {"operation": "matmul", "shape": [64, 128], "rows": 2}
    question = {"case": case, "implementation": "default", "calls": 5, "warm_up": 1}
    answer = bench.answer(question | {"rotate_bytes": 1e4})
    assert answer["clock"] == "wall" and len(answer["seconds"]) == 5
    (copies,) = bench._weights.values()
    assert len(copies) == 4 and len({np.asarray(codes).tobytes() for codes, *_ in copies}) == 4
    kept = []
    ours.time_calls(lambda w: used.append(w) or jnp.zeros(1), [(0,), (1,)], kept, calls=3)
    assert used == [0, 1, 0] and len(kept) == 3


def test_refused_tiles_are_no_reason_to_start_anew(load):
    bench = load("bench_gpu_ours").KernelBench(interpret=True)
    case = {"operation": "dequantize", "shape": [64, 128], "rows": 0, "tiles": {"tile_bytes": 7}}
    assert bench.answer({"default_tiles": ["matmul", "dequantize"]}) == {"tiles": None}
    default = bench.answer({"default_tiles": ["dequantize", "mosaic_gpu"]})["tiles"]
    assert "tile_bytes" in default and default["tile_bytes"] > 7
    question = {"implementation": "mosaic_gpu", "calls": 1, "warm_up": 0, "rotate_bytes": 1e3}
    answer = bench.answer(question | {"case": case})
    assert answer["unsupported"].startswith("ValueError") and "tile_bytes" in answer["unsupported"]
    answer = bench.answer(question | {"case": case | {"tiles": default}})
    assert len(answer["seconds"]) == 1
    tiled = CASE | {"implementation": "mosaic_gpu", "shape": [64, 128], "tiles": default}
    assert bench.answer({"check": tiled})["verdict"] in ("ok", "unsupported")


class FakeWorker:
    """Answers by a function; remembers who was asked."""

    def __init__(self, answer, log):
        self.ask = lambda question, timeout_s: log.append(question) or answer(question)
        self.stop = lambda: log.append("stopped")


def fake_suite(load, **sizes):
    cases, suite = load("bench_gpu_cases"), load("bench_gpu_suite").Suite
    sizes = dataclasses.replace(cases.DRY_RUN, **sizes)
    return suite(dry_run=True, rival_python=None, console=Console(quiet=True), sizes=sizes)


def test_sides_take_turns_and_one_that_fails_is_asked_no_more(load):
    def answer(question):
        if question["implementation"] == "broken":
            return {"error": "illegal address"}
        return {"seconds": [1.0, 2.0], "clock": "kernels", "kernels": ["k"]}

    log = []
    side = FakeWorker(answer, log)
    asked = [("ours", "default"), ("ours", "broken"), ("rival", "bitsandbytes")]
    case = {"operation": "dequantize", "shape": [2, 64], "rows": 0}
    row = fake_suite(load, turns=2).time_case(case, asked, {"ours": side, "rival": side})
    order = [entry if entry == "stopped" else entry["implementation"] for entry in log]
    assert order == ["default", "broken", "stopped", "bitsandbytes", "default", "bitsandbytes"]
    assert row["seconds"] == {"default": [1.0, 2.0] * 2, "bitsandbytes": [1.0, 2.0] * 2}
    assert row["not"] == {"broken": "illegal address"}


def timed(operation, shape, rows, clock="kernels", **seconds):
    names = {"ours": "default", "rival": "bitsandbytes", "dense": "torch bf16"}
    samples = {names[who]: [value] for who, value in seconds.items()}
    case = {"operation": operation, "shape": list(shape), "rows": rows}
    return {"case": case, "seconds": samples, "clock": dict.fromkeys(samples, clock), "not": {}}


def test_goals_take_the_worst_shape(load):
    report = load("bench_gpu_report")
    size = 8192 * 8192
    moved = report.moved_bytes({"operation": "dequantize", "shape": [8192, 8192], "rows": 0})
    assert moved == size / 2 + size / 64 + 4 * size / 64 / 256 + 2 * size
    rows = [
        timed("dequantize", (8192, 8192), 0, ours=moved / 0.8e12, rival=2 * moved / 0.8e12),
        timed("matmul", (8192, 8192), 1, ours=1.0, rival=1.5, dense=3.0),
        timed("matmul", (4096, 4096), 1, ours=1.0, rival=1.1, dense=2.0),
        timed("matmul", (4096, 4096), 16, ours=1.0, rival=2.5),
        timed("matmul", (4096, 4096), 4096, ours=1.1, dense=1.0),
        timed("matmul", (8192, 8192), 4096, ours=1.2, dense=1.0),
    ]
    kernels = {"rows": rows, "limits": {"bytes_per_s": 1e12}}
    train = {"tokens_per_second": 20.0}, {"tokens_per_second": 5.0}, {"tokens_per_second": 10.0}
    steps = {
        "ours train full": train[0] | {"digest": "a"},
        "ours paged 100": {"tokens_per_second": 16.0, "digest": "a"},
        "ours paged 50": {"tokens_per_second": 18.0, "digest": "b"},
        "ours short 100": {"room_bytes": 1 << 30, "digest": "a"},
        "ours short 0": {"room_bytes": 1 << 30, "ran_out": "RESOURCE_EXHAUSTED"},
        "rival train checkpointing": train[1],
        "rival train no checkpointing": train[2],
        "ours decode": {"seconds": {"16": [1.0], "128": [2.0]}},
        "ours decode large": {"seconds": {"16": [1.0], "128": [3.0]}},
        "rival decode": {"error": "no memory"},
    }
    found = report.goals({"dry_run": False, "kernels": kernels, "steps": steps})
    figures = [goal["measured"] and round(goal["measured"], 3) for goal in found]
    assert figures == [0.8, 2.0, 1.1, 3.0, 2.5, 1.2, 2.0, None, 112.0, 56.0, 1.25, 0.0, 1.0]
    met = [True, True, False, True, True, False, True, None, False, True, False, False, True]
    assert [goal["met"] for goal in found] == met
    found = report.goals({"dry_run": True, "kernels": kernels, "steps": steps})
    assert {goal["met"] for goal in found} == {None}


def test_times_of_different_clocks_are_not_compared(load):
    report = load("bench_gpu_report")
    row = timed("matmul", (64, 64), 1, ours=1.0, rival=9.0, dense=4.0)
    row["clock"]["bitsandbytes"] = "events"
    assert report.ratio(row, "bitsandbytes") is None
    assert report.ratio(row, "bitsandbytes", "torch bf16") == 4.0


def test_decoding_is_what_lies_between_two_counts(load):
    report = load("bench_gpu_report")
    answer = {"seconds": {"16": [1.0, 1.5, 9.0], "128": [5.5]}}
    assert report.tokens_per_second(answer) == 112 / 4.0


def test_goals_are_timed_first_and_nothing_twice(load):
    cases = load("bench_gpu_cases")
    found = cases.timing_cases(cases.FULL)
    names = [cases.case_name(case) for case in found]
    assert len(set(names)) == len(names) == len(cases.FULL.shapes) * (2 + 2 * 6)
    goals = {"dequantize 4096x4096", "matmul 16 x (4096x4096)", "matmul 4096 x (17920x6656)"}
    assert goals < set(names[:20]) and "matmul 1 x (22016x8192)" in names[:20]


class FakeStopwatch:
    """Seconds by a function; tiles of 1 stage are wrong."""

    def __init__(self, seconds):
        self.seconds, self.compiled = seconds, []
        self.right = lambda case, name, tiles: tiles.get("stages") != 1

    def compile(self, pairs):
        self.compiled += pairs


@pytest.mark.parametrize("name", ["cases", "machine", "report", "tune"])
def test_examples(load, name):
    tried = doctest.testmod(load(f"bench_gpu_{name}"))
    assert tried.attempted and not tried.failed


def test_kernels_are_split_by_calls_only_if_all_calls_launch_the_same(load):
    split = load("bench_gpu_cases").split_kernels
    kernels = [("a", 1.0), ("b", 3.0), ("a", 2.0), ("b", 4.0)]
    assert split(kernels, 2)["seconds"] == [4.0, 6.0]
    assert split(kernels, 4)["seconds"] == [2.5]  # "a" is no call, nor is "b"
    assert split(kernels[:3], 2) == {"seconds": [3.0], "clock": "kernels", "kernels": ["a", "b"]}


def test_best_tiles_are_found_by_doubling_and_halving(load):
    tune = load("bench_gpu_tune")

    def seconds(case, name):
        tiles = case.get("tiles", {"rows": 8, "stages": 2})
        if tiles["stages"] > 4:
            return None  # refused
        return abs(tiles["rows"] - 32) + abs(tiles["stages"] - 4) + 1.0

    watch, start = FakeStopwatch(seconds), {"rows": 8, "stages": 2}
    found = tune.best_tiles({}, "triton", start, watch, lambda: 1.0)
    assert found == {
        "tiles": {"rows": 32, "stages": 4},
        "seconds": 1.0,
        "default_seconds": 27.0,
    }
    tried = [json.dumps(case["tiles"]) for case, _ in watch.compiled]
    assert len(tried) == len(set(tried)) > 5
    found = tune.best_tiles({}, "triton", start, watch, lambda: -1.0)
    assert found["tiles"] == {"rows": 16, "stages": 2}  # the round that had begun, and no more
    watch = FakeStopwatch(lambda case, name: float(case.get("tiles", start)["stages"]))
    assert tune.best_tiles({}, "triton", start, watch, lambda: 1.0)["tiles"]["stages"] == 2


def test_crossovers_are_written_as_the_package_reads_them(load, tmp_path, monkeypatch):
    tune = load("bench_gpu_tune")
    times = {"triton": lambda rows: rows, "dequantize": lambda rows: 20.0}

    def seconds(case, name):  # the other fused kernel refuses everything
        return times[name](case["rows"]) if name in times else None

    rows = tune.crossover((4096, 4096), ["mosaic_gpu", "triton"], FakeStopwatch(seconds))
    assert rows == 16
    assert tune.crossover((4096, 4096), ["mosaic_gpu"], FakeStopwatch(seconds)) == 0
    kind = {"device_kind": "NVIDIA L4", "compute_capability": "8.9"}
    other = {"device_kind": "NVIDIA A100", "compute_capability": "8.0", "rows": [[8, 64, 3]]}
    path = tmp_path / "crossovers.json"
    path.write_text(json.dumps([kind | {"rows": [[8, 64, 99]]}, other]))
    found = {"crossover": kind | {"rows": [[4096, 4096, rows]]}, "tiles": []}
    assert tune.write(found, tmp_path) == [path]
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    read = {entry.device_kind: entry.rows for entry in tuning.crossovers.__wrapped__()}
    assert read == {"NVIDIA L4": {(4096, 4096): 16}, "NVIDIA A100": {(8, 64): 3}}


def test_without_a_gpu_it_says_what_to_do(load, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--dry-run"):
        load("bench_gpu_machine").require_gpu()


def test_a_part_belongs_to_its_suite(load):
    bench = load("bench")
    assert bench.chosen_parts("gpu", None) == ["check", "kernels", "steps"]
    assert bench.chosen_parts("gpu", ["tune", "check"]) == ["check", "tune"]
    with pytest.raises(UserError, match="the suite cpu has the parts dequantize, train"):
        bench.chosen_parts("cpu", ["steps"])


def test_tuning_writes_what_it_timed(load, monkeypatch):
    """The whole part with the plain implementation posing as a kernel that has tiles."""
    tune = load("bench_gpu_tune")
    monkeypatch.setitem(matmul_api.IMPLEMENTATIONS, "triton", None)
    monkeypatch.setitem(dequantize_api.IMPLEMENTATIONS, "triton", None)

    def answer(question):
        if "compile" in question:
            return {"seconds": 1.0}
        if "default_tiles" in question:
            has_tiles = question["default_tiles"] == ["dequantize", "triton"]
            return {"tiles": {"rows": 4} if has_tiles else None}
        if "check" in question:
            return {"verdict": "ok"}
        rows = question["case"].get("tiles", {"rows": 4})["rows"]
        return {"seconds": [float(rows)], "clock": "kernels", "kernels": []}

    suite = fake_suite(load, shapes=((128, 128),), rows=(1,))
    suite.facts = {"ours": {"device_kind": "NVIDIA L4", "compute_capability": "8.9"}}
    suite.failed = {("dequantize", "mosaic_gpu"), ("matmul", "mosaic_gpu")}
    found = tune.tune(suite, FakeWorker(answer, []))
    kind = {"device_kind": "NVIDIA L4", "compute_capability": "8.9"}
    assert found["crossover"] == kind | {"rows": [[128, 128, 256]]}
    (entry,) = [one for one in found["tiles"] if one["operation"] == "dequantize"]
    assert entry == kind | {
        "operation": "dequantize",
        "implementation": "triton",
        "shape": [128, 128],
        "rows": 0,
        "tiles": {"rows": 1},
        "seconds": 1.0,
        "default_seconds": 4.0,
    }
