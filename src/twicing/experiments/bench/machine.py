"""What a time was measured on: machine, threads, allocator, versions, commit. Each row of a record carries it.

The allocator can double a dense form's time on the CPU, so that no time says anything without it.
"""

import os
import platform
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import torch

from twicing.experiments.results import environment

# What decides how memory is allocated and how many threads there are. Values of others are nobody's business.
_ALLOCATOR = (
    "MALLOC_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "PYTORCH_ALLOC",
    "PYTORCH_CUDA_ALLOC",
    "PYTORCH_NO_CUDA",
)
_THREADS = ("OMP_", "KMP_", "MKL_", "GOMP_")
_PACKAGES = ("twicing", "torch", "triton", "timm", "numpy")


@dataclass(frozen=True)
class Machine:
    """Where and with what the rows of one run were measured."""

    device: str
    cores: int
    threads: int
    allocator: str
    threading: str
    system: str
    versions: str
    commit: str
    measured: str


def this_machine(device: torch.device) -> Machine:
    """The machine, with the settings of this process."""
    here = environment(device)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # A checkout that was never installed still has its torch.
            if package == "torch":
                versions[package] = torch.__version__
    return Machine(
        device=here.device,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=here.threads,
        allocator=_settings(_ALLOCATOR),
        threading=_settings(_THREADS),
        system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()).strip() or 'unknown libc'}",
        versions="; ".join(f"{name} {version}" for name, version in versions.items()),
        commit=here.commit or "unknown",
        measured=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _settings(prefixes: tuple[str, ...]) -> str:
    """The environment variables that begin so, as one would type them; "default" where there is none."""
    found = [f"{name}={shlex.quote(value)}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    return " ".join(found) or "default"
