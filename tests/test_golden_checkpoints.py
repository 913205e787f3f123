"""Runs that older versions of this project stopped are continued, and go on as they would have.

`tests/golden/make_checkpoints.py` adds one for each version that changes what a checkpoint is.
"""

import json
import pathlib
import shutil

import pytest
import tiny_run

from qlora_jax import config as config_lib
from qlora_jax import training
from qlora_jax.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
GOLDEN = pathlib.Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("checkpoint_v*"))


def test_there_is_one_without_and_one_with_a_manifest():
    found = {(GOLDEN / name / "checkpoints/2/manifest.json").exists() for name in VERSIONS}
    assert found == {False, True}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_run_of_an_older_version_is_continued(name, tmp_path, monkeypatch):
    workdir = shutil.copytree(GOLDEN / name, tmp_path / "run")
    expected = json.loads((workdir / "expected.json").read_text())["loss"]
    monkeypatch.chdir(GOLDEN)  # its configuration names the material from there
    config = config_lib.load_config(workdir / "config.json")
    report, text = tiny_run.quiet_report()
    result = training.train(config, workdir, resume="must", report=report)
    assert result.steps == 4 and "continuing after step 2 of 4" in text.getvalue()
    is_old = not (GOLDEN / name / "checkpoints/2/manifest.json").exists()
    assert ("saved by an older version, without hashes" in text.getvalue()) == is_old
    assert (workdir / "checkpoints/4/manifest.json").exists()
    losses = {str(row["step"]): row["loss"] for row in read_metrics(workdir) if "loss" in row}
    # another CPU rounds otherwise; a step taken on other data or moments is off by far more
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 4
