"""What is installed and what it runs on. No host name, no path, no user, and of the environment a few switches only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

from mhc_megatron.doctor.apex import apex

_PACKAGES = ("torch", "triton", "transformer-engine", "flash-attn", "apex", "numpy", "megatron-core", "mhc-megatron")
# Switches that change what is computed or how GPUs talk to each other.
_SWITCHES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_IB_DISABLE",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "OMP_NUM_THREADS",
    "TORCHDYNAMO_DISABLE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TRITON_INTERPRET",
)


def versions() -> dict[str, str]:
    """Name -> version of everything that matters, "not installed" for what is missing."""
    import torch

    found = {"python": sys.version.split()[0]}
    found |= {name: _version(name) for name in _PACKAGES}
    found["apex"] = apex()
    if found["mhc-megatron"] == "not installed":
        from mhc_megatron import __version__

        found["mhc-megatron"] = f"{__version__} (not pip-installed)"
    found["CUDA (torch's)"] = torch.version.cuda or "none: a CPU build of torch"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["GPU driver"] = _driver()
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none (no nvidia-smi, or it fails)"
    return ", ".join(sorted(set(done.stdout.split()))) or "none"


def hardware() -> dict[str, str]:
    """The system and every GPU."""
    import torch

    found = {"system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"{gpu.multi_processor_count} multiprocessors"
        )
    if len(found) == 1:
        found["GPU"] = "none that torch can use"
    switches = [f"{name}={os.environ[name]}" for name in _SWITCHES if name in os.environ]
    found["switches"] = " ".join(switches) or "none set"
    return found
