"""Compile `project_kernel` for a Hopper GPU, without one, and print the slots of shared memory that its tiles have: JSON, by n.

Run without TRITON_INTERPRET, which replaces what is to be compiled.
"""

from __future__ import annotations

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_kernels.fused import boundary_plans
from mhc_kernels.fused.library import sizes_of

KINDS = {"x": "*bf16", "w": "*bf16", "sums": "*fp32"}


def slots(n: int, c: int) -> tuple[int, list[int]]:
    """Stages asked for, and slots of each tile that the loop copies ahead."""
    step = boundary_plans._project_step(sizes_of((2048, n * c), n, torch.bfloat16, -1), "x")
    names = step.kernel.arg_names
    given = (*step.arrays, *step.scalars, *step.meta)
    constants = dict(list(zip(names, given, strict=True))[len(step.arrays) + len(step.scalars) :])
    signature = {name: KINDS.get(value, "i32") for name, value in zip(names, given, strict=True)}
    signature |= dict.fromkeys(constants, "constexpr")
    pointers = {(k,): [["tt.divisibility", 16]] for k in range(len(step.arrays))}
    source = ASTSource(step.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, pointers)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": step.warps})
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])
    return constants["STAGES"], [int(count) for count in found]


if __name__ == "__main__":
    print(json.dumps({n: slots(n, 1280) for n in range(5, 9)}))
