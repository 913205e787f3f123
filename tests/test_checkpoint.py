"""Tests of qlora_jax.checkpoint."""

import dataclasses
import resource
import shutil
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import CheckpointError


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    codes: jax.Array
    nested: jax.Array | None
    size: int = dataclasses.field(metadata={"static": True})


def _bits(leaf):
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def _assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        assert np.shape(a) == np.shape(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert _bits(a) == _bits(b)


def _tree():
    key = jax.random.key(3)
    return {
        "float32": jax.random.normal(key, (3, 5)) * 1e-40,  # subnormals too
        "bfloat16": jax.random.normal(key, (7,), jnp.bfloat16),
        "float16": jnp.array([1.5, -0.0, jnp.inf, jnp.nan], jnp.float16),
        "uint8": jnp.arange(255, dtype=jnp.uint8),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "scalar": jnp.int32(7),
        "bool": jnp.array([True, False]),
        "key": key,
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        "key_data": jax.random.key_data(key),
        "numpy": np.array([1, 2**62]),
        "numpy_bfloat16": np.asarray(jnp.ones(2, jnp.bfloat16)),
        "python": [3, 0.1, True],
        "pair": Pair(jnp.ones(2), jnp.zeros(3)),
        "record": Record(jnp.ones((2, 2), jnp.uint8), None, 4),
        "nothing": None,
    }


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        yield checkpointer


def test_everything_comes_back_to_the_bit(checkpointer):
    metadata = {"a": [1, {"b": None}], "c": 1e-8, "d": "ü", "e": True, "f": {}}
    checkpointer.save(5, _tree(), metadata)
    tree, restored = checkpointer.restore(5, _tree())
    _assert_identical(tree, _tree())
    assert restored == metadata


def test_a_training_state_comes_back_and_goes_on_identically(checkpointer):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    lora = nnx.state(model, nnx.Param)
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(optax.constant_schedule(0.1))
    )

    @jax.jit
    def step(lora, moments):
        gradients = jax.tree.map(lambda x: jnp.sin(x), lora)
        updates, moments = optimizer.update(gradients, moments, lora)
        return optax.apply_updates(lora, updates), moments

    state = step(lora, optimizer.init(lora))
    checkpointer.save(1, state, {})
    like = jax.tree.map(jnp.zeros_like, state)
    restored, _ = checkpointer.restore(1, like)
    _assert_identical(restored, state)
    _assert_identical(step(*restored), step(*state))


