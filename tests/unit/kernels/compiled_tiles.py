"""Compile kernels for a Hopper GPU, without one, and print as JSON what the loops with products do, and what became of the mix's
sums.

Run without TRITON_INTERPRET, which replaces what is to be compiled.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_kernels.fused.boundary_plans import ForwardOptions, backward_plan, forward_plan
from mhc_kernels.fused.launch import Step
from mhc_kernels.fused.library import sizes_of
from mhc_kernels.fused.single import Read, mix_project_step

STREAMS = {"x", "y", "y_bias", "out", "u", "g", "du", "dx", "dy", "back", "read"}
PRODUCTS = {"w", "w_back", "da"}
KERNELS = {
    "mix_project_kernel", "project_kernel", "phi_backward_kernel", "phi_streams_backward_kernel", "stream_backward_kernel",
}  # fmt: skip


def steps(n: int, c: int) -> list[Step]:
    """Of a boundary in bf16, of `connect` and of their backwards: those with products in a loop."""
    sizes = sizes_of((2048, n * c), n, torch.bfloat16, -1)
    found: dict[Any, Step] = {}
    for mixes in (True, False):
        options = ForwardOptions(mixes, False, False, 0.0, True, 20, 1e-6, 0.0, False, None, 0.0, False)
        backwards = [options.backward(True, True, False, read) for read in (None, Read(None, False))[: 1 + mixes]]
        for plan in (forward_plan(sizes, options), *(backward_plan(sizes, backward) for backward in backwards)):
            found |= {(step.kernel.fn.__name__, step.meta): step for step in plan._steps}
    names = KERNELS - ({"stream_backward_kernel"} if sizes.wide else set())  # there it has no product
    return [step for (name, _), step in found.items() if name in names]


def _tile(name: str, views: dict[str, str]) -> str:
    while name in views:
        name = views[name]
    return name


def compiled(step: Step) -> Any:
    """The kernel of a launch in bf16."""
    names, arrays, scalars = step.kernel.arg_names, len(step.arrays), len(step.scalars)
    bf16 = STREAMS | (PRODUCTS - {"w_back"} if step.kernel.fn.__name__ == "phi_streams_backward_kernel" else PRODUCTS)
    kinds = ["*i64" if a == "seed" else "*bf16" if a in bf16 else "*fp32" for a in step.arrays]
    kinds += ["fp32" if isinstance(scalar, float) else "i32" for scalar in step.scalars]
    signature: dict[str, str] = dict(zip(names, kinds + ["constexpr"] * len(step.meta), strict=True))
    constants = {(arrays + scalars + k,): value for k, value in enumerate(step.meta)}
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(arrays)}
    source = ASTSource(step.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": step.warps})


def loops(step: Step) -> list[dict[str, Any]]:
    """Of each loop with products that run beside it: slots of the tiles that they read and that are copied ahead; how many
    products may still run where the copies start."""
    lines = compiled(step).asm["ttgir"].splitlines()
    tiles = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", "\n".join(lines)))
    found = []
    for start, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        end = next(k for k in range(start + 1, len(lines)) if re.match(rf" {{{indent}}}}}", lines[k]))
        body = lines[start:end]
        products = [k for k, text in enumerate(body) if "warp_group_dot " in text and "isAsync = true" in text]
        copies = [k for k, text in enumerate(body) if "async_copy_global_to_local" in text]
        if not products or not copies:
            continue
        views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", "\n".join(body)))
        read = {_tile(operand, views) for k in products for operand in re.findall(r"%\w+", body[k])[1:3]}
        waits = [re.search(r"warp_group_dot_wait .*pendings = (\d+)", text) for text in body[products[0] : copies[0]]]
        running = min([int(wait[1]) for wait in waits if wait], default=len(products))
        slots = [int(tiles[tile]) for tile in read if tile in tiles]
        found.append({"slots": slots, "running": running, "products": len(products)})
    return found


def mix_operations(n: int) -> Counter[str]:
    """float32 operations of the mix alone, by their names in PTX."""
    step = mix_project_step(sizes_of((2048, n * 1280), n, torch.bfloat16, -1), True, False, False, False, False, 0.0)
    return Counter(re.findall(r"\b(fma|mul|add)\.[a-z.]*f32\b", compiled(step).asm["ptx"]))


if __name__ == "__main__":
    stages = {}
    for n in (4, 5, 8):
        for step in steps(n, 1280):
            names = step.kernel.arg_names[-len(step.meta) :]
            given = dict(zip(names, step.meta, strict=True))
            name = f"n = {n}, {step.kernel.fn.__name__}, {'' if given.get('MIX', True) else 'no '}mix"
            name += ", and reads again" if given.get("READ") else ""
            assert name not in stages, name
            stages[name] = [given["STAGES"], loops(step)]
    print(json.dumps({"loops": stages, "mix": {n: mix_operations(n) for n in range(1, 9)}}))
