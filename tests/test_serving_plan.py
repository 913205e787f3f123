"""Plans of engines that nobody has started, on devices that are not here."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_wheels import needs_cuda_wheels

from qlora_jax import config as config_lib
from qlora_jax.errors import ConfigError
from qlora_jax.serving_plan import AbstractEngine, ServingPlan, find_longest, plan_serving
from qlora_jax.targets import find_target

ROOT = Path(__file__).parents[1]
TINY = {
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CACHE_A_TOKEN = 2 * 3 * 2 * 128


@pytest.fixture
def config(tmp_path):
    """A run of a tiny model of which only `config.json` exists."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config = config_lib.get_config()
    config.model.path = str(tmp_path)
    config.data.path = "not looked at"
    config.lora.rank = 8
    return config


@needs_cuda_wheels
@pytest.mark.slow
def test_a_plan_adds_up(config):
    """On an A100, whose kernels are compiled in this process."""
    plan = plan_serving(config, "a100_40gb", batch=2, context=256, longest=False)
    assert plan.verdict == "fits" and plan.fits and plan.longest_context is None
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert plan.parts["keys and values"] == 2 * 2 * 256 * CACHE_A_TOKEN
    assert 0 < plan.parts["temporaries and state"] < 40e6
    weights = 3 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 4096)
    assert 0.5 * weights < plan.parts["base"] < 0.53 * weights


def test_keys_and_values_in_8_bits_take_half(config):
    target = find_target("a100_40gb")
    plain, int8 = (AbstractEngine.of(config, target, dtype) for dtype in (None, "int8"))
    cache, small = plain.slots(2, 256).cache, int8.slots(2, 256).cache
    assert small.keys.shape == cache.keys.shape and small.keys.dtype == "int8"
    assert cache.key_scales is None and small.key_scales.shape == cache.keys.shape[:-1]


@needs_cuda_wheels
def test_decoding_one_row_is_the_fused_product(config):
    """On an H100: a kernel for each of the seven linear layers, and nowhere a dense weight."""
    engine = AbstractEngine.of(config, find_target("h100"))
    compiled = engine.compile_decode(1, 128, greedy=True)
    calls = re.findall(r'custom_call_target="(mosaic_gpu\w*|triton\w*)"', compiled.text)
    assert len(calls) == 7
    shapes = {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"bf16\[([\d,]+)\]", compiled.text)
    }
    dense = {(512, 512), (256, 512), (4096, 512), (512, 256), (512, 4096)}
    assert not shapes & dense
    # Less than half of a single dense weight in 16 bits.
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 512


def plan_of(context: int, budget: int, fixed: int = 1000, a_token: int = 10) -> ServingPlan:
    parts = {"base": fixed, "keys and values": a_token * context}
    return ServingPlan(
        device="t4",
        batch=1,
        context=context,
        kv_dtype="bfloat16",
        peak_bytes=sum(parts.values()),
        budget_bytes=budget,
        parts=parts,
    )


@pytest.mark.parametrize(
    ("tokens", "known", "longest"),
    [(700, 512, 512), (700, 4000, 512), (700, 100, 512), (10**8, 100, 4096), (512, 4096, 512)]
    + [(100, 4000, 0), (100, 90, 90), (-1, 100, 0)],
)
def test_the_longest_context_is_the_last_that_fits(tokens, known, longest):
    looked = []

    def plan(context):
        looked.append(context)
        return plan_of(context, 1000 + 10 * tokens)

    assert find_longest(plan, plan(known), 4096) == longest
    assert len(looked) <= 3


def test_temporaries_that_grow_with_the_context_are_taken_off_again():
    def plan(context):
        grown = plan_of(context, 1000 + 10 * 4000)
        return dataclasses.replace(grown, peak_bytes=grown.peak_bytes + 2 * context)

    longest = find_longest(plan, plan(256), 8192)
    assert plan(longest).fits and longest >= 3328 - 256 and longest % 256 == 0


def test_what_cannot_be_planned_is_refused(config):
    with pytest.raises(ConfigError, match="context=2000 2 to 1024"):
        plan_serving(config, "h100", context=2000)
    with pytest.raises(ConfigError, match="batch=0"):
        plan_serving(config, "h100", batch=0, context=64)
    with pytest.raises(ConfigError, match="kv_dtype"):
        plan_serving(config, "h100", context=64, kv_dtype="fp8")


@needs_cuda_wheels
@pytest.mark.slow
def test_the_command_prints_one_object_a_device(config, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config_lib.to_json(config))
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), f"--config={recipe}"]
    command += ["--device=a100_40gb", "--mode=generate", "--json", "--batch_size=2"]
    command += ["--max_len=256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (plan,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert plan["device"] == "a100_40gb" and plan["longest_context"] == 1024
    assert {"peak_bytes", "budget_bytes", "verdict", "parts", "kv_dtype"} <= set(plan)
