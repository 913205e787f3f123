"""The GPU that the suite `gpu` runs on: what it is, its clocks, and what it could do at best."""

from __future__ import annotations

import subprocess
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.targets import TARGETS, find_target

_FIELDS = (
    "name driver_version compute_cap memory.total clocks.sm clocks.mem clocks.max.sm "
    "clocks.max.mem power.limit power.draw temperature.gpu"
).split()
# The cache of a device that is not among the targets: larger than most.
_UNKNOWN_L2 = 64 << 20


def read_gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU (MHz, MiB, W, degrees Celsius); None without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    return parse_gpu(lines[0])


def parse_gpu(line: str) -> dict[str, str]:
    """One line of nvidia-smi's table.

    >>> parse_gpu("NVIDIA L4, 580.1, 8.9, 23034, 210, 405, 2040, 6251, 72, 12, 30")["clocks.sm"]
    '210'
    """
    return dict(zip(_FIELDS, (part.strip() for part in line.split(",")), strict=True))


def require_gpu() -> dict[str, str]:
    """What nvidia-smi says of the GPU.

    Raises:
        UserError: there is none.
    """
    gpu = read_gpu()
    if gpu is None:
        raise UserError(
            "--suite=gpu needs an NVIDIA GPU, and nvidia-smi finds none here; --dry-run runs the "
            "same code with tiny shapes on the CPU"
        )
    return gpu


def limits(device_kind: str) -> dict[str, Any]:
    """Of a device among `qlora_jax.targets`: its data sheet's bandwidth, and its cache.

    Args:
        device_kind: the vendor's name.

    Returns:
        `bytes_per_s` (None where the device is unknown) and `l2_bytes`.

    >>> limits("NVIDIA H100 80GB HBM3")["l2_bytes"]
    52428800
    """
    for target in map(find_target, TARGETS):
        if target.device_kind == device_kind:
            return {"bytes_per_s": target.memory_bandwidth, "l2_bytes": target.l2_bytes}
    return {"bytes_per_s": None, "l2_bytes": _UNKNOWN_L2}
