"""What scoring MMLU needs on a GPU: compiled programs, batches that fit, and who is refused."""

import dataclasses

import pytest
import t5_models
import tiny_run
from cuda_wheels import needs_cuda_wheels

from qlora_jax import config as config_lib
from qlora_jax import evaluation_plan
from qlora_jax.errors import ConfigError
from qlora_jax.evaluation_plan import AbstractScorer, plan_evaluation
from qlora_jax.targets import find_target


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tiny_run.write_model(tmp_path_factory.mktemp("plan") / "model")
    config = config_lib.get_config()
    config.model.path, config.data.path = str(folder), "unused"
    config.model.block_size, config.lora.rank = 32, 4
    return config


@needs_cuda_wheels
def test_the_peak_is_that_of_the_compiled_programs_and_of_known_parts(config):
    scored = AbstractScorer.of(config, find_target("a100_40gb"))
    plan = scored.plan(1024)
    assert plan.fits and plan.longest_prompt == 128
    assert sum(plan.parts.values()) == plan.peak_bytes
    # Two layers, 128 slots, two heads of 8 in bfloat16, keys and values.
    assert plan.parts["keys and values of solved questions"] == 2 * 128 * 2 * 8 * 2 * 2
    assert min(plan.parts.values()) > 0
    assert plan.parts["temporaries and batch"] > 1024 * 32 * 2  # at least the hidden states
    assert plan.seconds[1] == 3 * plan.seconds[0] > 0


@pytest.mark.parametrize(("room", "most"), [(400, 0), (512, 512), (5000, 4096), (10**6, 65536)])
def test_the_largest_batch_that_fits_is_found(config, monkeypatch, room, most):
    plan = evaluation_plan.EvaluationPlan(
        device="x",
        batch_tokens=0,
        longest_prompt=128,
        peak_bytes=0,
        budget_bytes=room,
        parts={},
        seconds=(1.0, 3.0),
    )

    def of(self, batch_tokens):
        return dataclasses.replace(plan, batch_tokens=batch_tokens, peak_bytes=batch_tokens)

    monkeypatch.setattr(AbstractScorer, "plan", of)
    found = plan_evaluation(config, "t4", batch_tokens=1024)
    assert (found.most_batch_tokens, found.fits) == (most, room >= 1024)


def test_what_cannot_be_planned_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="must be at least 256"):
        plan_evaluation(config, "t4", batch_tokens=100)
    other = config.copy_and_resolve_references()
    other.model.path = str(t5_models.write_folder(tmp_path / "t5"))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        plan_evaluation(other, "t4")