def test_the_arrays_may_be_donated_as_soon_as_save_returns(checkpointer):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    array = jnp.arange(1 << 16, dtype=jnp.float32)
    expected = np.array(array)
    checkpointer.save(1, {"x": array}, {})
    overwrite(array).block_until_ready()
    restored, _ = checkpointer.restore(1, {"x": jax.ShapeDtypeStruct((1 << 16,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], expected)


def test_restoring_follows_the_placement_of_the_target(checkpointer):
    device = jax.devices()[1]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip("this backend has no pinned_host memory")
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    split = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
    value = jnp.arange(8.0)
    like = {
        "pinned": jax.device_put(value, pinned),
        "split": jax.device_put(value, split),
        "plain": value,
        "abstract": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=pinned),
        "anywhere": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    checkpointer.save(1, {name: like["pinned"] for name in like}, {})
    restored, _ = checkpointer.restore(1, like)
    assert restored["pinned"].sharding == pinned
    assert restored["split"].sharding == split
    assert restored["plain"].sharding == value.sharding
    assert restored["plain"].sharding.memory_kind == "device"
    assert restored["abstract"].sharding == pinned
    assert restored["anywhere"].sharding.memory_kind == "device"
    for array in restored.values():
        np.testing.assert_array_equal(array, value)


def test_a_tree_of_other_containers_fits_when_its_paths_do(checkpointer):
    checkpointer.save(1, {"state": Pair(jnp.ones(2), jnp.zeros(3)), "step": 4}, {})
    like = {"state": {"first": np.zeros(2, np.float32), "second": jnp.ones(3)}, "step": 0}
    restored, _ = checkpointer.restore(1, like)
    assert isinstance(restored["state"]["first"], np.ndarray)
    assert restored["step"] == 4 and type(restored["step"]) is int


def test_all_that_does_not_fit_is_named_at_once(checkpointer):
    saved = {
        "same": jnp.ones(2),
        "shape": {"a": jnp.ones((2, 3))},
        "dtype": jnp.ones(2),
        "key": jax.random.key(0),
        "extra": jnp.ones(1),
    }
    like = {
        "same": jnp.ones(2),
        "shape": {"a": jnp.ones((3, 2))},
        "dtype": jnp.ones(2, jnp.bfloat16),
        "key": jax.random.key(0, impl="rbg"),
        "new": jnp.ones(1),
    }
    checkpointer.save(1, saved, {})
    with pytest.raises(CheckpointError) as raised:
        checkpointer.restore(1, like)
    *problems, remedy = str(raised.value).splitlines()[1:]
    assert "begin in a new directory" in remedy
    assert problems == [
        "  dtype: the checkpoint has float32[2], expected is bfloat16[2]",
        "  extra: in the checkpoint, but not expected",
        "  key: the checkpoint has uint32[2], expected is uint32[4]",
        "  new: missing in the checkpoint",
        "  shape/a: the checkpoint has float32[2,3], expected is float32[3,2]",
    ]


def test_the_newest_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.latest_step() is None
    for step in (5, 10, 100, 20):
        checkpointer.save(step, {"x": jnp.full(2, step)}, {"step": step})
    # The last save stays, also where it is not the newest step.
    assert checkpointer.steps() == [20, 100]
    assert checkpointer.latest_step() == 100
    assert checkpointer.restore(20, {"x": jnp.zeros(2, jnp.int32)})[1] == {"step": 20}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "20"]


def test_a_step_can_be_saved_again(checkpointer):
    checkpointer.save(1, {"x": jnp.zeros(2)}, {"try": 1})
    checkpointer.save(1, {"x": jnp.ones(2)}, {"try": 2})
    tree, metadata = checkpointer.restore(1, {"x": jnp.zeros(2)})
    assert (tree["x"].tolist(), metadata) == ([1.0, 1.0], {"try": 2})


@pytest.mark.parametrize(
    "missing", ["_CHECKPOINT_METADATA", "state", "state/_METADATA", "state/manifest.ocdbt"]
)
def test_a_half_written_step_is_ignored(tmp_path, missing):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.ones(2)}, {})
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    broken = tmp_path / "2" / missing
    shutil.rmtree(broken) if broken.is_dir() else broken.unlink()
    (tmp_path / "3").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "4.orbax-checkpoint-tmp")
    assert checkpointer.steps() == [1]
    assert checkpointer.latest_step() == 1
    with pytest.raises(CheckpointError, match=r"holds no step 2; steps there: \[1\]"):
        checkpointer.restore(2, {"x": jnp.ones(2)})
    checkpointer.save(2, {"x": jnp.zeros(2)}, {})
    assert checkpointer.steps() == [1, 2]
    assert not (tmp_path / "4.orbax-checkpoint-tmp").exists()


def test_looking_at_a_directory_changes_nothing(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    assert Checkpointer(tmp_path / "missing").steps() == []
    assert Checkpointer(tmp_path).latest_step() is None
    assert [path.name for path in tmp_path.iterdir()] == ["7.orbax-checkpoint-tmp"]


@pytest.mark.parametrize("damage", ["state/d", "state/ocdbt.process_0", "state/_METADATA"])
def test_a_damaged_step_is_said_to_be_so(tmp_path, damage):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.arange(1000.0)}, {})
    for path in [tmp_path / "1" / damage, *(tmp_path / "1" / damage).rglob("*")]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="1 is damaged: .*remove that directory"):
        checkpointer.restore(1, {"x": jnp.arange(1000.0)})


def test_a_full_disk_is_reported_and_costs_no_other_step(tmp_path, capfd):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.ones(4)}, {})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        noise = jax.random.normal(jax.random.key(0), (1 << 18,))
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved .*steps: \[1\]"):
            checkpointer.save(2, {"x": noise}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert "Traceback" not in capfd.readouterr().err
    checkpointer.save(2, {"x": noise}, {})
    assert checkpointer.steps() == [1, 2]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints").save(1, {"x": jnp.ones(1)}, {})


@pytest.mark.parametrize("metadata", [{"x": jnp.ones(1)}, {"x": {1, 2}}])
def test_metadata_must_be_json(checkpointer, metadata):
    with pytest.raises(CheckpointError, match="must be JSON"):
        checkpointer.save(1, {"x": jnp.ones(1)}, metadata)
    assert checkpointer.steps() == []


def test_paths_must_be_distinct(checkpointer):
    with pytest.raises(CheckpointError, match="the same path"):
        checkpointer.save(1, {"a": {"b": 1}, "a/b": 2}, {})


def test_misuse():
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpointer("anywhere", keep=0)
    checkpointer = Checkpointer("anywhere")
    checkpointer.close()
    with pytest.raises(RuntimeError, match="closed"):
        checkpointer.save(1, {"x": jnp.ones(1)}, {})
