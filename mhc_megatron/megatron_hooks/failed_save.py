"""A checkpoint that can't be saved: the folder, its free space, and which checkpoint is the last whole one.

Rebinds: ``save_checkpoint`` in megatron.training.training: adds a note to what it raises. A full disk reaches the user as
"Worker failure: ... <class 'OSError'>" otherwise.
Why a spec can't: it is not about the model.
Tested on: megatron-core 0.19.2.
Retired by: an upstream error that names the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhc_megatron.megatron_hooks.rebind import Rebinding


def _save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(iteration, *args, **kwargs)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            from megatron.training import get_args

            error.add_note(_note(iteration, Path(get_args().save)))
            raise

    return save_checkpoint


def _note(iteration: int, folder: Path) -> str:
    free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free there" if folder.is_dir() else "no such folder"
    return (
        f"mhc-megatron: the checkpoint of iteration {iteration} could not be saved to {folder} ({free}). {_left(folder)}: make "
        "room and start the same command again."
    )


def _left(folder: Path) -> str:
    tracker = folder / "latest_checkpointed_iteration.txt"
    last = tracker.read_text().strip() if tracker.is_file() else ""
    if last:
        return f"That of iteration {last} is whole and the one that is loaded"
    saved = sorted(path.name for path in folder.glob("iter_*"))
    if tracker.is_file() and saved:  # Megatron was writing it
        return f"{tracker.name} is empty: write the iteration of a whole one of {', '.join(saved)} into it"
    return "There is none before it"


REBINDINGS = [Rebinding("megatron.training.training", "save_checkpoint", _save_checkpoint)]
