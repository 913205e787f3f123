"""Damage to a packed base: every file of both kinds, bit by bit; tensors that do not fit."""

import json
import random
import shutil
import subprocess
import sys

import catalogue
import numpy as np
import pytest
import safetensors.numpy
import tiny_run
from catalogue import attempt, fault

from qlora_jax.errors import WeightsError
from qlora_jax.loading import load_model
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.checksums import CHECKSUMS
from qlora_jax.weights.writing import JOURNAL, FolderWriter

CASES = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("packed")
    return {
        kind: quantize_checkpoint(model, folder / kind, format=kind)
        for kind in ("qlora_jax", "bitsandbytes")
    }


def read_all(folder):
    """What loading reads of a folder, without building the model."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.read(name)


def damaged(content, rng):
    """The content with one bit flipped, or cut off somewhere."""
    if rng.random() < 0.75:
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return content[: rng.randrange(len(content))]


@pytest.mark.parametrize("kind", ["qlora_jax", "bitsandbytes"])
@fault(
    f"A bit flips in a packed base, or a file of it is cut off: {CASES} random cases in each of "
    "the two formats, every file among them",
    exit=2,
    says=("error: ", "it is damaged. Quantize the original model again, or copy the folder again"),
    holds="All are found while the folder is read, before a number of it is used",
)
def test_flips_and_cuts(seen, packed, tmp_path, kind):
    folder = shutil.copytree(packed[kind], tmp_path / "packed")
    read_all(folder)
    files = sorted(path for path in folder.iterdir() if path.name != JOURNAL)
    assert len(files) >= 4 and folder / CHECKSUMS in files
    rng, unseen = random.Random(0), []
    for case in range(CASES):
        file = files[case % len(files)]
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        outcome = attempt(lambda: read_all(folder))
        if outcome.code != 2:
            unseen.append((file.name, outcome))
        file.write_bytes(content)
    assert not unseen, unseen[:3]
    read_all(folder)
    file = folder / "model.safetensors"
    file.write_bytes(damaged(file.read_bytes(), rng))
    seen(attempt(lambda: load_model(folder)))


KILLED = """
import os, sys
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import writing
writing._FLUSH_BYTES = 1  # a journal line for each tensor, as a large model has

def progress(done, total, name):
    if 2 * done > total:
        os.kill(os.getpid(), 9)

quantize_checkpoint(*sys.argv[1:3], format=sys.argv[3], progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qlora_jax", "bitsandbytes"])
@fault(
    "`kill -9` while a model is quantized; what it left is given to a run as it is",
    exit=2,
    says=("error: ", "is not finished"),
    holds="No half of a file has the name of a whole one; the same `quantize.py` command goes on, "
    "and the folder is to the byte that of a run that nothing happened to",
)
def test_killed_while_quantizing(seen, model, packed, tmp_path, kind):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model), str(out), kind]
    assert subprocess.run(command, cwd=catalogue.FOLDER.parents[1]).returncode == -9
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors.partial" in names and "model.safetensors" not in names
    seen(attempt(lambda: load_model(out)))
    quantize_checkpoint(model, out, format=kind)
    whole = {path.name: path.read_bytes() for path in packed[kind].iterdir()}
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert whole.pop(JOURNAL) and found.pop(JOURNAL)
    assert found == whole


@fault(
    "A bit flips in the journal of a model that is being quantized, and it is continued",
    exit=2,
    says=("error: ", JOURNAL, "is damaged. Remove the folder and start again"),
    holds="No tensor is taken for written that is not: a folder with a hole in it would load",
)
def test_a_damaged_journal(seen, packed, tmp_path):
    rng, journal = random.Random(0), tmp_path / JOURNAL
    content = (packed["qlora_jax"] / JOURNAL).read_bytes()
    job = json.loads(content.splitlines()[0])["job"]

    def go_on():
        with FolderWriter(tmp_path, job):
            pass

    for _ in range(100):
        # not the end of a line: the next would be a part of it, which is no JSON either
        changed = bytearray(content)
        changed[rng.randrange(len(content) - 1)] ^= 1 << rng.randrange(8)
        journal.write_bytes(changed)
        assert attempt(go_on).code == 2, bytes(changed)
    journal.write_bytes(content.replace(b'"done": ["', b'"done": ["x', 1))
    seen(attempt(go_on))
    journal.write_bytes(content)
    go_on()


def test_each_byte_of_the_tensors_is_covered(packed, tmp_path):
    """Of float32 values also the bits that the fingerprint of the base rounds away."""
    for kind, original in packed.items():
        said = json.loads((original / CHECKSUMS).read_text())["files"]
        names = {path.name for path in original.iterdir()} - {CHECKSUMS, JOURNAL}
        assert said.keys() == names, kind
        for name, file in said.items():
            if "ranges" in file:
                ends = [0]
                for start, count, _ in file["ranges"]:
                    assert start == ends[-1]
                    ends.append(start + count)
                assert ends[-1] == file["bytes"] == (original / name).stat().st_size


def test_an_older_folder_without_hashes_is_read(packed, tmp_path):
    for kind, original in packed.items():
        older = shutil.copytree(original, tmp_path / kind)
        (older / CHECKSUMS).unlink()
        read_all(older)


def test_what_is_changed_on_purpose_is_told_how(packed, tmp_path):
    folder = shutil.copytree(packed["qlora_jax"], tmp_path / "packed")
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(WeightsError, match=f"on purpose, remove {CHECKSUMS}"):
        open_checkpoint(folder)
    (folder / CHECKSUMS).unlink()
    read_all(folder)


TENSORS = {
    "missing": lambda tensors, name: tensors.pop(name),
    "extra": lambda tensors, name: tensors.update({f"{name}.copy": tensors[name]}),
    "mis-shaped": lambda tensors, name: tensors.update({name: tensors[name][:-1].copy()}),
    "mis-typed": lambda tensors, name: tensors.update({name: tensors[name].astype(np.int32)}),
}


@pytest.mark.parametrize("change", TENSORS)
@fault(
    "A model file with a tensor that is missing, left over, of another shape or of another dtype",
    exit=2,
    says=("error: ", "up_proj"),
    holds="The tensor is named; nothing is written",
)
def test_tensors_that_do_not_fit(seen, model, tmp_path, change):
    folder = shutil.copytree(model, tmp_path / "changed")
    (file,) = folder.glob("*.safetensors")
    tensors = {k: v.astype(np.float32) for k, v in safetensors.numpy.load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    TENSORS[change](tensors, name)
    safetensors.numpy.save_file(tensors, file)
    seen(attempt(lambda: load_model(folder)))
    out = tmp_path / "out"
    assert attempt(lambda: quantize_checkpoint(folder, out)).code == 2
    assert not list(out.glob("*.safetensors")) if out.exists() else True


def test_the_hash_is_of_what_is_read(packed):
    """Values of a folder with hashes are those of the folder: verifying changes nothing."""
    weights = [open_checkpoint(packed[kind]) for kind in packed]
    ours, theirs = weights[0].read("embed_tokens/embedding"), weights[1]
    np.testing.assert_array_equal(ours, theirs.read("model.embed_tokens.weight"))
