"""Runs whose optimizer state moves between the device's and the host's memory."""

import dataclasses
import importlib
import io
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from qlora_jax import config_rules, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import TrainingError
from qlora_jax.memory_limits import CONTEXT_BYTES, claim_gpu, host_limits
from qlora_jax.metrics import read_metrics
from qlora_jax.report import Report
from qlora_jax.training import fitting, stepping
from qlora_jax.training.building import build_model, build_optimizer, split_model
from qlora_jax.training.step import init_state
from qlora_jax.tree import flatten_paths

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
EVERYTHING, MOST, HALF = "everything", "most", "half"


@pytest.fixture(autouse=True)
def small_leaves_move_too(monkeypatch):
    monkeypatch.setattr(importlib.import_module("qlora_jax.optim.paged"), "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(fitting, "_LEAST_ROOM", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and data."""
    folder = tmp_path_factory.mktemp("files")
    return tiny_run.write_model(folder / "model"), tiny_run.write_data(folder / "sums.jsonl")


def make_config(files):
    config = tiny_run.tiny_config(*files)
    config.train.steps = 4
    return config


@pytest.fixture
def config(files):
    return make_config(files)


def run(config, workdir, **options):
    text = io.StringIO()
    report = Report(Console(file=text, highlight=False, width=1000))
    result = training.train(config, workdir, report=report, **options)
    return result, text.getvalue()


def rows(workdir):
    return [row for row in read_metrics(workdir) if "loss" in row]


def final_state(config, workdir, step=4):
    """The adapters, the moments and the key as bytes, by path."""
    model, _, _ = build_model(config, dtype=np.dtype(np.float32))
    tx, _ = build_optimizer(config, 100)
    like = init_state(split_model(model)[1], tx, config.seed)
    state, _ = Checkpointer(workdir / "checkpoints").restore(step, like)
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return {name: np.asarray(leaf).tobytes() for name, leaf in flatten_paths(state).items()}


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory, compile_each_program_once):
    """A run whose state is all on the device."""
    config, workdir = make_config(files), tmp_path_factory.mktemp("plain")
    run(config, workdir)
    return SimpleNamespace(rows=rows(workdir), state=final_state(config, workdir))


@pytest.fixture
def budgets(plain):
    """Budgets in GB with which all, most and half of the state is on the device."""
    row = plain.rows[0]
    peak, state = row["step_device_bytes"], row["optimizer_device_bytes"]
    assert row["optimizer_host_bytes"] == 0 and state > 20_000
    return {EVERYTHING: 0.0, MOST: (peak - 0.2 * state) / 1e9, HALF: (peak - 0.5 * state) / 1e9}


@pytest.mark.parametrize("share", [pytest.param(MOST, marks=pytest.mark.slow), HALF])
def test_a_budget_too_small_for_the_moments_trains_to_the_same_bits(
    config, budgets, plain, tmp_path, share
):
    config.optimizer.device_budget_gb = budgets[share]
    _, text = run(config, tmp_path / "paged")
    assert "of optimizer state, read and written once a step" in text
    for row, unpaged in zip(rows(tmp_path / "paged"), plain.rows, strict=True):
        assert row["step_device_bytes"] <= budgets[share] * 1e9
        assert row["loss"] == unpaged["loss"] and row["grad_norm"] == unpaged["grad_norm"]
        moved, stayed = row["optimizer_host_bytes"], row["optimizer_device_bytes"]
        assert moved > 0 and moved + stayed == unpaged["optimizer_device_bytes"]
        assert moved >= {MOST: 0.2, HALF: 0.5}[share] * unpaged["optimizer_device_bytes"]
    assert final_state(config, tmp_path / "paged") == plain.state


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [(EVERYTHING, HALF), (HALF, EVERYTHING), (MOST, HALF), (HALF, MOST), (MOST, MOST)],
    ids=" then ".join,
)
def test_a_run_continues_wherever_its_state_lies(config, budgets, plain, tmp_path, order):
    workdir = tmp_path / "moved"
    for share, steps in zip(order, (2, 4), strict=True):
        config.optimizer.device_budget_gb, config.train.steps = budgets[share], steps
        run(config, workdir)
    host = [row["optimizer_host_bytes"] for row in rows(workdir)]
    assert [bool(host[1]), bool(host[2])] == [share != EVERYTHING for share in order]
    assert final_state(config, workdir) == plain.state


@pytest.mark.slow
def test_a_restored_state_lies_where_it_was_planned(config, budgets, tmp_path, monkeypatch):
    kinds = []

    def watch(self, like, restore=Checkpointer.restore_newest):
        found = restore(self, like)
        moments = jax.tree.leaves(found.tree.opt_state)
        kinds.extend(x.sharding.memory_kind for x in moments if x.ndim)
        return found

    monkeypatch.setattr(Checkpointer, "restore_newest", watch)
    config.train.steps = 2
    run(config, tmp_path / "run")
    config.train.steps, config.optimizer.device_budget_gb = 4, budgets[HALF]
    run(config, tmp_path / "run")
    assert "pinned_host" in kinds
    kinds.clear()
    training.load_trained(tmp_path / "run")  # the moments are not wanted on the device
    assert set(kinds) == {"pinned_host"}


