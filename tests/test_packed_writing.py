"""Writing packed folders: refused, out of room, killed; the files are whole or not there."""

import os
import shutil

import numpy as np
import pytest
import test_loading
from synthetic_checkpoint import (
    write_small_checkpoint,
)

from qlora_jax.errors import WeightsError
from qlora_jax.loading import load_model
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import open_checkpoint, writing

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    return write_small_checkpoint(tmp_path / "model")


def test_a_nan_is_refused_and_leaves_an_unfinished_folder(model, tmp_path):
    weight = open_checkpoint(model).read(UP)
    weight[0, 0] = np.nan
    test_loading.rewrite(model, {UP: weight})
    with pytest.raises(WeightsError, match=f"{UP} holds NaN"):
        quantize_checkpoint(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(WeightsError, match="is not finished"):
        load_model(tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(WeightsError, match="is not empty .it has thesis.tex"):
        quantize_checkpoint(model, out)
    assert os.listdir(out) == ["thesis.tex"]
    done = quantize_checkpoint(model, tmp_path / "done")
    before = {file.name: file.stat().st_mtime_ns for file in done.iterdir()}
    assert quantize_checkpoint(model, done) == done  # nothing to do
    assert {file.name: file.stat().st_mtime_ns for file in done.iterdir()} == before
    with pytest.raises(WeightsError, match="belongs to another job"):
        quantize_checkpoint(model, done, quant_type="fp4")


def test_one_writer(model, tmp_path):
    out = tmp_path / "out"
    held = []

    def second_writer(*_):
        if not held:
            with pytest.raises(WeightsError, match="is being written by another process"):
                writing.FolderWriter(out, {})
            held.append(True)

    quantize_checkpoint(model, out, progress=second_writer)
    assert held


def test_no_room_is_said_before_anything_is_written(model, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: free)
    with pytest.raises(WeightsError, match="needs 0.02 GB, and 0.00 GB are free"):
        quantize_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [writing.JOURNAL]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "replace"])
@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_a_disk_that_fills_up_breaks_nothing(model, tmp_path, monkeypatch, call, format):
    expected = quantize_checkpoint(model, tmp_path / "expected", format=format, file_bytes=9_000)
    monkeypatch.setattr(writing, "_FLUSH_BYTES", 1)
    calls, real = [], getattr(os, call)

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, call, full)
        with pytest.raises(WeightsError, match="No space left on device.*it continues"):
            quantize_checkpoint(model, out, format=format, file_bytes=9_000)
    if call == "posix_fallocate":
        assert os.listdir(out) == [writing.JOURNAL]
    quantize_checkpoint(model, out, format=format, file_bytes=9_000)
    same = {f.name: f.read_bytes() for f in expected.iterdir() if f.name != writing.JOURNAL}
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.name != writing.JOURNAL} == same


class Killed(BaseException):
    """Nothing catches it; the folder stays as a killed process leaves it."""


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_files(
    model, tmp_path, monkeypatch, format
):
    """The first run dies at its first call of the system, the next at its second, and so on."""
    expected = quantize_checkpoint(model, tmp_path / "expected", format=format, file_bytes=9_000)
    monkeypatch.setattr(writing, "_FLUSH_BYTES", 3_000)
    names = ("posix_fallocate", "pwrite", "fdatasync", "fsync", "write", "replace", "ftruncate")
    reals = {name: getattr(os, name) for name in names}
    left = 0

    def mortal(name):
        def call(*args):
            nonlocal left
            left -= 1
            if left < 0:
                if name == "write":  # torn in the middle of a line
                    reals["write"](args[0], args[1][: len(args[1]) // 2])
                raise Killed
            return reals[name](*args)

        return call

    for name in names:
        monkeypatch.setattr(writing.os, name, mortal(name))
    for kills in range(500):
        left = kills
        try:
            out = quantize_checkpoint(model, tmp_path / "out", format=format, file_bytes=9_000)
            break
        except Killed:
            assert not (tmp_path / "out" / "config.json").exists() or left < 0
            for file in (tmp_path / "out").glob("*.safetensors"):  # a name means a whole file
                assert file.read_bytes() == (expected / file.name).read_bytes()
    assert kills > 30
    files = {f.name: f.read_bytes() for f in out.iterdir() if f.name != writing.JOURNAL}
    same = {f.name: f.read_bytes() for f in expected.iterdir() if f.name != writing.JOURNAL}
    assert files == same
