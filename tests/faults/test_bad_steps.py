"""Numbers that go wrong in the middle of training, and memory that runs out."""

import dataclasses
import importlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from catalogue import attempt, fault

from qlora_jax import config_rules, training
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.metrics import read_metrics
from qlora_jax.optim import make_optimizer, paged
from qlora_jax.optim.skipping import skippable
from qlora_jax.training import fitting, stepping
from qlora_jax.training import run as run_lib
from qlora_jax.training.bad_steps import BadSteps, read_bad_steps
from qlora_jax.training.step import TrainState
from qlora_jax.training.stepping import Steps

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
FIRST_WORD = 7  # token of the first of `tiny_run.WORDS`
# What a record with this word in it does to the loss of its microbatch.
POISONS = {
    "five": lambda loss: loss * jnp.nan,
    "six": lambda loss: loss * jnp.inf,
    "seven": lambda loss: loss + jnp.sqrt(0 * loss),  # only the gradient: 0 times infinity
    "eight": lambda loss: loss * 1e30,  # a finite loss; the square of its gradient is not
}


def poisoned(loss_fn, poisons):
    def loss_of(model, batch):
        loss, count = loss_fn(model, batch)
        for word, poison in poisons.items():
            there = jnp.any(batch["tokens"] == FIRST_WORD + tiny_run.WORDS.index(word))
            # zero where it is not there, also in the gradient
            loss = jax.lax.cond(there, poison, lambda x: x, loss)
        return loss, count

    return loss_of


@pytest.fixture
def poison(monkeypatch):
    """Makes runs compute `POISONS`, or others."""

    def apply(poisons):
        def family_of(*args, family_of=run_lib.family_of):
            family = family_of(*args)
            return dataclasses.replace(family, loss=poisoned(family.loss, poisons))

        monkeypatch.setattr(run_lib, "family_of", family_of)

    return apply


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path):
    """24 records; those with the numbers 3, 9, 15 and 21 hold one of the words each."""
    path = tiny_run.write_data(tmp_path / "sums.jsonl")
    lines = path.read_text().splitlines()
    for number, word in zip((3, 9, 15, 21), POISONS, strict=True):
        lines[number - 1] = json.dumps({"prompt": "what is it", "completion": f"it is {word}"})
    path.write_text("\n".join(lines) + "\n")
    config = tiny_run.tiny_config(model, path)
    config.data.eval_fraction, config.data.packing = 0.0, False  # two records a step
    config.train.steps, config.train.batch_size = 12, 1
    return config


def run(config, workdir):
    def main():
        report, text = tiny_run.quiet_report()
        try:
            training.train(config, workdir, report=report)
        finally:
            print(text.getvalue())

    return attempt(main)


