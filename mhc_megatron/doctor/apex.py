"""Which apex is installed: Megatron uses NVIDIA's where it finds one, and takes any package of that name for it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

# Its CUDA extensions that Megatron uses, and what for.
_EXTENSIONS = {
    "fused_weight_gradient_mlp_cuda": "gradient accumulation fusion",
    "fused_layer_norm_cuda": "layer norms of local modules",
    "amp_C": "without Transformer Engine: Adam, gradient norm",
}
_NVIDIAS_OWN = ("multi_tensor_apply", "normalization", "optimizers")  # subpackages


def apex() -> str:
    """Whose apex it is, its version, which extensions load; and what to do about another one. Does not import it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (not needed)"
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(all((folder / name).is_dir() for name in _NVIDIAS_OWN) for folder in folders):
        return (
            f"{version}, NOT NVIDIA's but another package of that name (PyPI's, or a folder on the path), which Megatron may "
            "take for NVIDIA's: uninstall it (pip uninstall apex) or take it off the path; mHC needs neither"
        )
    extensions = {name: _load(name) for name in _EXTENSIONS}
    text = f"{version}, NVIDIA's; " + ", ".join(f"{name} {state}" for name, state in extensions.items())
    lost = [_EXTENSIONS[name] for name, state in extensions.items() if state != "loads"]
    if lost:
        text += f". Megatron fails where it uses the others ({'; '.join(lost)}): build apex for this torch with its "
        text += "CUDA extensions (APEX_CPP_EXT=1 APEX_CUDA_EXT=1), or uninstall it"
    return text


def _load(extension: str) -> str:
    import torch  # noqa: F401  # whose libraries they are linked to

    try:
        importlib.import_module(extension)
    except ModuleNotFoundError:
        return "is missing"
    except ImportError:  # its message names a path
        return "does not load (built for another torch, CUDA or Python)"
    except Exception as error:  # a page for a bug report has to get to its end
        return f"does not load ({type(error).__name__})"
    return "loads"
