"""The monitor under every layout: the same numbers as in one process; in whole jobs: hook, file, restart, report."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhc_megatron import MHCConfig, Monitor
from mhc_megatron.monitor.ranks import Ranks
from mhc_megatron.monitor.records import FILE, Record, read
from mhc_megatron.monitor.scalars import scalars
from mhc_megatron.quickstart import data
from tests import models
from tests.distributed.test_layouts import LAYOUTS, _model
from tests.distributed.test_training import PP2_VPP2, train
from tests.ranks import run_ranks, single_process

# One Sinkhorn iteration: columns that are off, so that gains differ from 1.
MHC = MHCConfig(init="paper", init_alpha=2.0, sinkhorn_iterations=1)
# Float32 streams whose sums run in another order, through alpha * phi; 6 digits written.
TOLERANCE = 1e-4
BOARD = "board"
ONE_REPLICA = [
    "dense-tp2",
    "tp2-sp",
    "tp2-sp-recompute",
    "pp2",
    "pp2-recompute",
    "pp2-vpp2",
    "pp2-vpp2-split",
    "pp2-tp2-sp",
    "pp4-ends-apart",
]


def _step(folder: Path, settings: dict[str, Any], out: str) -> None:
    kind, mhc = _model(out), dataclasses.replace(MHC, **settings.pop("mhc", {}))
    config = models.make_config(**models.MODELS[kind], **settings)
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = [models.build(config, mhc, stage) for stage in (range(vpp) if vpp else [None])]
    parameters = folder / f"{kind}.parameters"
    if parameters.exists():
        models.load(chunks, parameters)
    else:
        models.save(chunks, parameters)
    with Monitor(chunks, folder=str(folder / out)).step(1) as step:
        losses = models.one_step(chunks, config)
        if parallel_state.is_pipeline_last_stage():
            step.values["loss"] = losses[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Record]]:
    """One process: its folder with the parameters of both models, and their records."""
    folder, records = tmp_path_factory.mktemp("monitor"), {}
    for kind in ("dense", "moe"):
        with single_process(folder):
            _step(folder, {}, kind)
        records[kind] = read(folder / kind).records[1]
        assert max(records[kind]["composite"]["backward"]["max"]) > 1.01, "all gains are 1: nothing would be compared"
    return folder, records


def monitor_under(name: str, folder: Path) -> Record:
    processes, sizes, further = LAYOUTS[name]
    settings = {**sizes, **further}
    if "pipeline_model_parallel_size" in sizes:
        settings["pipeline_dtype"] = torch.float32
    groups = {**sizes, "order": "tp-cp-ep-dp-pp"}
    run_ranks(_step, processes, folder, groups, folder=folder, settings=settings, out=name)
    assert len((folder / name / FILE).read_text().splitlines()) == 2, "one rank writes, a start and a record"
    return read(folder / name).records[1]


def assert_same(ours: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name in expected:
            assert_same(ours[name], expected[name], f"{path}.{name}")
    elif isinstance(expected, list):
        assert len(ours) == len(expected), path
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert ours == (
            pytest.approx(expected, rel=TOLERANCE, abs=1e-6) if isinstance(expected, float) else expected
        ), path


@pytest.mark.parametrize("name", ONE_REPLICA)
def test_layout_has_the_numbers_of_one_process(name: str, one: tuple[Path, dict[str, Record]], hooks: None) -> None:
    folder, expected = one
    assert_same(monitor_under(name, folder), expected[_model(name)])


def test_one_replica_is_watched(one: tuple[Path, dict[str, Record]], hooks: None) -> None:
    """With data parallelism (EP 2) it is the last one: its first microbatch is the second one of a single process."""
    folder, expected = one
    ours = monitor_under("ep2", folder)
    assert ours["sublayers"] == expected["moe"]["sublayers"]
    assert ours["loss"] != pytest.approx(expected["moe"]["loss"], rel=1e-3)


def _sampled(sequence: int, batch: int, count: int) -> None:
    """On every rank: of a microbatch that Megatron cuts for it, the sample, put together, is the whole microbatch's."""
    token = torch.arange(float(sequence * batch)).view(batch, sequence)
    local = get_batch_on_this_cp_rank({"tokens": token}, False, parallel_state.get_context_parallel_group())["tokens"].T
    parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
    if parallel:
        local = scatter_to_sequence_parallel_region(local.contiguous())
    ranks = Ranks(None, parallel)
    number, *places = ranks.part.tokens(count, *local.shape)
    values = torch.zeros(count)
    values[number] = local[*places] + 1  # 0: no rank has it
    ranks.complete(values)
    taken = min(count, sequence)
    expected = [token[k % batch, (2 * k + 1) * sequence // (2 * taken)] + 1 for k in range(taken)]
    assert values.tolist() == [*expected, *[0] * (count - taken)]


@pytest.mark.parametrize("count", [1, 10, 48, 100], ids="{} tokens".format)
@pytest.mark.parametrize("layout", [{"context_parallel_size": 2}, {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
                                    {"context_parallel_size": 3}, {"tensor_model_parallel_size": 3}])  # fmt: skip
def test_sample_is_that_of_one_process(layout: dict[str, int], count: int, tmp_path: Path) -> None:
    """Context parallelism needs Transformer Engine to train; which tokens a rank has does not."""
    run_ranks(_sampled, math.prod(layout.values()), tmp_path, layout, sequence=48, batch=5, count=count)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[int, float]]]:
    """A job to iteration 8 (pipeline of virtual stages), and again from its checkpoint of iteration 4."""
    folder = tmp_path_factory.mktemp("restart")
    data.prepare(folder)
    checkpoint = folder / "run"
    job = ["--enable-mhc", "--mhc-init=paper", "--mhc-monitor-interval=2", *PP2_VPP2, f"--save={checkpoint}"]
    job += [f"--load={checkpoint}", "--save-interval=4", f"--tensorboard-dir={checkpoint / BOARD}"]
    losses = [train(folder, *job, processes=2)]
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("4")
    losses.append(train(folder, *job, processes=2))
    return checkpoint, losses


def test_file_goes_on_over_a_restart(restarted: Any) -> None:
    folder, losses = restarted
    lines = (folder / FILE).read_text().splitlines()
    assert [int(re.findall(r'"iteration":(\d+)', line)[0]) for line in lines] == [1, 1, 2, 4, 6, 8, 6, 6, 8]
    run = read(folder)
    assert list(run.records) == [1, 2, 4, 6, 8]
    assert run.run["num_layers"] == 4
    for iteration, record in run.records.items():
        # Losses as Megatron prints them: 7 digits, and of the run that came last.
        assert record["loss"] == pytest.approx(losses[iteration > 4][iteration], rel=2e-6)
        assert len(record["sublayers"]) == len(record["composite"]["backward"]["min"]) == 8


def test_tensorboard_has_the_numbers_of_the_file(restarted: Any) -> None:
    """All of them, from the rank on which Megatron has its writer; of iterations that ran twice, both times."""
    folder, _ = restarted
    board = EventAccumulator(str(folder / BOARD), size_guidance={"scalars": 0}).Reload()
    events = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"] if tag.startswith("mhc")}
    records = read(folder).records
    steps = {tag: [event.step for event in found] for tag, found in events.items()}
    assert steps == {tag: [1, 2, 4, 6, 8, 6, 8] for tag in scalars(records[1])}
    for iteration, record in records.items():
        for name, value in scalars(record).items():
            last = [event.value for event in events[name] if event.step == iteration][-1]
            assert last == pytest.approx(value, rel=1e-6), (name, iteration)  # float32 there


_WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from mhc_megatron.__main__ import main
status = main()
assert "torch" not in sys.modules, "the report has no use for torch"
sys.exit(status)
"""


def report(*arguments: str | Path, without_matplotlib: bool = False) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "mhc_megatron", "report", *map(str, arguments)]
    if without_matplotlib:
        run = [sys.executable, "-c", _WITHOUT_MATPLOTLIB, "report", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=120)


def test_report(restarted: Any, tmp_path: Path) -> None:
    folder, losses = restarted
    done = report(f"mine={folder}", folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "gains-by-depth.png", "gains-by-iteration.png", "h-res-mine.png", "h-res-run.png", "loss.png", "streams.png",
    ]  # fmt: skip
    assert all((tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page is not self-contained"
    assert f"<td>{losses[1][8]:.4f}</td>" in page
    assert re.search(r"\| mine \| 8 \|.*\n\| run \| 8 \|", done.stdout)


def test_report_without_matplotlib_or_file(restarted: Any, tmp_path: Path) -> None:
    folder, _ = restarted
    done = report(folder, "--out", tmp_path / "report", without_matplotlib=True)
    assert done.returncode == 1
    assert "the report needs matplotlib: pip install 'mhc-megatron[report]'" in done.stderr
    done = report(tmp_path)
    assert done.returncode == 1
    assert f"no {FILE} in {tmp_path}" in done.stderr
