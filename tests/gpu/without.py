"""A training run of a local model in a process of its own, where some packages can't be imported.

python -m tests.gpu.without '{"hidden": [names], "settings": {of the model}, "noise": 0.0, "ddp": {settings}}'
prints, as JSON, the losses and where Megatron has its Adam, its gradient norm and the layers' norms from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Report(NamedTuple):
    losses: list[float]
    adam: str
    gradient_norm: str
    norm: str


def run(hidden: list[str], settings: dict[str, Any], noise: float = 0.0, ddp: dict[str, Any] | None = None) -> Report:
    """Train in a new process without the packages ``hidden``."""
    request = {"hidden": hidden, "settings": settings, "noise": noise, "ddp": ddp or {}}
    command = [sys.executable, "-m", "tests.gpu.without", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return Report(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    request = json.loads(sys.argv[1])
    for name in request["hidden"]:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes `import name` fail

    import megatron.core.optimizer as optimizer
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.optimizer import clip_grads

    from mhc_megatron import MHCConfig
    from tests.gpu.training import LOCAL, train
    from tests.ranks import single_process

    with tempfile.TemporaryDirectory() as folder, single_process(Path(folder)):
        settings = {**LOCAL, **request["settings"]}
        mhc = MHCConfig(init="paper")
        done = train(settings, mhc, 512, noise=request["noise"], microbatches=2, te=False, ddp=request["ddp"])
    report = Report(
        done.losses,
        optimizer.Adam.__module__,
        clip_grads.l2_norm_impl.__module__,
        gpt_layer_specs.LNImpl.__module__,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