def bits(state):
    """Adapter and optimizer state, and the key, as bytes."""
    kept = (state.lora, state.opt_state, jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


@pytest.fixture
def states(monkeypatch):
    """By step: what went in, what came out, and whether it was skipped."""
    found = {}

    def watch(self, state, frozen, batch, call=Steps.__call__):
        step, before = int(state.step) + 1, bits(state)
        state, metrics = call(self, state, frozen, batch)
        assert int(state.step) == step
        found[step] = before, bits(state), bool(metrics["skipped"])
        return state, metrics

    monkeypatch.setattr(Steps, "__call__", watch)
    return found


def rows_without_time(workdir):
    timed = ("tokens_per_second", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(workdir)]


@pytest.mark.slow
@fault(
    "The loss or the gradient of a step is NaN or infinite (four kinds), and the run is stopped "
    "and continued among such steps",
    exit=0,
    says=("is not a finite number", "with these records: ", "The step is skipped", "were skipped"),
    holds="Adapter and optimizer keep their bits in a skipped step; it is counted in "
    "`metrics.jsonl`, its records are in `bad_steps.jsonl`; the continued run ends in the bits of "
    "the uninterrupted one",
)
def test_not_finite_once(seen, config, poison, states, tmp_path):
    poison(POISONS)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = run(config, whole)
    seen(outcome)
    skipped = [step for step, (_, _, was) in states.items() if was]
    assert len(skipped) == 4
    for step, (before, after, was) in states.items():
        assert (before == after) == was, step
    rows = [row for row in read_metrics(whole) if "loss" in row]
    counts = [row["skipped_steps"] for row in rows]
    assert counts == [sum(s <= step for s in skipped) for step in range(1, 13)]
    bad = read_bad_steps(whole)
    assert [row["step"] for row in bad] == skipped and all(row["skipped"] for row in bad)
    # of a loss only the bad microbatch is named, of a gradient all of the step
    named = {frozenset(row["records"]) for row in bad if row["what"] == "loss is not finite"}
    assert named == {frozenset([f"sums.jsonl:{number}"]) for number in (3, 9)}
    others = [row["records"] for row in bad if row["what"] == "gradient is not finite"]
    assert len(others) == 2 and all(len(names) == 2 for names in others)
    assert {"sums.jsonl:15", "sums.jsonl:21"} <= set(sum(others, []))
    final = states[12][1]

    config.train.steps = skipped[1]
    run(config, parts)
    config.train.steps = 12
    assert "continuing after step" in run(config, parts).text
    assert states[12][1] == final
    assert read_bad_steps(parts) == bad
    assert rows_without_time(parts) == rows_without_time(whole)


@fault(
    "The learning rate is so high that the adapter overflows: no step after that is finite",
    exit=2,
    says=(
        "error: step 4: the loss is not a finite number",
        "Nothing of this step is kept; so it was in the 2 steps before",
        "try a lower optimizer.learning_rate, or model.compute_dtype=float32",
        "--config.train.max_skipped_steps=10",
    ),
    holds="The checkpoint of before is the newest; the records of every such step are in "
    "`bad_steps.jsonl`; no `result.json`",
)
def test_not_finite_again_and_again(seen, config, tmp_path):
    config.optimizer.learning_rate = 1e30
    config.train.max_skipped_steps, config.checkpoint.every = 2, 1
    seen(run(config, tmp_path / "run"))
    assert Checkpointer(tmp_path / "run" / "checkpoints").steps() == [1]
    assert [row["step"] for row in read_bad_steps(tmp_path / "run")] == [2, 3, 4]
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@fault(
    "A record whose loss is twenty times the usual (a spike)",
    exit=0,
    says=(": a spike. The step is taken. Its records: ", "sums.jsonl:"),
    holds="Nothing is left out behind the user's back; loss, median and records are in "
    "`bad_steps.jsonl`",
)
def test_loss_spike(seen, config, poison, tmp_path):
    poison({"eight": lambda loss: 20 * loss})
    config.train.steps, config.optimizer.learning_rate = 36, 1e-3
    outcome = run(config, tmp_path / "run")
    seen(outcome)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    bad = read_bad_steps(tmp_path / "run")
    assert rows[-1]["skipped_steps"] == 0 and bad
    for row in bad:
        assert row["what"] == "loss spike" and not row["skipped"]
        assert "sums.jsonl:21" in row["records"]
        assert row["loss"] == rows[row["step"] - 1]["loss"] > 2 * row["median_loss"]
    assert outcome.text.count("a spike") == len(bad)


@pytest.mark.slow
@fault(
    "The device runs out of memory in the first step, although the plan said that it fits",
    exit=2,
    says=(
        "error: the device ran out of memory in a step with rows of 48 tokens, planned at",
        "Continue with --config.",
    ),
    holds="The settings that are named were compiled and need less; the run begins with them in "
    "the same directory",
)
def test_out_of_memory_in_the_first_step(seen, config, monkeypatch, tmp_path):
    """The device's error is the only thing that is made up: a CPU has all of the host's memory."""
    room = []

    def limited(compiled, budget, state, of=fitting.Fit.of):
        fit = of(compiled, budget, state)

        def step(*arguments):
            room.append(int(0.9 * fit.peak_bytes)) if not room else None
            if fit.peak_bytes > room[0]:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 2.0GiB")
            return fit.compiled(*arguments)

        return dataclasses.replace(fit, compiled=step)

    monkeypatch.setattr(stepping.Fit, "of", limited)
    config.train.batch_size, config.train.steps, config.model.remat = 8, 2, "none"
    outcome = run(config, tmp_path / "run")
    seen(outcome)
    flags = re.search(r"Continue with (.*?)\. ", outcome.text)[1].split()
    fields = config_rules.flatten(config)
    named = dict(flag.removeprefix("--config.").split("=") for flag in flags)
    config.update_from_flattened_dict({k: type(fields[k])(v) for k, v in named.items()})
    assert run(config, tmp_path / "run").code == 0


@pytest.mark.parametrize(
    ("name", "state_budget"),
    [
        ("adamw", 0),
        ("adamw8bit", None),
        ("chain", 0),
        pytest.param("adamw", None, marks=pytest.mark.slow),
        pytest.param("adamw8bit", 0, marks=pytest.mark.slow),
        pytest.param("lion", None, marks=pytest.mark.slow),
        pytest.param("lion", 0, marks=pytest.mark.slow),
    ],
)
def test_each_optimizer_leaves_a_step_out_to_the_bit(monkeypatch, name, state_budget):
    """Also where the state lies in the host's memory, and in the middle of good steps."""
    monkeypatch.setattr(importlib.import_module("qlora_jax.optim.paged"), "LEAST_ELEMENTS", 1)
    if name == "chain":  # of others' making, around a paged optimizer
        tx = skippable(optax.chain(optax.clip(1.0), paged(optax.adamw(1e-3), state_budget)))
    else:
        tx = make_optimizer(name=name, state_budget=state_budget, weight_decay=0.1)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    params = {n: jax.random.normal(next(keys), (3, 70, 64)) for n in ("lora_a", "lora_b")}
    params["bias"] = jnp.ones(5)

    @jax.jit
    def update(gradients, state, params, apply_if):
        return tx.update(gradients, state, params, apply_if=apply_if)

    state = tx.init(params)
    gradients = jax.tree.map(jnp.sin, params)
    for _ in range(2):
        _, state = update(gradients, state, params, jnp.bool_(True))
        places = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)]
        before = jax.device_get(state)
        broken = gradients | {"lora_b": gradients["lora_b"].at[1, 2, 3].set(jnp.nan)}
        _, state = update(broken, state, params, jnp.bool_(False))
        same = jax.tree.map(np.array_equal, jax.device_get(state), before)
        assert all(jax.tree.leaves(same))
        assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)] == places
    assert ("pinned_host" in places) == (state_budget == 0)
    # and a step that is not left out is the step without the argument
    plain = jax.jit(tx.update)(gradients, state, params)
    found = update(gradients, state, params, jnp.bool_(True))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *jax.device_get((found, plain)))))


