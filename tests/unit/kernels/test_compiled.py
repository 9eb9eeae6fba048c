"""What Triton makes of a kernel where the result of a mistake depends on time, or on the compiler's choice: no run would show it
reliably."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3."), reason="reads Triton 3's intermediate code")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What compiled_tiles.py prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache: Path = tmp_path_factory.mktemp("triton")
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("compiled_tiles.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_products_read_tiles_that_no_copy_overwrites(found: dict[str, Any]) -> None:
    """With a slot less than stages, the tile after next would be copied to where products may still read (Triton 3.6, if
    registers read the tile as well): seen as other bits at times."""
    assert sum(len(loops) for _, loops in found["loops"].values()) >= 6, found
    for kernel, (stages, loops) in found["loops"].items():
        for loop in loops:
            assert loop["slots"], kernel
            # Those of the loop's turn before this one are done: theirs is the slot that is copied into.
            assert loop["running"] <= loop["products"], f"{kernel}: {loop}"
            assert loop["running"] == 0 or min(loop["slots"]) >= stages, f"{kernel}: {stages} stages, {loop}"


def test_sums_of_products_are_fused(found: dict[str, Any]) -> None:
    """Every product but a sum's first one is fused with its addition; else kernels that compute the same streams may differ."""
    assert len(found["mix"]) == 8
    for n, operations in found["mix"].items():
        assert operations["fma"] == int(n) * operations["mul"], n
        assert "add" not in operations, n
