"""Damage to a checkpoint: every file of it, bit by bit; arrays that do not fit."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import attempt, fault

from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import CheckpointError
from qlora_jax.optim import make_optimizer
from qlora_jax.training.step import init_state

CASES = 150


@pytest.fixture(scope="module")
def state():
    """A training state: adapters in two layers, moments, counters, a key."""
    shapes = {"lora_a": (2, 8, 4), "lora_b": (2, 4, 8)}
    keys = iter(jax.random.split(jax.random.key(0), 9))
    lora = {n: jax.random.normal(next(keys), s) for n, s in shapes.items()}
    return init_state({"q_proj": lora}, make_optimizer(), seed=0)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """Steps 10 and 20."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(folder) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, state, {"step": step})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def assert_step_10_is_whole(folder, state):
    tree, metadata = Checkpointer(folder).restore(10, like=state)
    assert metadata == {"step": 10}
    np.testing.assert_array_equal(tree.lora["q_proj"]["lora_a"], state.lora["q_proj"]["lora_a"])


@fault(
    f"A bit flips in a checkpoint, or a file of it is cut off or gone: {CASES} random cases, every "
    "file among them",
    exit=2,
    says=("error: ", "/20", "damaged"),
    holds="All are found before an array is used; the older step is whole, and is gone on from",
)
def test_flips_and_cuts(seen, copy, state):
    files = sorted(path for path in (copy / "20").rglob("*") if path.is_file())
    assert len(files) > 6
    rng, unseen = random.Random(0), []
    for case in range(CASES):
        file = files[case % len(files)]
        content = file.read_bytes()
        kind = rng.choice(["flip", "flip", "cut", "gone"] if content else ["gone", "grown"])
        if kind == "flip":
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
        elif kind == "cut":
            file.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "gone":
            file.unlink()
        else:
            file.write_bytes(b"\0")
        found = Checkpointer(copy).find_damaged()
        if set(found) != {20}:
            unseen.append((kind, str(file), found))
        if case % 15 == 0:  # and so says who asks for that very step
            outcome = attempt(lambda: Checkpointer(copy).restore(20, like=state))
            if outcome.code != 2:
                unseen.append((kind, str(file), outcome))
        file.write_bytes(content)
    assert not unseen, unseen[:3]
    assert not Checkpointer(copy).find_damaged()
    files[-1].write_bytes(files[-1].read_bytes()[:-1])
    seen(attempt(lambda: Checkpointer(copy).restore(20, like=state)))
    restored = Checkpointer(copy).restore_newest(state)
    assert restored.step == 10 and set(restored.damaged) == {20} and restored.verified
    assert_step_10_is_whole(copy, state)


@fault(
    "Every step of a run is damaged",
    exit=2,
    says=("error: no step in", "can be used", "Put a copy of one back, or start again in a new"),
    holds="Nothing is removed, and no run begins again over it in silence",
)
def test_all_damaged(seen, copy, state):
    for step in (10, 20):
        (copy / str(step) / "manifest.json").write_text("{}")
    before = sorted(copy.rglob("*"))
    seen(attempt(lambda: Checkpointer(copy).restore_newest(state)))
    assert sorted(copy.rglob("*")) == before


def leaf(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


CHANGES = {
    "missing": (lambda lora: lora | {"lora_m": leaf((2, 8), jnp.float32)}, "lora_m: missing"),
    "extra": (lambda lora: {"lora_a": lora["lora_a"]}, "lora_b: in the checkpoint, but not exp"),
    "mis-shaped": (lambda lora: lora | {"lora_b": leaf((2, 8, 8), jnp.float32)}, "lora_b: the ch"),
    "mis-typed": (lambda lora: lora | {"lora_b": leaf((2, 4, 8), jnp.int8)}, "lora_b: the checkp"),
}


@pytest.mark.parametrize("change", CHANGES)
@fault(
    "An array of a checkpoint is missing, left over, of another shape or of another dtype",
    exit=2,
    says=("error: ", "does not fit what it is restored into:", "lora/q_proj/lora_"),
    holds="Each is named with both shapes and dtypes; nothing is cast, nothing is written",
)
def test_arrays_that_do_not_fit(seen, copy, state, change):
    make, said = CHANGES[change]
    like = state.__class__(
        state.step, {"q_proj": make(state.lora["q_proj"])}, state.opt_state, state.key
    )
    outcome = attempt(lambda: Checkpointer(copy).restore(20, like=like))
    seen(outcome)
    assert said in outcome.text
    with pytest.raises(CheckpointError):
        Checkpointer(copy).restore_newest(like)
    assert_step_10_is_whole(copy, state)
