"""What Triton makes of a kernel where the result of a mistake depends on time: no run would show it reliably."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton


@pytest.mark.skipif(not triton.__version__.startswith("3."), reason="reads Triton 3's intermediate code")
def test_products_read_tiles_that_no_copy_overwrites(tmp_path: Path) -> None:
    """With a slot less than stages, the tile after next would be copied to where products may still read (Triton 3.6, if
    registers read the tile as well): seen as other bits at times."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compiled_tiles.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(len(loops) for _, loops in found.values()) >= 6, found
    for kernel, (stages, loops) in found.items():
        for loop in loops:
            assert loop["slots"], kernel
            # Those of the loop's turn before this one are done: theirs is the slot that is copied into.
            assert loop["running"] <= loop["products"], f"{kernel}: {loop}"
            assert loop["running"] == 0 or min(loop["slots"]) >= stages, f"{kernel}: {stages} stages, {loop}"
