"""What is not what was saved is found, said, and passed over."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import phases
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.errors import CheckpointError, DamagedCheckpointError
from qlora_jax.manifest import LeafRecord, Manifest


def _tree(value=1.0):
    key = jax.random.key(int(value))
    return {"w": jax.random.normal(key, (64, 33)), "step": jnp.int32(value), "key": key}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the steps 1, 2 and 3; not to be written to."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpointer = Checkpointer(directory, keep=3)
    for step in (1, 2, 3):
        checkpointer.save(step, _tree(step), {"step": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def _flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_manifest_says_what_was_saved(saved):
    manifest = Manifest.read(saved / "2")
    tree = _tree(2)
    assert manifest.step == 2 and manifest.metadata == {"step": 2}
    assert manifest.leaves == {
        "w": LeafRecord.of(tree["w"]),
        "step": LeafRecord.of(tree["step"]),
        "key": LeafRecord.of(jax.random.key_data(tree["key"])),
    }
    record = manifest.leaves["w"]
    assert (record.shape, record.dtype, record.memory) == ((64, 33), "float32", "device")
    assert manifest.leaves["step"].shape == ()
    on_disk = {p.relative_to(saved / "2").as_posix() for p in (saved / "2").rglob("*")}
    on_disk = {name for name in on_disk if (saved / "2" / name).is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json"}
    # the file is JSON for everyone else, too
    assert json.loads((saved / "2" / "manifest.json").read_text())["step"] == 2


def test_the_hash_covers_bits_and_not_values():
    zero, negative = np.zeros(3, np.float32), -np.zeros(3, np.float32)
    assert LeafRecord.of(zero).hash != LeafRecord.of(negative).hash
    assert LeafRecord.of(zero) != LeafRecord.of(zero.view(np.int32))
    assert LeafRecord.of(np.ones((2, 3)).T).hash == LeafRecord.of(np.ones((3, 2))).hash


def test_one_bit_anywhere_is_found_and_the_step_before_taken(saved, tmp_path):
    rng = np.random.default_rng(0)
    names = sorted(p.relative_to(saved / "3") for p in (saved / "3").rglob("*") if p.is_file())
    tried = 0
    for name in names:
        content = (saved / "3" / name).read_bytes()
        for bit in rng.integers(0, max(8 * len(content), 1), 6 if content else 0):
            directory = tmp_path / str(tried)
            shutil.copytree(saved, directory)
            _flip(directory / "3" / name, int(bit))
            damaged = Checkpointer(directory).find_damaged()
            assert list(damaged) == [3], (name, bit)
            shutil.rmtree(directory)
            tried += 1
    assert tried > 50
    _flip_and_restore(saved, tmp_path / "one")


def _flip_and_restore(saved, directory):
    shutil.copytree(saved, directory)
    (data,) = (directory / "3/state/d").iterdir()
    _flip(data, 8 * (data.stat().st_size // 2))
    restored = Checkpointer(directory).restore_newest(_tree())
    assert restored.step == 2 and restored.metadata == {"step": 2} and restored.verified
    assert "has other bits than were written" in restored.damaged[3]
    np.testing.assert_array_equal(restored.tree["w"], _tree(2)["w"])
    with pytest.raises(DamagedCheckpointError, match="3 is damaged: .*remove that directory"):
        Checkpointer(directory).restore(3, _tree())


@pytest.mark.parametrize("name", ["manifest.json", "state/manifest.ocdbt", "orbax.checkpoint"])
def test_a_file_that_is_gone_is_found(copy, name):
    (copy / "3" / name).unlink()
    (reason,) = Checkpointer(copy).find_damaged().values()
    assert name.rpartition("/")[2] in reason or "lacks its manifest" in reason
    assert Checkpointer(copy).restore_newest(_tree()).step == 2


def test_an_array_that_is_read_wrongly_is_found_though_the_files_are_whole(copy):
    """As if Orbax had saved or read other numbers than it was given."""
    path = copy / "3"
    content = json.loads((path / "manifest.json").read_text())
    record = content["leaves"]["w"]
    leaves = {"w": LeafRecord(tuple(record["shape"]), "float32", "device", "0" * 32)}
    (path / "manifest.json").unlink()
    Manifest(3, leaves, {}).write(path)
    with pytest.raises(DamagedCheckpointError, match="w is read with other bits than were saved"):
        Checkpointer(copy).restore(3, _tree())
    assert Checkpointer(copy).find_damaged() == {}
    assert Checkpointer(copy).restore_newest(_tree()).step == 2


def test_when_no_step_is_good_all_are_named(copy):
    for step in (1, 2, 3):
        (copy / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(copy).restore_newest(_tree())
    assert all(f"{copy / str(step)}/manifest.json is not" in str(error.value) for step in (1, 2, 3))
    assert "Put a copy of one back" in str(error.value)
    with pytest.raises(CheckpointError, match="no step in"):
        Checkpointer(copy).find_damaged()


def test_what_does_not_fit_is_no_damage(copy):
    with pytest.raises(CheckpointError, match="w: the checkpoint has float32") as error:
        Checkpointer(copy).restore_newest({**_tree(), "w": jnp.zeros((33, 64))})
    assert not isinstance(error.value, DamagedCheckpointError)


def test_a_step_that_is_set_aside_is_none_any_more_and_nothing_is_lost(copy):
    checkpointer = Checkpointer(copy, keep=3)
    assert checkpointer.set_aside(3).name == "3.damaged"
    assert checkpointer.steps() == checkpointer.numbers() == [1, 2]
    checkpointer.save(3, _tree(3), {})
    assert checkpointer.set_aside(3).name == "3.damaged-2"
    assert (copy / "3.damaged" / "manifest.json").is_file()


def test_a_manifest_of_a_newer_version_is_not_called_damaged(copy, monkeypatch):
    monkeypatch.setattr("qlora_jax.manifest.VERSION", 0)
    with pytest.raises(CheckpointError, match="newer version of qlora_jax.*update") as error:
        Checkpointer(copy).restore_newest(_tree())
    assert not isinstance(error.value, DamagedCheckpointError)


def test_the_best_stays_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, loss in [(1, math.nan), (2, 2.0), (3, None), (4, 2.5)]:
        checkpointer.save(step, {"x": jnp.ones(1)}, {"heldout_loss": loss})
    assert checkpointer.steps() == [2, 4] and checkpointer.best_step() == 2
    only = Checkpointer(tmp_path, keep=1, keep_best=False)
    only.save(5, {"x": jnp.ones(1)}, {})
    assert only.steps() == [5] and only.best_step() is None


class Killed(BaseException):
    """A process that ends here: nothing catches it."""


@pytest.mark.parametrize("phase", phases.SAVING)
@pytest.mark.parametrize("step", [3, 4])  # one that is there, and a new one
def test_a_save_that_is_killed_at_any_point_costs_nothing(copy, monkeypatch, phase, step):
    def die(name):
        if name == phase:
            raise Killed

    before = set(os.listdir(copy))
    monkeypatch.setattr(phases, "listeners", [die])
    with pytest.raises(Killed):
        Checkpointer(copy, keep=2).save(step, _tree(9), {"new": True})
    monkeypatch.setattr(phases, "listeners", [])
    restored = Checkpointer(copy).restore_newest(_tree())
    is_new = phase in ("saving: named", "saving: done")
    assert restored.step == (step if is_new else 3) and restored.damaged == {}
    assert restored.metadata == ({"new": True} if is_new else {"step": 3})
    Checkpointer(copy).clean()
    kept = {"1", "2", "3", *([str(step)] if is_new else [])}
    after = {"saving: done": {str(step - 1), str(step)}}.get(phase, kept)
    assert set(os.listdir(copy)) == after and before == {"1", "2", "3"}


def test_killed_between_two_renames_the_old_step_comes_back(copy):
    os.rename(copy / "3", copy / ".3.replaced")
    (copy / ".3.partial-77").mkdir()
    (copy / ".1.removed").mkdir()
    checkpointer = Checkpointer(copy)
    checkpointer.clean()
    assert sorted(os.listdir(copy)) == ["1", "2", "3"]
    assert checkpointer.restore_newest(_tree()).step == 3


def test_a_save_for_which_there_is_no_room_is_refused_before_it_begins(copy, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("qlora_jax.checkpoint.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("qlora_jax.checkpoint.ocp.save", lambda *a, **k: pytest.fail("began"))
    with pytest.raises(CheckpointError, match=r"it needs 1.0 MiB, and 1.0 MiB are free.*1, 2, 3"):
        Checkpointer(copy).save(4, _tree(), {})
    assert sorted(os.listdir(copy)) == ["1", "2", "3"]


def test_verify_reads_a_step_without_knowing_what_it_is(copy):
    assert Checkpointer(copy).verify(3).metadata == {"step": 3}
    (data,) = (copy / "3/state/d").iterdir()
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match="bytes instead of"):
        Checkpointer(copy).verify(3)
