"""Our boundary against its peers and against the memory, side by side in one process.

    python kernels/benchmarks/boundary.py [--shapes 8192x2560 ...] [--peers te,reference,compile,separate] [--json FILE]

For each shape: GPU time of forward and of forward + backward as CUDA graphs (L2 flushed, median), the same eagerly, and
the share of the two-pass byte bound (every tensor touched once in each of two passes: 14 and 34 units of C elements a
token, n = 4) at the bandwidth that ``torch.add`` reaches on this GPU in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch
from timing import bandwidth, gpu_us, graph_us, host_us, launches

from mhc_kernels import boundary, connect, mix

PEERS = ("te", "reference", "compile", "separate")


def _transformer_engine(inputs: cases.Inputs, only: list[str] | None) -> dict[str, Any]:
    from transformer_engine_peer import VARIANTS, TransformerEngineCase

    return {f"TE {k}": TransformerEngineCase(inputs, **v) for k, v in VARIANTS.items() if only is None or k in only}


def measure(name: str, case: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Times of one implementation; a failure is reported and does not stop the others."""
    started = time.perf_counter()
    try:
        case.forward_backward()
        torch.cuda.synchronize()
        warm = time.perf_counter() - started
        result = {
            **row,
            "name": name,
            "warm_up_s": warm,
            "forward_us": graph_us(case.forward),
            "both_us": graph_us(case.forward_backward),
            "eager_forward_us": gpu_us(case.forward, 15),
            "eager_both_us": gpu_us(case.forward_backward, 15),
            "launches": launches(case.forward_backward),
        }
    except Exception as error:  # one peer must not end the run
        result = {**row, "name": name, "error": f"{type(error).__name__}: {error}"[:200]}
    gc.collect()
    torch.cuda.empty_cache()
    return result


def _print(result: dict[str, Any], bytes_per_second: float) -> None:
    t, c, n = result["t"], result["c"], result["n"]
    head = f"{t:6d} {c:5d} {n:2d}  {result['name']:22s}"
    if "error" in result:
        print(f"{head} {result['error']}", flush=True)
        return
    unit = t * c * 2 / bytes_per_second * 1e6
    forward, both = cases.FORWARD_UNITS[n] * unit, cases.UNITS[n] * unit
    print(
        f"{head} {result['forward_us']:8.1f} {forward / result['forward_us']:5.0%} {result['both_us']:9.1f} "
        f"{both / result['both_us']:5.0%} {result['eager_forward_us']:9.1f} {result['eager_both_us']:9.1f} "
        f"{result['launches']:4d} {result['warm_up_s']:7.1f}",
        flush=True,
    )


def run(
    shapes: list[tuple[int, int]], peers: list[str], variants: list[str] | None, streams: list[int]
) -> list[dict[str, Any]]:
    """All measurements of record, printed as they come."""
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, add {speed / 1e12:.2f} TB/s; microseconds")
    print("     T     C  n  implementation          forward bound forward+b bound   eager f eager f+b runs warm-up s")
    results: list[dict[str, Any]] = []
    for t, c in shapes:
        for n in streams if (t, c) == (8192, 2560) else [4]:
            inputs = cases.make_inputs(t, c, n)
            row = {"t": t, "c": c, "n": n, "bytes_per_second": speed}
            todo: dict[str, Callable[[], Any]] = {"fused": lambda i=inputs: cases.Case(cases.fused, i)}
            if "separate" in peers:
                todo["separate"] = lambda i=inputs: cases.Case(cases.separate, i)
            if "reference" in peers:
                todo["reference"] = lambda i=inputs: cases.Case(cases.reference, i)
            if "compile" in peers:
                todo["torch.compile"] = lambda i=inputs: cases.Case(torch.compile(cases.reference, dynamic=False), i)
            for name, make in todo.items():
                results.append(measure(name, make(), row))
                _print(results[-1], speed)
            if "te" in peers and n == 4:
                for name, case in _transformer_engine(inputs, variants).items():
                    results.append(measure(name, case, row))
                    _print(results[-1], speed)
            a, b = inputs.y, inputs.gradients[1]
            add = {**row, "name": "residual add", "forward_us": graph_us(lambda a=a, b=b: a + b)}
            results.append(add)
            print(f"{t:6d} {c:5d} {n:2d}  residual add           {add['forward_us']:8.1f}", flush=True)
    _ratios(results)
    return results


