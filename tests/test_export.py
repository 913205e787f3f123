"""scripts/export.py on a trained run: what is merged is measured, and refused when it is worse."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

from qlora_jax import export
from qlora_jax.errors import ConfigError, ExportError, WeightsError
from qlora_jax.export import check_format, export_merged
from qlora_jax.loading import load_model
from qlora_jax.training import load_trained, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory whose adapter has learned something."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny_run.write_model(folder / "model")
    config = tiny_run.tiny_config(model, tiny_run.write_data(folder / "data.jsonl"))
    config.model.compute_dtype, config.model.block_size = "float32", 64
    train(config, folder / "run", report=tiny_run.quiet_report()[0])
    return folder / "run"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_merged_folder_is_measured_and_right(run, tmp_path):
    shown = []
    out = tmp_path / "merged"
    merge = export_merged(run, out, dtype="f32", show=shown.append)
    assert shown == [merge] and merge.path == out and merge.tokens > 10
    base, adapted, trained, original = merge.rows.values()
    assert list(merge.rows)[2] == merge.written == "4-bit weights + delta, f32 (written)"
    assert adapted[1:] == (0, 0, 0) and adapted.loss < base.loss - 0.1 and base.kl > 0.01
    assert abs(trained.loss - adapted.loss) < 1e-4 and trained.kl < 1e-6
    assert 1e-4 < original.kl < base.kl
    model, _ = load_trained(run)
    merged, tokenizer = load_model(out, quant_type=None)
    ids = np.array([tokenizer.encode("what is the sum of one and two")])
    np.testing.assert_allclose(merged(ids), model(ids), atol=1e-4)


def test_the_original_weights_are_written_when_asked_for(run, tmp_path):
    merge = export_merged(run, tmp_path / "merged", weights="original", max_regression=9)
    assert merge.written == "original weights + delta, bf16 (written)"
    assert list(merge.rows)[-1] == "4-bit weights + delta, bf16"
    model = json.loads((run / "config.json").read_text())["model"]["path"]
    named = export_merged(run, tmp_path / "named", weights=model, max_regression=9)
    assert named.rows == merge.rows
    assert files(tmp_path / "named") == files(tmp_path / "merged")


def test_a_regression_is_refused_shown_and_leaves_nothing(run, tmp_path):
    shown = []
    with pytest.raises(ExportError, match=r"worse, and at most -1 .*--max_regression=0\.\d+") as e:
        export_merged(run, tmp_path / "out", format="bnb", max_regression=-1, show=shown.append)
    assert len(shown[0].rows) == 3 and files(tmp_path) == []
    allowed = float(re.search(r"--max_regression=(\S+)\.", str(e.value))[1])
    merge = export_merged(run, tmp_path / "out", format="bnb", max_regression=allowed)
    assert merge.rows == shown[0].rows
    requantized = merge.rows[merge.written]
    assert merge.written == "original weights + delta, in 4 bits again (written)"
    assert requantized.kl > 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    load_model(tmp_path / "out")
    with pytest.raises(WeightsError, match="is there already"):
        export_merged(run, tmp_path / "out", format="bnb")


def test_text_of_ones_own(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what is the sum of one and two\n\nit is one two three\n")
    merge = export_merged(run, tmp_path / "a", format="qlora_jax", eval_path=text, max_regression=9)
    assert merge.tokens == 13
    few = export_merged(
        run, tmp_path / "b", format="qlora_jax", eval_path=text, eval_tokens=8, max_regression=9
    )
    assert few.tokens == 8


def test_a_run_without_heldout_records_asks_for_text(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_heldout", lambda *_: [])
    with pytest.raises(ConfigError, match="this run has none .* Give --eval=FILE"):
        export_merged(run, tmp_path / "out")
    assert files(tmp_path) == []


def test_a_tokenizer_that_gguf_cannot_say_leaves_nothing(run, tmp_path):
    with pytest.raises(WeightsError, match="of the kind WordLevel cannot be written as GGUF"):
        export_merged(run, tmp_path / "out.gguf", format="gguf")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf", "requantized", None), "--merge=requantized .* choose --format=bnb or qlora_jax"),
        (("gguf", "none", None), "--merge=none .* choose --format=peft"),
        (("hf", None, "q8_0"), "--format=hf has no dtype q8_0; choose one of bf16, f16, f32"),
        (("bnb", None, "f16"), "--format=bnb has no dtype f16; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_format(*arguments)


def test_the_script_prints_the_figures_and_exits_2(run, tmp_path):
    arguments = [f"--workdir={run}", f"--out={tmp_path / 'out'}", "--format=qlora_jax"]
    done = subprocess.run(
        [sys.executable, "scripts/export.py", *arguments, "--max_regression=-1"],
        cwd=tiny_run.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "nats per token worse" in done.stderr
    assert "base, not adapted" in done.stdout and "KL, mean" in done.stdout
    assert files(tmp_path) == []
