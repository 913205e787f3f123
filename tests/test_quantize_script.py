"""scripts/quantize.py: what a user types, and what a real kill leaves behind."""

import pathlib
import subprocess
import sys

import pytest
from synthetic_checkpoint import CONFIG, write_checkpoint

from qlora_jax.loading import load_model
from qlora_jax.nnx_linear import QuantizedParam

ROOT = pathlib.Path(__file__).parents[1]

# Quantizes in children that are killed at a random moment of their life, until one is through.
# They are forked after the imports and before JAX has threads, which is what takes long.
KILL = """
import os, pathlib, random, signal, sys, time
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.weights import writing
writing._FLUSH_BYTES = 1  # a journal line for each tensor, as a large model has
model, out, expected, format = sys.argv[1:]

def start(folder):
    if (child := os.fork()) == 0:
        quantize_checkpoint(model, folder, format=format, file_bytes=9000)
        os._exit(0)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def wait_for(journal):
    while not journal.exists():
        time.sleep(0.01)

child = start(expected)
wait_for(pathlib.Path(expected) / writing.JOURNAL)
began = time.monotonic()
assert wait(child) == 0
whole, kills, moments = time.monotonic() - began, 0, random.Random(0)
for _ in range(8):
    child = start(out)
    wait_for(pathlib.Path(out) / writing.JOURNAL)
    time.sleep(moments.uniform(0, whole / 2))
    os.kill(child, signal.SIGKILL)
    if wait(child) == 0:
        break
    kills += 1
assert wait(start(out)) == 0
print(kills)
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, CONFIG, shard_bytes=8_000)
    return folder


@pytest.mark.parametrize("format", ["qlora_jax", "bitsandbytes"])
def test_kill_9_at_random_moments(model, tmp_path, format):
    out, expected = tmp_path / "out", tmp_path / "expected"
    done = run("-c", KILL, str(model), str(out), str(expected), format)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1
    for file in expected.iterdir():
        if not file.name.startswith("."):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in expected.iterdir())


def test_the_script_writes_what_loads(model, tmp_path):
    out = tmp_path / "packed"
    flags = ["--format=bnb", "--quant_type=fp4", "--block_size=32", "--nodouble_quant"]
    done = run("scripts/quantize.py", f"--model={model}", f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    assert f"Give it in place of the model: --config.model.path={out}" in done.stdout
    kernel = load_model(out)[0].layers.mlp.up_proj.kernel
    assert isinstance(kernel, QuantizedParam)
    q = kernel.get_value()
    assert (q.quant_type, q.block_size, q.nested_absmax) == ("fp4", 32, None)
    again = run("scripts/quantize.py", f"--model={model}", f"--out={out}", *flags)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=/nowhere/llama", "--out=x"], "/nowhere/llama does not exist"),
        (["--model=x"], "--out is needed"),
        (["--model={model}", "--out={out}", "--format=bnb", "--quant_type=int4"], "has no int4"),
        (["--model={model}", "--out={out}", "--block_size=48"], "block_size=48 is not supported"),
        (["--model={model}", "--out={model}"], "is not empty"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(model, tmp_path, flags, message):
    flags = [flag.format(model=model, out=tmp_path / "out") for flag in flags]
    done = run("scripts/quantize.py", *flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