def _ratios(results: list[dict[str, Any]]) -> None:
    """Ours to the best variant of Transformer Engine at each shape (the best forward and the best in all, separately)."""
    for t, c in dict.fromkeys((r["t"], r["c"]) for r in results):
        here = [r for r in results if (r["t"], r["c"], r["n"]) == (t, c, 4) and "both_us" in r]
        theirs = [r for r in here if r["name"].startswith("TE ")]
        ours = next((r for r in here if r["name"] == "fused"), None)
        if ours and theirs:
            best, best_forward = min(r["both_us"] for r in theirs), min(r["forward_us"] for r in theirs)
            print(
                f"T {t} C {c}: fused / best TE: forward + backward {ours['both_us']:.0f} / {best:.0f} = "
                f"{ours['both_us'] / best:.3f}, forward {ours['forward_us']:.0f} / {best_forward:.0f} = "
                f"{ours['forward_us'] / best_forward:.3f}"
            )


def host_time(t: int = 64, c: int = 1280) -> dict[str, float]:
    """Host time that one more boundary adds to a chain of them, at a size where the GPU keeps up (its own time, forward and
    backward in a CUDA graph, is measured as well).

    The autograd engine's own start, about 200 us a backward pass, is the same for a chain of any length. Other processes disturb
    a host more than a GPU: a hundred short averages, over seconds, of which the smallest counts.
    """
    long, short = 24, 4
    inputs = cases.make_inputs(t, c)
    x, y = inputs.x.flatten(-2).requires_grad_(), inputs.y.requires_grad_()  # flat, as the modules call it
    own = [tuple(p.clone().requires_grad_() for p in (inputs.phi, inputs.alpha, inputs.bias)) for _ in range(long + 1)]

    def chain(length: int, backward: bool) -> None:
        streams, u, post, res = connect(x, *own[-1], flat=True, backend="triton")
        for k in range(length):
            streams, u, post, res = boundary(streams, res, post, u, None, *own[k], flat=True, backend="triton")
        if backward:
            leaves = [x, y, *own[-1], *(p for parameters in own[:length] for p in parameters)]
            out = mix(streams, res, post, y, flat=True, backend="triton")
            torch.autograd.grad(out, leaves, inputs.gradients[0].flatten(-2))

    times = {}
    for name, backward in (("host_forward_us", False), ("host_both_us", True)):
        for length in (long, short):
            chain(length, backward)
        both = [host_us(lambda n=n, b=backward: chain(n, b), 5, 100) for n in (long, short)]
        times[name] = (both[0] - both[1]) / (long - short)
    print(
        f"host time of one boundary: forward {times['host_forward_us']:.0f} us, with backward {times['host_both_us']:.0f}"
    )
    both = [graph_us(lambda n=n: chain(n, True), 5) for n in (long, short)]
    times["host_gpu_us"] = (both[0] - both[1]) / (long - short)
    print(f"the GPU's own time for it, with backward: {times['host_gpu_us']:.0f} us")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{t}x{c}" for t, c in cases.SHAPES], metavar="TxC")
    parser.add_argument("--peers", default="te,reference,compile,separate", help=f"of {', '.join(PEERS)}; or none")
    parser.add_argument("--te-variants", default=None, help="names, separated by ';'")
    parser.add_argument("--te-quick-tuning", action="store_true", help="its autotuner in a fifth of the time")
    parser.add_argument("--streams", nargs="+", type=int, default=[4, 2, 8], help="n, at 8192x2560")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a benchmark needs a CUDA GPU")
    peers = [p for p in options.peers.split(",") if p != "none"]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    if "te" in peers:
        try:
            import transformer_engine_peer

            if options.te_quick_tuning:
                transformer_engine_peer.tune_quickly()
        except ImportError as error:
            print(f"Transformer Engine is not here ({error}): left out")
            peers.remove("te")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    variants = options.te_variants.split(";") if options.te_variants else None
    host = host_time()
    results = run(shapes, peers, variants, options.streams)  # type: ignore[arg-type]
    if options.json:
        options.json.write_text(json.dumps({"host": host, "results": results}, indent=1))


if __name__ == "__main__":
    main()
