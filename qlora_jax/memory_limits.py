"""What memory a run may take: of the GPU, and of the host in every sense that ends a process."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Mapping, MutableMapping

import psutil

# What the driver, the CUDA context and the libraries' handles take of a card: an assumption.
CONTEXT_BYTES = 768 << 20
# JAX takes three quarters of a GPU, unless one of these says otherwise.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Of the pool that XLA pins for a GPU, unless the variable says otherwise.
_POOL_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_POOL_GB = 64
# A control group's limit and use, of version 2 and of version 1.
_GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of compiled programs on one GPU.

    Attributes:
        device: name of the target.
        peak_bytes: device memory that the largest of the programs needs.
        budget_bytes: the device's memory less `CONTEXT_BYTES`.
        parts: bytes by what they are; they add up to `peak_bytes`.
    """

    device: str
    peak_bytes: int
    budget_bytes: int
    parts: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the programs can run there."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def verdict(self) -> str:
        """`"fits"` or `"does not fit"`."""
        return "fits" if self.fits else "does not fit"


def host_limits(
    *,
    pinned: bool,
    environment: Mapping[str, str] = os.environ,
    groups: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
) -> dict[str, int]:
    """Bytes that can still be allocated, by what limits them.

    Args:
        pinned: for a GPU, whose pinned memory comes from a pool of XLA's.
        environment: where the pool's size is set.
        groups: where control groups are mounted.

    >>> limits = host_limits(pinned=True, environment={"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "8"})
    >>> limits["XLA's pinned pool (XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB)"] == 8 << 30
    True
    """
    limits = {"free memory of this machine": psutil.virtual_memory().available}
    for limit, use in _GROUPS:
        allowed, used = _number(groups / limit), _number(groups / use)
        if allowed is not None and used is not None:
            limits["this container's memory limit"] = max(0, allowed - used)
            break
    if pinned:
        gigabytes = environment.get(_POOL_VARIABLE, "")
        size = int(gigabytes) if gigabytes.isdecimal() else _POOL_GB
        limits[f"XLA's pinned pool ({_POOL_VARIABLE})"] = size << 30
    return limits


def claim_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX take a GPU's whole memory but for `CONTEXT_BYTES`, as plans assume.

    To be called before JAX looks for devices; without a GPU it changes nothing, and what the user
    has set stays.

    Args:
        environment: where JAX reads it.

    >>> environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5", "PATH": ""}
    >>> claim_gpu(environment)
    >>> environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]
    '.5'
    """
    if any(name in environment for name in _FRACTIONS):
        return
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env=dict(environment)
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return
    sizes = [int(mebibytes) << 20 for mebibytes in found if mebibytes.isdecimal()]
    if sizes and min(sizes) > 2 * CONTEXT_BYTES:
        environment[_FRACTIONS[1]] = f"{1 - CONTEXT_BYTES / min(sizes):.4f}"


def _number(path: pathlib.Path) -> int | None:
    """What a file holds, if it is a number ("max" is none)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
