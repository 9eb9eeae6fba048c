"""The Megatron that is imported: which one it is, and whether it can read data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path


def version() -> str:
    """Of the tree that is imported, which need not be the package that is installed."""
    from megatron.core.package_info import __shortversion__

    return __shortversion__


def is_installed_package() -> bool:
    """False for a Megatron-LM checkout, or a copy, that stands before the installed package on sys.path."""
    from megatron.core import package_info

    try:
        installed = importlib.metadata.distribution("megatron-core").locate_file("megatron/core/package_info.py")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(installed)).resolve() == Path(package_info.__file__).resolve()


def dataset_helpers() -> tuple[str, bool]:
    """What datasets need: the compiled ``helpers_cpp``. The wheel has it; a checkout makes it when training starts."""
    from megatron.core import datasets

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        return "compiled", True
    if not (Path(datasets.__path__[0]) / "Makefile").is_file():
        return "neither compiled nor a Makefile to compile it: install megatron-core again", False
    missing = [name for name in ("make", "g++", "python3-config") if shutil.which(name) is None]
    try:  # As the Makefile asks: the python3 on PATH, not the one that runs.
        subprocess.run(["python3", "-m", "pybind11", "--includes"], capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        missing.append("pybind11 (for the python3 on PATH)")
    if missing:
        return f"not compiled, and make at the start of training will fail: missing {', '.join(missing)}", False
    return "not compiled yet: make does it at the start of training", True
