"""Plans of runs that nobody has started, on devices that are not here."""

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
from qlora_jax.targets import find_target

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


def test_mistakes_in_naming_a_model(tmp_path):
    with pytest.raises(UserError, match="did you mean huggyllama/llama-7b?"):
        model_shape("huggyllama/llama7b")
    with pytest.raises(WeightsError, match="config.json cannot be read"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="holds list, needed is an object"):
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
    assert 0 <= plan.parts["moments"] - 8 * trainable < 64
    assert plan.budget_bytes == find_target("rtx4090").memory_bytes - planning.CONTEXT_BYTES
    assert plan.flops > 0 and plan.seconds > 0


class FakeCompiled:
    """Of a device's memory, a step takes a third for each row and adds the adapters' bytes."""

    host_bytes = 0

    def __init__(self, run, target):
        rows = run.batch["tokens"].shape[1]
        adapters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state.lora))
        self.peak_bytes = rows * target.memory_bytes // 3 + adapters

    def memory_analysis(self):
        return types.SimpleNamespace(temp_size_in_bytes=0)


def test_a_run_that_does_not_fit_comes_with_settings_that_do(config, monkeypatch):
    monkeypatch.setattr(planning, "compile_run", FakeCompiled)
    config.train.batch_size = 8
    plan = planning.plan(config, "h100")
    assert plan.verdict == "does not fit" and not plan.fits
    assert plan.changes == {"train.batch_size": 1, "train.grad_accum": 8}
    assert planning.plan(config, "h100", suggest=False).changes == {}
    config.train.batch_size = 2
    assert planning.plan(config, "h100").fits


def test_what_cannot_fit_has_no_settings(config, monkeypatch):
    monkeypatch.setattr(planning, "compile_run", FakeCompiled)
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


@needs_cuda_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device", "gib"),
    [
        ("huggyllama/llama-7b", "h100", 6.4),
        ("huggyllama/llama-13b", "h100", 11.1),
        ("huggyllama/llama-30b", "rtx4090", 24.4),
        # The scheduler for this GPU still overlaps two decoded weights of the MLP.
        ("huggyllama/llama-65b", "h100", 45.6),
        ("huggyllama/llama-65b", "a6000", 45.3),
    ],
)
def test_the_lean_step_does_not_grow(config, name, device, gib):
    """Batch 1 x 512, rank 64 on all linears, float32 adapters and moments on the device."""
    config.model.path = name
    config.data.max_len = 512
    config.lora.rank = 64
    config.lora.dropout = 0.05
    assert planning.plan(config, device, suggest=False).peak_bytes <= gib * GIB


def test_every_known_shape_has_a_name_of_the_hub():
    assert all(name.count("/") == 1 for name in SHAPES)
