"""QLoRA, LoRA on 16 bits and full fine-tuning side by side."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from llama_models import random_model, tiny_config
from ml_collections import config_dict

from qlora_jax import config as config_lib
from qlora_jax import training
from qlora_jax.errors import ConfigError, EvaluationError
from qlora_jax.metrics import read_metrics
from qlora_jax.models.llama import vocabulary_product

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import evaluate_finetuning

pytestmark = pytest.mark.usefixtures("compile_each_program_once")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> config_dict.ConfigDict:
    folder = tmp_path_factory.mktemp("material")
    config = tiny_run.tiny_config(
        tiny_run.write_model(folder / "model"), tiny_run.write_data(folder / "data.jsonl")
    )
    config.model.compute_dtype = "float32"
    config.lora.dropout = 0.0
    config.train.steps = 4
    config.eval.every = 2
    return config


@pytest.fixture(scope="module")
def report(config, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    out = tmp_path_factory.mktemp("report")
    evaluate_finetuning.compare(config, out, seeds=[3, 0], full_learning_rate=2e-3)
    return out, json.loads((out / "finetuning.json").read_text())


def run_of(report: dict, method: str, seed: int) -> dict:
    (found,) = [r for r in report["runs"] if (r["method"], r["seed"]) == (method, seed)]
    return found


@pytest.mark.slow
def test_every_method_learns_from_the_same_batches(report, config):
    found = report[1]
    assert len(found["runs"]) == 6 and found["settings"]["config"] == config.to_dict()
    for run in found["runs"]:
        assert sorted(run["heldout"]) == ["0", "2", "4"] and len(run["loss"]) == 4
        assert run["heldout"]["4"] < run["heldout"]["0"] - 0.01, run["method"]
    for seed in (0, 3):
        qlora, lora, full = (run_of(found, m, seed) for m in evaluate_finetuning.METHODS)
        # Before training, 16 bits are 16 bits, and 4 bits are something else.
        assert lora["heldout"]["0"] == pytest.approx(full["heldout"]["0"], abs=1e-6)
        assert lora["loss"][0] == pytest.approx(full["loss"][0], abs=1e-6)
        assert abs(qlora["loss"][0] - lora["loss"][0]) > 1e-5
        assert qlora["loss"][0] == pytest.approx(lora["loss"][0], abs=0.3)
        assert qlora["trainable"] == lora["trainable"] < full["trainable"]
        assert full["learning_rate"] == 2e-3 and lora["learning_rate"] == 1e-2
    assert run_of(found, "lora", 0)["loss"] != run_of(found, "lora", 3)["loss"]


@pytest.mark.slow
def test_the_qlora_curve_is_the_trainers(report, config, tmp_path):
    training.train(config, tmp_path / "run", report=tiny_run.quiet_report()[0])
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    mine = run_of(report[1], "qlora", 0)
    np.testing.assert_allclose(mine["loss"], losses, rtol=1e-5)
    heldout = {str(row["step"]): row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert heldout == pytest.approx(mine["heldout"], rel=1e-5)


@pytest.mark.slow
def test_what_is_known_is_kept_and_another_comparison_refused(report, config):
    out, found = report
    before = (out / "finetuning.jsonl").read_text()
    again = evaluate_finetuning.compare(config, out, seeds=[0, 3], full_learning_rate=2e-3)
    assert (out / "finetuning.jsonl").read_text() == before and again.row_count == 3
    page = (out / "finetuning.md").read_text()
    against = [run_of(found, "full", s)["heldout"]["4"] for s in (0, 3)]
    against = [
        a - run_of(found, "lora", s)["heldout"]["4"] for a, s in zip(against, (0, 3), strict=True)
    ]
    assert f"| {against[0]:+.4f}, {against[1]:+.4f} |" in page
    assert (out / "finetuning.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(EvaluationError, match="full_learning_rate"):
        evaluate_finetuning.compare(config, out, seeds=[0], full_learning_rate=1e-3)


def test_the_gradient_of_full_fine_tuning_reaches_every_weight():
    model = random_model(tiny_config())  # its head is its embedding
    rng = np.random.default_rng(0)
    ones = jnp.ones((2, 12), jnp.int32)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 32, (2, 12))),
        "loss_mask": ones,
        "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(12), (2, 12)),
    }
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def ours(params):
        model = nnx.merge(graphdef, params, rest)
        return evaluate_finetuning.full_loss(model, batch, chunk_size=8, packed=True)[0]

    def plain(params):
        logits = nnx.merge(graphdef, params, rest)(batch["tokens"])[:, :-1]
        chosen = jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    (loss, found), (wanted_loss, wanted) = (
        jax.jit(jax.value_and_grad(function))(params) for function in (ours, plain)
    )
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
        assert np.abs(one).max() > 1e-3


def test_a_tied_embedding_has_a_gradient_in_16_bits_on_a_cpu():
    hidden = jnp.ones((1, 8, 16), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda e: vocabulary_product(hidden, e.T).sum()))
    np.testing.assert_array_equal(gradient(jnp.ones((32, 16))), np.full((32, 16), 8.0))


def test_flags_that_cannot_be_used_are_refused():
    base = config_lib.get_config()
    assert evaluate_finetuning.check(base, ["0", "5"], ["lora"]) == ([0, 5], ["lora"])
    pissa = config_lib.get_config()
    pissa.lora.init = "pissa"
    for config, seeds, methods, message in [
        (None, ["0"], ["lora"], "--config"),
        (base, ["0", "0"], ["lora"], "different numbers"),
        (base, ["x"], ["lora"], "different numbers"),
        (base, ["0"], ["dora"], "qlora, lora, full"),
        (pissa, ["0"], ["lora"], "lora.init"),
    ]:
        with pytest.raises(ConfigError, match=message):
            evaluate_finetuning.check(config, seeds, methods)


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_method(config, tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    command = [sys.executable, "scripts/evaluate.py", "--suite=finetuning", "--seeds=1"]
    command += [f"--config={tmp_path / 'config.json'}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, "--methods=qlora,lora"],
        cwd=tiny_run.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "QLoRA" in done.stdout and "full" not in done.stdout
