"""Megatron-LM's own training scripts, unmodified, under the launcher. They are not in the wheel: MEGATRON_LM names a checkout."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest

from mhc_megatron.quickstart import data
from tests.distributed.test_examples import SETTINGS
from tests.distributed.test_patches import PATCHES, git_apply
from tests.distributed.test_patches import train as train_on
from tests.distributed.test_training import ACROSS_LAYOUTS, ITERATIONS, PP2_VPP2, RESHARDABLE, close, fail, train
from tests.examples import launch

CHECKOUT = Path(os.environ.get("MEGATRON_LM", "")).resolve()
WHEEL = Path(megatron.core.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEGATRON_LM"), reason="needs Megatron-LM: MEGATRON_LM=/path/to/a/checkout of release 0.19"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text; and a checkout that can read it."""
    helpers = [sys.executable, "-c", "from mhc_megatron.doctor import tree; print(*tree.dataset_helpers(), sep='\\n')"]
    done = subprocess.run(helpers, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason, found = done.stdout.splitlines()[-2:]
    if found != "True":
        pytest.skip(f"{CHECKOUT}: megatron.core.datasets.helpers_cpp: {reason}")
    folder = tmp_path_factory.mktemp("megatron-lm")
    data.prepare(folder)
    return folder


@pytest.fixture(scope="module", params=["checkout", "wheel's core"])
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain_gpt.py in its checkout; and beside megatron.training alone, so that megatron.core is the wheel's."""
    if request.param == "checkout":
        return CHECKOUT / "pretrain_gpt.py"
    return scripts(tmp_path_factory.mktemp("scripts"), "training") / "pretrain_gpt.py"


def scripts(folder: Path, *packages: str) -> Path:
    """A folder with the files at the checkout's top and these of its packages."""
    for path in filter(Path.is_file, CHECKOUT.iterdir()):
        shutil.copy(path, folder)
    (folder / "megatron").mkdir()
    for package in packages:
        (folder / "megatron" / package).symlink_to(CHECKOUT / "megatron" / package)
    return folder


@pytest.mark.parametrize("packages", [("core", "training"), ("training",)], ids=["checkout", "wheel's core"])
def test_megatron_beside_the_script(packages: tuple[str, ...], tmp_path: Path) -> None:
    """What `python script.py` imports, from whichever folder the launcher is started, although there is a wheel."""
    probe = scripts(tmp_path, *packages) / "probe.py"
    probe.write_text(
        "import megatron.core as c, megatron.training as t; print(c.__path__[0], t.__path__[0], sep='\\n')"
    )
    expected = [
        tmp_path / "megatron" / "core" if "core" in packages else WHEEL / "core",
        tmp_path / "megatron" / "training",
    ]
    for launcher in ([], ["-m", "mhc_megatron", "pretrain"], ["-m", "mhc_megatron", "pretrain", "--cpu"]):
        done = subprocess.run([sys.executable, *launcher, probe], capture_output=True, text=True)
        assert done.stdout.splitlines()[-2:] == list(map(str, expected)), done.stderr[-2000:]


def test_help(script: Path) -> None:
    run = [sys.executable, "-m", "mhc_megatron", "pretrain", str(script), "--help"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nmanifold-constrained hyper-connections (mhc-megatron):\n  --enable-mhc " in done.stdout


def test_trains_and_continues_on_a_pipeline(folder: Path, script: Path) -> None:
    """One process; then from its checkpoint on two, an interleaved pipeline, with its optimizer."""
    saved = folder / script.parent.name
    job = ["--enable-mhc", "--mhc-init=paper", "--mhc-monitor-interval=4", *RESHARDABLE]
    whole = train(folder, *job, f"--save={saved}", "--save-interval=4", script=script)
    assert whole[ITERATIONS] < whole[1] - 1
    assert len((saved / "mhc-monitor.jsonl").read_text().splitlines()) == 4, "a start, and iterations 1, 4 and 8"
    (saved / "latest_checkpointed_iteration.txt").write_text("4")
    resumed = train(folder, *job, *PP2_VPP2, f"--load={saved}", "--no-load-rng", script=script, processes=2)
    assert min(i for i in resumed if i > 0) == 5
    close(resumed, whole, ACROSS_LAYOUTS)


def test_stock_without_the_flag(folder: Path) -> None:
    """The script under the launcher, and the script alone: the same losses to every printed digit."""
    script = CHECKOUT / "pretrain_gpt.py"
    alone = train_on(CHECKOUT, folder, "--train-iters=3", launcher=False, script=script)
    assert train_on(WHEEL.parent, folder, "--train-iters=3", launcher=True, script=script) == alone


def test_patched(folder: Path, tmp_path: Path) -> None:
    """patches/, as their README says, on a checkout: the script alone has the launcher's losses."""
    tree = scripts(tmp_path)
    for package in ("core", "training"):
        shutil.copytree(CHECKOUT / "megatron" / package, tree / "megatron" / package)
    git_apply(tree, *PATCHES)
    job = ["--enable-mhc", "--mhc-init=paper", *PP2_VPP2, "--train-iters=3"]
    theirs = train_on(WHEEL.parent, folder, *job, launcher=True, script=CHECKOUT / "pretrain_gpt.py", processes=2)
    ours = train_on(tree, folder, *job, launcher=False, script=tree / "pretrain_gpt.py", processes=2)
    assert ours == theirs


@pytest.mark.parametrize("name", ["pretrain_hybrid.py", "pretrain_mamba.py"])
def test_hybrid_models_are_refused(name: str, folder: Path) -> None:
    stack = (
        "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --hybrid-layer-pattern M*-*-".split()
    )
    output = fail(folder, *stack, "--enable-mhc", script=CHECKOUT / name)
    assert "ValueError: mHC can't be used with --hybrid-layer-pattern ('M*-*-'): mHC converts GPTModel only" in output


def test_examples(folder: Path) -> None:
    """MEGATRON=... as examples/README.md has it: checked by that checkout's Megatron, and trained."""
    version = runpy.run_path(str(CHECKOUT / "megatron" / "core" / "package_info.py"))["__shortversion__"]
    dry = launch("27b", DRY_RUN=1, MOCK_DATA=1, MEGATRON=CHECKOUT)
    assert dry.returncode == 0, dry.stderr
    assert f"-m mhc_megatron pretrain {CHECKOUT}/pretrain_gpt.py " in dry.stdout
    assert f"check: megatron-core {version} accepts these arguments on 64 GPUs" in dry.stdout
    short = {"MOCK_DATA": 1, "TRAIN_STEPS": 4, "SAVE_INTERVAL": 100, "CHECKPOINTS": folder / "27b"}
    run = launch("27b", **{**SETTINGS, **short, "MEGATRON": CHECKOUT})
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+)", run.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
