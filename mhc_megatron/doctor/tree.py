"""The Megatron that is imported: which one it is, and whether it can read data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sysconfig
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
    """What datasets need: the compiled ``helpers_cpp``. The wheel has it; a checkout runs make for it when training starts."""
    from megatron.core import datasets

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    folder = Path(datasets.__path__[0])
    if not (folder / "Makefile").is_file():
        return ("compiled", True) if compiled else ("not compiled: install megatron-core again", False)
    # What the Makefile asks for: programs on PATH, which may belong to another Python than this one.
    suffix, ours = _run(folder, "python3-config", "--extension-suffix"), sysconfig.get_config_var("EXT_SUFFIX")
    if compiled and suffix == ours:
        return "compiled", True
    missing = [name for name in ("make", "g++") if shutil.which(name) is None]
    if suffix != ours:
        found = f"that on PATH makes {suffix} files" if suffix else "there is none on PATH"
        missing.append(f"a python3-config of this Python ({found})")
    if not _run(folder, "python3", "-m", "pybind11", "--includes"):
        missing.append("pybind11 for the python3 on PATH")
    if missing:
        return f"make, which Megatron runs when training starts, will fail; it needs {', '.join(missing)}", False
    return "not compiled yet: Megatron runs make when training starts", True


def _run(folder: Path, *command: str) -> str:
    """What it prints; nothing if it fails."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