class Losses:
    """Feeds losses to `BadSteps`."""

    def __init__(self, workdir, **options):
        report, self.text = tiny_run.quiet_report()
        self.watch = BadSteps(workdir, most_skipped=5, report=report, **options)
        self.batch = type("Batch", (), {"record_ids": [["a:1", "a:2"], ["a:3"]]})

    def __call__(self, step, loss):
        skipped = not math.isfinite(loss)
        nats = np.array([loss, 1.0], np.float32)
        metrics = {"loss": loss, "grad_norm": 0.5, "skipped": skipped, "microbatch_nats": nats}
        self.watch.look(step, metrics, self.batch)


def test_no_false_alarm_and_no_missed_spike(tmp_path):
    """Noise of a small batch around a falling loss; then one spike, and a loss that stays high."""
    losses, rng = Losses(tmp_path), np.random.default_rng(0)
    for step in range(1, 2001):
        losses(step, 0.5 + 2 * math.exp(-step / 300) + 0.15 * rng.standard_normal())
    assert not losses.text.getvalue()
    losses(2001, 3.0)
    losses(2002, 0.5)
    spikes = [row["step"] for row in read_bad_steps(tmp_path)]
    assert spikes == [2001] and losses.text.getvalue().count("a spike") == 1
    for step in range(2003, 2100):
        losses(step, 4.0 + 0.1 * rng.standard_normal())
    assert losses.text.getvalue().count("a spike") == 2, "a change for good is said once"
    assert 10 < len(read_bad_steps(tmp_path)) < 40, "and after half a window it is usual"


def test_what_was_before_is_known_from_the_metrics(tmp_path):
    """Counts, the steps in a row, and the usual loss; records of steps that come again are cut."""
    losses, rows = Losses(tmp_path), [{"step": 0, "heldout_loss": 3.0}]
    for step in range(1, 31):
        losses(step, math.nan if step in (7, 29, 30) else 2.0)
        loss = None if step in (7, 29, 30) else 2.0
        rows.append({"step": step, "loss": loss, "skipped_steps": losses.watch.skipped})
    losses(31, math.nan)
    with (tmp_path / "bad_steps.jsonl").open("a") as file:
        file.write('{"step": 32, "wh')  # a kill tore it
    again = Losses(tmp_path, resume_step=30, rows=rows)
    assert [row["step"] for row in read_bad_steps(tmp_path)] == [7, 29, 30]
    assert (again.watch.skipped, again.watch.in_a_row) == (3, 2)
    again(31, 9.0)
    assert read_bad_steps(tmp_path)[-1]["what"] == "loss spike"
    assert Losses(tmp_path).watch.skipped == 0 and read_bad_steps(tmp_path) == []


@pytest.mark.slow
def test_nothing_is_saved_while_steps_are_bad(config, poison, monkeypatch, tmp_path):
    """Older, good checkpoints must not make room for those of a state that may be broken."""
    poison({"four": lambda loss: loss * jnp.nan})  # in most records
    config.checkpoint.every, config.train.max_skipped_steps = 1, 12
    saved = []
    monkeypatch.setattr(Checkpointer, "save", lambda self, step, *_: saved.append(step))
    run(config, tmp_path / "run")
    bad = {row["step"] for row in read_bad_steps(tmp_path / "run")}
    assert len(bad) > 2 and bad.isdisjoint(set(saved) - {12})


def test_a_step_counts_batches_also_when_it_is_skipped():
    assert "skipped ones among them" in TrainState.__doc__