@pytest.mark.slow
def test_state_makes_room_for_longer_rows_and_comes_back(config, tmp_path):
    """Short and long rows in turn: what is a spike to the paper's authors."""
    config.data.packing, config.data.group_by_length, config.data.max_len = False, True, 64
    config.train.steps, config.train.batch_size, config.train.grad_accum = 6, 1, 1
    config.data.path = str(tmp_path / "short_and_long.jsonl")
    with open(config.data.path, "w") as file:
        for length in [2, 20] * 12:
            question = "what is the sum of " + "one and " * length + "two"
            file.write(json.dumps({"prompt": question, "completion": "it is three"}) + "\n")
    run(config, tmp_path / "plain")
    plain = rows(tmp_path / "plain")
    needs = sorted({row["step_device_bytes"] for row in plain})
    assert len(needs) == 2, "rows of two lengths"
    budget = needs[1] - plain[0]["optimizer_device_bytes"] // 5
    assert needs[0] <= budget, "only the long rows need room"
    config.optimizer.device_budget_gb = budget / 1e9
    _, text = run(config, tmp_path / "paged")
    found = rows(tmp_path / "paged")
    for row, without in zip(found, plain, strict=True):
        is_long = without["step_device_bytes"] > needs[0]
        assert (row["optimizer_host_bytes"] > 0) == is_long
        assert row["step_device_bytes"] <= budget
    host = [row["optimizer_host_bytes"] > 0 for row in found]
    assert [True, False] in [host[i : i + 2] for i in range(5)], "it comes back"
    assert final_state(config, tmp_path / "paged", 6) == final_state(config, tmp_path / "plain", 6)


def out_of_memory(times):
    """A step that fails before it begins, so many times."""
    left = [times]

    def wrap(fit):
        def step(*args, compiled=fit.compiled):
            if left[0]:
                left[0] -= 1
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 2.0GiB")
            return compiled(*args)

        return dataclasses.replace(fit, compiled=step)

    return lambda compiled, budget, state, of=fitting.Fit.of: wrap(of(compiled, budget, state))


def test_out_of_memory_once_moves_the_state_and_goes_on(config, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping.Fit, "of", out_of_memory(1))
    _, text = run(config, tmp_path / "short")
    assert "out of device memory; from now on" in text
    host = [row["optimizer_host_bytes"] for row in rows(tmp_path / "short")]
    assert all(host) and len(host) == 4
    assert final_state(config, tmp_path / "short") == plain.state


def test_a_device_that_says_what_it_has_is_believed(config, plain, tmp_path, monkeypatch):
    """Not enough from the start on; after two steps something else takes all that is left."""
    row, others = plain.rows[0], [0]
    peak, state = row["step_device_bytes"], row["optimizer_device_bytes"]

    def memory(device):
        return {"limit": peak - state // 10 + stepping._SLACK, "in_use": others[0]}

    def take(step, row):
        others[0] = 2**40 if step == 2 else others[0]

    monkeypatch.setattr(stepping, "device_memory", memory)
    _, text = run(config, tmp_path / "short", on_step=take)
    host = [row["optimizer_host_bytes"] for row in rows(tmp_path / "short")]
    assert text.count("of device memory left; from now on") == 1
    assert 0 < host[0] == host[1] < host[2] == host[3]
    assert final_state(config, tmp_path / "short") == plain.state


@pytest.mark.slow
def test_out_of_memory_for_good_names_what_would_fit(config, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping.Fit, "of", out_of_memory(2))
    config.train.batch_size = 4
    with pytest.raises(TrainingError, match=r"ran out of memory in a step with rows of 48 tokens"):
        run(config, tmp_path / "run")


def test_another_error_of_the_device_is_not_taken_for_it(config, tmp_path, monkeypatch):
    def broken(compiled, budget, state, of=fitting.Fit.of):
        def step(*args):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

        return dataclasses.replace(of(compiled, budget, state), compiled=step)

    monkeypatch.setattr(stepping.Fit, "of", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_cannot_fit_names_settings_that_would(config, tmp_path):
    config.train.batch_size, config.model.remat = 8, "none"
    config.train.grad_accum = 1
    config.optimizer.device_budget_gb = 1.2e-3
    with pytest.raises(TrainingError) as stop:
        run(config, tmp_path / "run")
    flags = re.search(r"It would fit with (.*)", str(stop.value))[1].split()
    config.update_from_flattened_dict(
        {k: type(config_rules.flatten(config)[k])(v) for k, v in (f[9:].split("=") for f in flags)}
    )
    result, _ = run(config, tmp_path / "run")
    assert result.steps == 4


def test_no_room_in_the_hosts_memory_is_said_before_it_is_taken(
    config, budgets, tmp_path, monkeypatch
):
    monkeypatch.setattr(stepping, "host_limits", lambda **_: {"this container's memory limit": 9})
    config.optimizer.device_budget_gb = budgets[HALF]
    with pytest.raises(TrainingError, match="this container's memory limit leaves 0.0 MiB"):
        run(config, tmp_path / "run")


def test_limits_of_the_hosts_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    limits = host_limits(pinned=True, environment={}, groups=tmp_path)
    assert limits["this container's memory limit"] == 600
    assert 64 << 30 in limits.values() and len(limits) == 3
    (tmp_path / "memory.max").write_text("max\n")
    assert len(host_limits(pinned=False, environment={}, groups=tmp_path)) == 1
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("10")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("20")
    limits = host_limits(pinned=False, environment={}, groups=tmp_path)
    assert limits["this container's memory limit"] == 0


def test_a_gpu_is_taken_whole_but_for_the_context(tmp_path):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 24564; echo 49140")
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    claim_gpu(environment)
    fraction = float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    assert fraction * (24564 << 20) == pytest.approx((24564 << 20) - CONTEXT_BYTES, rel=1e-4)
    nothing = {"PATH": str(tmp_path / "none")}
    claim_gpu(nothing)
    assert list(nothing) == ["PATH"]
