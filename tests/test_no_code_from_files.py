"""Nothing that is read can run, and no name in a file becomes the name of a file."""

import ast
import io
import json
import pathlib
import pickle
import tarfile
import time
import zipfile

import numpy as np
import pytest
import tiny_run
from hostile_files import entry, gguf_bytes, safetensors_bytes

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError, UserError, WeightsError
from qlora_jax.loading import load_model
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.writing import FolderWriter, Piece, TensorSpec, split_into_files

ROOT = pathlib.Path(__file__).parents[1]
HOSTILE_NAMES = ["../../evil", "/tmp/evil-of-a-test", "a/../../../evil", "..", "~/.ssh/evil"]

# What runs code that is in a file, or writes files whose names are in one.
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch", "transformers", "zipfile", "tarfile", "yaml"),
}
FORBIDDEN_FUNCTIONS = {"eval", "exec", "compile"}  # nnx.Module.eval() is another
FORBIDDEN_METHODS = {"unpack_archive", "extractall"}
# A pipe to a process that it started itself, and the rivals that benchmarks are compared with.
ALLOWED = {
    "qlora_jax/compile_only.py": {"pickle"},
    "scripts/bench_rival.py": {"torch", "transformers"},
    "scripts/bench_gpu_rival.py": {"torch", "transformers"},
    "scripts/bench_gpu_rival_steps.py": {"torch", "transformers"},
}


def sources() -> list[pathlib.Path]:
    folders = ("qlora_jax", "pallas_kernels", "scripts", "configs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def forbidden_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module.split(".")[0]} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            found |= {getattr(node.func, "id", "")} & FORBIDDEN_FUNCTIONS
            found |= {getattr(node.func, "attr", "")} & FORBIDDEN_METHODS
            allowed = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if allowed.get("allow_pickle", False) is not False:
                found.add("allow_pickle")
            if allowed.get("trust_remote_code", False) is not False:
                found.add("trust_remote_code")
    return found


def test_no_module_can_load_a_pickle_or_unpack_an_archive():
    assert len(sources()) > 200
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert forbidden_in(tree) - ALLOWED.get(name, set()) == set(), name


def test_the_search_finds_what_it_looks_for():
    text = "import torch.nn\nfrom pickle import load\nnp.load(x, allow_pickle=True)\nexec(y)"
    assert forbidden_in(ast.parse(text)) == {"torch", "pickle", "allow_pickle", "exec"}


class _Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pickle_in_a_model_folder_does_not_run(tmp_path, name):
    folder, trace = tiny_run.write_model(tmp_path / "model"), tmp_path / "it ran"
    (folder / name).write_bytes(pickle.dumps(_Runs(trace)))
    with pytest.raises(WeightsError):
        load_model(str(folder))
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists()  # it would have


def test_arrays_with_objects_in_them_do_not_run(tmp_path):
    trace = tmp_path / "it ran"
    np.save(tmp_path / "x.npy", np.array([_Runs(trace)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load(tmp_path / "x.npy")
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_not_unpacked(tmp_path, kind):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("../evil", "x")
    else:
        with tarfile.open(fileobj=content, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(content.getvalue())
    with pytest.raises(WeightsError):
        open_checkpoint(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "model.gguf"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_tensor_is_not_called_like_a_file(tmp_path, name):
    folder = tiny_run.write_model(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    (folder / "model.safetensors").write_bytes(safetensors_bytes({name: entry()}, b"\1"))
    assert open_checkpoint(folder).names() == [name]
    with pytest.raises(WeightsError, match="not expected"):
        load_model(str(folder))
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(gguf_bytes(tensors=[(name, [4], 0, 0)], data=bytes(32)))
    with pytest.raises(UserError):
        load_model(str(path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_what_is_written_lies_in_the_folder_whatever_tensors_are_called(tmp_path, name):
    spec = TensorSpec((4,), np.dtype(np.uint8))
    out = tmp_path / "out"
    with FolderWriter(out, {"format": "test"}) as writer:
        writer.allocate(split_into_files([{name: spec}], 1 << 20))
        writer.write(name, [Piece(name, 0, np.arange(4, dtype=np.uint8))])
        writer.finish_files()
    written = {p.name for p in tmp_path.rglob("*") if p.is_file()} - {".quantize.jsonl"}
    assert written == {"model.safetensors"}
    (out / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(out).read(name).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("file", ["../model/model.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_an_index_names_files_of_its_own_folder(tmp_path, file):
    folder = tiny_run.write_model(tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="name of a file in that folder|lacks 1 of 1 shards"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["1", 1.5, -1, 2**40, [[1]], {"a": 1}, True])
def test_ids_of_special_tokens_are_numbers(tmp_path, index):
    folder = tiny_run.write_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": index}))
    with pytest.raises(WeightsError, match="must be a whole number"):
        Tokenizer.from_file(folder)


@pytest.mark.parametrize("token", [1, ["a"], {"content": 3}, {"a": "b"}])
def test_special_tokens_that_are_no_text_do_not_count(tmp_path, token):
    folder = tiny_run.write_model(tmp_path / "model")
    settings = {"eos_token": token, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_file(folder)  # the known end of a turn is found by its name
    assert tokenizer.eos_token_ids == (tokenizer.backend.token_to_id("<|im_end|>"),)


def test_a_regular_expression_that_takes_hours_is_given_up(tmp_path):
    folder = tiny_run.write_model(tmp_path / "model")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["pre_tokenizer"] |= {"pattern": {"Regex": "(a+)+$"}}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.from_file(folder)
    assert tokenizer.encode("what")
    started = time.monotonic()
    with pytest.raises(DataError, match="a rule in tokenizer.json takes too long"):
        tokenizer.encode("a" * 60 + "b")
    assert time.monotonic() - started < 30


def test_code_that_comes_with_a_model_stays_where_it_is(tmp_path):
    folder, trace = tiny_run.write_model(tmp_path / "model"), tmp_path / "it ran"
    (folder / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    open_checkpoint(folder)
    load_model(str(folder))
    assert not trace.exists()
