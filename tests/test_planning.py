"""Plans of runs that nobody has started, on devices that are not here."""

import importlib
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from cuda_wheels import needs_cuda_wheels

from qlora_jax import config as config_lib
from qlora_jax import planning
from qlora_jax.errors import UserError, WeightsError
from qlora_jax.models.shapes import SHAPES, model_shape
from qlora_jax.placement import bytes_by_memory
from qlora_jax.targets import find_target
from qlora_jax.training import fitting

ROOT = Path(__file__).parents[1]
GIB = 2**30
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def config(tmp_path):
    """A run of a tiny model of which only `config.json` exists."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config = config_lib.get_config()
    config.model.path = str(tmp_path)
    config.data.path = "not looked at"
    config.data.max_len = 64
    config.lora.rank = 8
    config.train.grad_accum = 1
    return config


# ---------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("huggyllama/llama-7b", 6.738),
        ("huggyllama/llama-13b", 13.016),
        ("huggyllama/llama-30b", 32.529),
        ("huggyllama/llama-65b", 65.286),
        ("meta-llama/Llama-2-70b-hf", 68.977),
        ("meta-llama/Llama-3.1-8B", 8.030),
        ("meta-llama/Llama-3.1-70B", 70.554),
        ("mistralai/Mistral-7B-v0.1", 7.242),
        ("Qwen/Qwen2.5-7B", 7.616),
        ("Qwen/Qwen2.5-14B", 14.770),
        ("Qwen/Qwen2.5-32B", 32.764),
        ("Qwen/Qwen2.5-72B", 72.706),
    ],
)
def test_a_known_shape_has_the_parameters_its_makers_count(name, billions, config):
    config.model.path = name.upper()
    run = planning.abstract_run(config, find_target("h100"))
    size = planning.measure({}, run.frozen)
    assert round(size.frozen / 1e9, 3) == billions


def test_a_shape_is_read_from_a_config_without_weights(tmp_path, config):
    assert model_shape(config.model.path) == model_shape(str(tmp_path / "config.json"))
    assert model_shape(config.model.path).num_hidden_layers == 3


def test_another_file_is_left_to_those_who_can_open_it(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_shape(str(tmp_path / "model.gguf")) is None


def test_mistakes_in_naming_a_model(tmp_path, monkeypatch):
    # Without a network the hub's library would try for half a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(UserError, match="did you mean huggyllama/llama-7b?"):
        model_shape("huggyllama/llama7b")
    with pytest.raises(WeightsError, match="config.json cannot be read"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not valid JSON"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="holds list, not a JSON object"):
        model_shape(str(tmp_path))


# ----------------------------------------------------------------------------------------- plans


@needs_cuda_wheels
def test_a_plan_adds_up(config):
    plan = planning.plan(config, "rtx4090")
    assert plan.verdict == "fits" and plan.fits and not plan.changes
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert min(plan.parts.values()) >= 0
    run = planning.abstract_run(config, find_target("rtx4090"))
    trainable = sum(x.size for x in jax.tree.leaves(run.state.lora))
    assert plan.parts["adapters"] == 4 * trainable
    # Two moments and a counter of each of the two transformations' states at most.
    assert 0 <= plan.parts["optimizer state"] - 8 * trainable < 64
    assert plan.budget_bytes == find_target("rtx4090").memory_bytes - planning.CONTEXT_BYTES
    assert plan.flops > 0 and plan.seconds > 0


def fake_compile(config, state_budget=None, *, target):
    """A row takes a third of a device's memory; beside it the optimizer's state, if it is there."""
    run = planning.abstract_run(config, target, state_budget)
    state = bytes_by_memory(run.state.opt_state)
    peak = target.memory_bytes // 3 * run.batch["tokens"].shape[1]
    peak += state["device"]
    memory = {
        f"{where}{part}_size_in_bytes": 0
        for where in ("", "host_")
        for part in ("argument", "temp", "output", "alias")
    }
    memory |= {"argument_size_in_bytes": peak, "host_argument_size_in_bytes": state["pinned_host"]}
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**memory))
    return fitting.Fit.of(compiled, state_budget, run.state)


def test_a_run_that_does_not_fit_comes_with_settings_that_do(config, monkeypatch):
    monkeypatch.setattr(planning, "compile_run", fake_compile)
    config.train.batch_size = 8
    given = config.to_json()
    plan = planning.plan(config, "h100")
    assert config.to_json() == given  # the next device is planned with what was asked for
    assert plan.verdict == "does not fit" and not plan.fits
    assert plan.changes == {"train.batch_size": 1, "train.grad_accum": 8}
    assert planning.plan(config, "h100", suggest=False).changes == {}
    config.train.batch_size = 2
    assert planning.plan(config, "h100").verdict == "fits"


def test_state_goes_to_the_host_as_far_as_it_must(config, monkeypatch):
    monkeypatch.setattr(planning, "compile_run", fake_compile)
    monkeypatch.setattr(fitting, "_LEAST_ROOM", 1)
    monkeypatch.setattr(importlib.import_module("qlora_jax.optim.paged"), "LEAST_ELEMENTS", 1)
    everything = planning.plan(config, "h100")
    total, rest = everything.parts["optimizer state"], everything.peak_bytes
    rest -= total
    shares = [(1.0, "fits"), (0.6, "fits with paging"), (0.1, "fits with paging")]
    before = total + 1
    for share, verdict in shares:
        config.optimizer.device_budget_gb = (rest + share * total + 10) / 1e9
        plan = planning.plan(config, "h100", suggest=False)
        assert plan.verdict == verdict and plan.fits
        on_device, on_host = plan.parts["optimizer state"], plan.host_parts["optimizer state"]
        assert on_device + on_host == total and on_host == plan.host_bytes
        assert on_device <= share * total + 10 and on_device < before
        assert on_device > share * total / 2
        assert plan.paging_seconds == on_host / 63e9
        before = on_device
    config.optimizer.device_budget_gb = (rest - 1000) / 1e9
    plan = planning.plan(config, "h100", suggest=False)
    assert plan.verdict == "does not fit" and not plan.fits


def test_what_costs_only_time_is_tried_first(config):
    config.model.remat, config.train.batch_size, config.train.grad_accum = "none", 4, 2
    config.data.max_len, config.lora.dtype = 8192, "float32"
    tried = list(fitting.smaller_settings(config))
    news = [dict(b.items() - a.items()) for a, b in itertools.pairwise([{}, *tried])]
    assert news[:7] == [
        {"model.remat": "full"},
        {"train.batch_size": 1, "train.grad_accum": 8},
        {"model.remat": "offload"},
        {"model.sequence_chunk": 4096},
        {"lora.dtype": "bfloat16"},
        {"model.vocab_quant_type": "int8"},
        {"train.grad_accum": 1},
    ]
    assert [new["data.max_len"] for new in news[7:]] == [4096, 2048, 1024, 512, 256]
    # An encoder-decoder has no chunks, and its rows hold two parts.
    config.data.source_max_len, config.data.target_max_len = 1024, 1024
    fields = {*tried[-1]} - {"model.sequence_chunk", "data.max_len"}
    assert {*list(fitting.smaller_settings(config))[-1]} == fields


def test_settings_that_need_more_of_the_host_than_it_has_are_passed_over(config):
    def compile_run(config, state_budget):
        offloads, halved = config.model.remat == "offload", config.lora.dtype == "bfloat16"
        peak = 1 if offloads or halved else 2
        return types.SimpleNamespace(peak_bytes=peak, host_bytes=50 + 50 * offloads)

    config.lora.dtype = "float32"
    assert fitting.find_settings(config, compile_run, 1, 100) == {"model.remat": "offload"}
    without = {"model.remat": "full", "lora.dtype": "bfloat16"}
    assert fitting.find_settings(config, compile_run, 1, 99) == without
    assert fitting.find_settings(config, compile_run, 1, 49) == {}


def test_what_cannot_fit_has_no_settings(config, monkeypatch):
    monkeypatch.setattr(planning, "compile_run", fake_compile)
    monkeypatch.setattr(planning, "CONTEXT_BYTES", find_target("t4").memory_bytes)
    plan = planning.plan(config, "t4")
    assert not plan.fits and plan.changes == {}


def run_script(*arguments, **kwargs):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


@needs_cuda_wheels
def test_the_command_prints_one_object_a_device(config, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config_lib.to_json(config))
    done = run_script(f"--config={recipe}", "--device=t4", "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert plan["device"] == "t4"
    assert {"peak_bytes", "host_bytes", "budget_bytes", "verdict", "parts"} <= set(plan)


def test_a_device_that_is_none_is_a_users_mistake(config, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config_lib.to_json(config))
    done = run_script(f"--config={recipe}", "--device=h10")
    assert done.returncode == 2
    assert "did you mean 'h100'?" in done.stderr and "Traceback" not in done.stderr


def lean(config, name, adapters="float32"):
    """Batch 1 x 512, rank 64 on all linears, without dropout."""
    config.model.path = name
    config.data.max_len, config.data.packing = 512, False
    config.lora.rank = 64
    config.lora.dropout = 0.0
    config.lora.dtype = adapters
    return config


@needs_cuda_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device", "gib"),
    [
        ("huggyllama/llama-7b", "h100", 6.4),
        ("huggyllama/llama-13b", "a6000", 11.0),
        ("huggyllama/llama-30b", "rtx4090", 24.4),
        ("huggyllama/llama-65b", "h100", 45.5),
        ("huggyllama/llama-65b", "a6000", 45.3),
    ],
)
def test_the_lean_step_does_not_grow(config, name, device, gib):
    """Float32 adapters and moments on the device."""
    fit = planning.compile_run(lean(config, name), target=find_target(device))
    assert fit.peak_bytes <= gib * GIB and fit.host_bytes == 0


@needs_cuda_wheels
@pytest.mark.slow
def test_four_rows_of_2048_tokens_on_a_card_of_24_gb(config):
    config = lean(config, "huggyllama/llama-7b")
    config.train.batch_size, config.data.max_len = 4, 2048
    plan = planning.plan(config, "rtx4090", suggest=False)
    assert plan.verdict == "fits" and plan.peak_bytes <= 9.6 * GIB


@needs_cuda_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device", "adapters", "gib"),
    [
        ("huggyllama/llama-7b", "h100", "float32", 5.2),
        ("huggyllama/llama-7b", "h100", "bfloat16", 4.7),
        ("huggyllama/llama-13b", "h100", "float32", 9.2),
        ("huggyllama/llama-13b", "h100", "bfloat16", 8.4),
        ("huggyllama/llama-30b", "rtx4090", "float32", 20.8),
        ("huggyllama/llama-30b", "rtx4090", "bfloat16", 19.0),
        ("huggyllama/llama-65b", "a6000", "float32", 39.5),
        ("huggyllama/llama-65b", "a100_40gb", "bfloat16", 37.5),
    ],
)
def test_the_lean_step_with_its_moments_in_the_hosts_memory(config, name, device, adapters, gib):
    target = find_target(device)
    fit = planning.compile_run(lean(config, name, adapters), 0, target=target)
    assert fit.peak_bytes <= gib * GIB
    moments = 8 * sum(x.size for x in jax.tree.leaves(fit.state.lora))
    assert 0.99 * moments < fit.host_bytes <= moments


def test_every_known_shape_has_a_name_of_the_hub():
    assert all(name.count("/") == 1 for name in SHAPES)
