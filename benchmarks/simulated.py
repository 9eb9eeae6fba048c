"""The planner's schedule simulator against what `pipeline.py` measured.

    python benchmarks/simulated.py RESULTS.json ... [--latency 20] [--forward 0.38] [--contention 0.09]

Takes from each result the link's speed and the step with local copies; from that, how long a chunk computes. Simulates
the step with the transfers and prints the measured and the simulated exposed time, and by how much the simulated step is
off. --latency: of a transfer, microseconds. --forward: the forward pass's share of a chunk's time (0.38 in
results/h200_27b.json). --contention: by how much longer computation takes beside a transfer. Kinds by copy engines have
their own speed (COPY_GB_PER_S) and contention.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from blocks import SHAPES

from mhc_megatron.plan.gpus import GPUS
from mhc_megatron.plan.report import KINDS
from mhc_megatron.plan.run import Chunk, Run
from mhc_megatron.plan.schedule import CONTENTION, COPY_CONTENTION, Schedule, exchange
from mhc_megatron.plan.simulation import Result, simulate
from mhc_megatron.plan.traffic import chunk_seconds

STREAMS = 4
COPY_GB_PER_S = {True: 45.0, False: 150.0}
"""Of copy engines: through host memory as benchmarks/links.py has it beside computation; between GPUs a third of what that
measures alone, as every piece waits beside matrix products."""


def last_sublayer_share(layers: int, sequence: int) -> float:
    """Of a chunk of so many MoE layers: the part of its time that its last MoE takes, by their operations."""
    from types import SimpleNamespace

    from megatron.core.transformer import MLATransformerConfig

    known = MLATransformerConfig.__dataclass_fields__
    defaults = {name: field.default for name, field in known.items()}
    config = SimpleNamespace(
        **defaults | SHAPES["27b"] | {"num_layers": layers, "moe_layer_freq": 1, "gated_linear_unit": True}
    )
    run = Run(config, None, 1, sequence, 1, 1, 0)
    return chunk_seconds(run, Chunk(0, 0, 0, layers, False, False), GPUS["h200"], 1.0)[2]


def simulated(settings: dict[str, Any], vpp: int, kind: str, local: float, options: argparse.Namespace) -> Result:
    """The step of one row. local: seconds of the step with local copies."""
    forward = options.forward
    tokens = settings["microbatch"] * settings["sequence"]
    stages = settings["stages"]
    share = last_sublayer_share(settings["layers"] // (stages * vpp), settings["sequence"])
    both = local / (
        settings["microbatches"] * vpp + stages - 1
    )  # a chunk's forward and backward; the rest is the bubble
    speed, contention = settings["gb_per_s"], options.contention
    if "copy-engine" in kind.split(":"):
        through_host = settings["environment"].get("NCCL_P2P_DISABLE", "0") != "0"
        speed, contention = COPY_GB_PER_S[through_host], COPY_CONTENTION
    crossing: Any = exchange(kind.partition(":")[0], tokens * SHAPES["27b"]["hidden_size"] * 2, STREAMS, tokens)
    return simulate(
        Schedule(
            stages,
            settings["microbatches"],
            forward * both,
            (1 - forward) * both,
            bandwidth=speed * 1e9,
            latency=options.latency / 1e6,
            contention=contention,
            chunks=vpp,
            group=settings.get("group"),
            warmup_flush=settings.get("warmup_flush", False) and vpp > 1,
            forward_share=share,
            backward_share=share,
            **crossing,
        )
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--latency", type=float, default=20.0)
    parser.add_argument("--forward", type=float, default=0.38)
    parser.add_argument("--contention", type=float, default=CONTENTION)
    options = parser.parse_args(argv)
    for path in options.results:
        written = json.loads(path.read_text())
        settings = written["settings"]
        print(f"{path.name}: {settings['device']}, {settings['gb_per_s']:.1f} GB/s; ms")
        print("PP  vpp kind         measured step   exposed  simulated exposed   step off by")
        for vpp, kinds in written["results"].items():
            for kind, row in kinds.items():
                if kind.partition(":")[0] not in KINDS:
                    continue
                result = simulated(settings, int(vpp), kind, row["local_ms"] / 1e3, options)
                off = (result.step * 1e3 / row["step_ms"] - 1) * 100
                measured = f"{row['step_ms']:13.2f} {row['exposed_ms']:9.2f}"
                print(
                    f"{settings['stages']:<3} {vpp:>3} {kind:12s} {measured} {result.exposed * 1e3:18.2f} {off:+12.1f} %"
                )


if __name__ == "__main__":
    main()
