"""patches/: on a copy of the installed Megatron, a training script without the launcher does what it does under it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest

from mhc_megatron import megatron_hooks
from mhc_megatron.monitor import records
from mhc_megatron.quickstart import data
from tests.distributed.test_training import PP2_VPP2, RESHARDABLE, command

SITE = Path(megatron.core.__file__).parents[2]
REPOSITORY = Path(__file__).parents[2]
PATCHES = sorted((REPOSITORY / "patches" / "0.19.2").glob("*.patch"))

# `python -m mhc_megatron pretrain --cpu` without its hooks. The wheel has no Makefile, which stock Megatron stumbles over.
CPU_HOST = """
import runpy, sys
import megatron.core.datasets.utils as utils
from mhc_megatron import cpu
if not hasattr(utils.compile_helpers, "__mhc_megatron__"):
    utils.compile_helpers = lambda: None
cpu.install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
cpu.shut_down()
"""


def git_apply(tree: Path, *arguments: str | Path, ok: bool = True) -> None:
    # As in patches/README.md. git must not take the folder for a part of a repository around it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(["git", "apply", *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr


def added(patch: Path) -> dict[str, list[str]]:
    """The lines that a patch adds, by file."""
    files: dict[str, list[str]] = {}
    for line in patch.read_text().splitlines():
        if line.startswith("+++ b/"):
            lines = files[line.removeprefix("+++ b/")] = []
        elif line.startswith("+"):
            lines.append(line[1:])
    return files


def python(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("patched")
    shutil.copytree(SITE / "megatron", tree / "megatron")
    git_apply(tree, *PATCHES)
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    data.prepare(folder)
    return folder


def test_a_hook_a_patch_a_row() -> None:
    seams = {r.make.__module__.rpartition(".")[2] for r in megatron_hooks.rebindings() if r.name != "P2PCommunicator"}
    assert [patch.stem for patch in PATCHES] == sorted(seams)
    table = re.findall(
        r"^\| .* \| `(\w+)\.py` \| `(\w+)\.patch` \|", (PATCHES[0].parents[1] / "README.md").read_text(), re.M
    )
    assert sorted(table) == [(patch.stem, patch.stem) for patch in PATCHES]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_only_our_lines(patch: Path) -> None:
    """A patch holds no line of Megatron, and its one hunk a file follows the last line of the release's."""
    _, *files = re.split(r"^diff --git .*\n", patch.read_text(), flags=re.M)
    assert files
    for file in files:
        old, new, hunk, *lines = file.splitlines()
        path = old.removeprefix("--- a/")
        assert new == f"+++ b/{path}"
        length = len((SITE / path).read_text().splitlines())
        assert hunk == f"@@ -{length},0 +{length + 1},{len(lines)} @@"
        assert all(line.startswith("+") for line in lines)
        assert f"# mhc-megatron, patches/0.19.2/{patch.name}" in [line[1:] for line in lines]


def test_one_by_one_in_any_order_and_back(tmp_path: Path) -> None:
    """Also on files that are longer than the release's: the lines go to their ends."""
    paths = sorted({path for patch in PATCHES for path in added(patch)})
    before = {path: (SITE / path).read_text() for path in paths}
    before["megatron/training/training.py"] += "\n\ndef of_our_cluster():\n    return 1\n"
    before["megatron/core/optimizer/__init__.py"] = '"""Ours."""\n\n' + before["megatron/core/optimizer/__init__.py"]
    for path, text in before.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for patch in reversed(PATCHES):
        git_apply(tmp_path, "--check", "-R", "--unidiff-zero", patch, ok=False)
        git_apply(tmp_path, patch)
        git_apply(tmp_path, "--check", "-R", "--unidiff-zero", patch)
    for path, text in before.items():
        blocks = ["\n".join([*added(patch)[path], ""]) for patch in reversed(PATCHES) if path in added(patch)]
        assert (tmp_path / path).read_text() == text + "".join(blocks)

    git_apply(tmp_path, "-R", "--unidiff-zero", *PATCHES[::2])
    git_apply(tmp_path, "-R", "--unidiff-zero", *PATCHES[1::2])
    assert {path: (tmp_path / path).read_text() for path in paths} == before


def test_every_hook_is_there_and_none_is_imported_early(tree: Path) -> None:
    """Importing Megatron imports no hook (it may need a module that is still being imported); `enable` has nothing left to do."""
    done = python(
        tree,
        "-c",
        "import sys, megatron.core, megatron.training.training, megatron.core.models.gpt.gpt_model as gpt\n"
        "print('in', megatron.core.__file__)\n"
        "print('imported', *sorted(m for m in sys.modules if m.startswith(('mhc_megatron.', 'mhc_kernels'))))\n"
        "import mhc_megatron.megatron_hooks as hooks\n"
        "print('missing', *(r.name for r in hooks.rebindings() if not r.is_applied()))\n"
        "found = [r.find()[2] for r in hooks.rebindings()]\n"
        "hooks.enable(); print('same', found == [r.find()[2] for r in hooks.rebindings()])\n"
        "hooks.disable(); print('kept', found == [r.find()[2] for r in hooks.rebindings()])\n"
        "from mhc_megatron.doctor.command import _hooks\n"
        "print('doctor', *sorted({finding.text for finding in _hooks()[1:]}))\n",
    )
    assert done.returncode == 0, done.stderr
    early = "config megatron_hooks megatron_hooks.active megatron_hooks.patched megatron_hooks.rebind"
    assert done.stdout.splitlines() == [
        f"in {tree}/megatron/core/__init__.py",
        " ".join(["imported", *(f"mhc_megatron.{name}" for name in early.split())]),
        "missing",
        "same True",
        "kept True",
        "doctor in this tree's source (patches/)",
    ]


def test_without_the_package(tmp_path: Path) -> None:
    """A patched tree says what to do on a machine where mhc-megatron is missing."""
    (tmp_path / "module.py").write_text("\n".join(added(PATCHES[0])["megatron/training/arguments.py"]))
    done = subprocess.run([sys.executable, "-I", "-S", tmp_path / "module.py"], capture_output=True, text=True)
    assert "# install mhc-megatron or take the patch back: its patches/README.md\n" in done.stderr
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'mhc_megatron'\n")


def train(tree: Path, folder: Path, *further: str, launcher: bool, **options: Any) -> list[tuple[str, str]]:
    """Losses of a job, as printed, by iteration, on the Megatron in ``tree``: under the launcher, or the script alone.

    options: of `command`.
    """
    run = command(folder, *further, **options)
    if not launcher:
        (folder / "cpu_host.py").write_text(CPU_HOST)
        module = run.index("-m", 3)
        run[module : run.index("--cpu") + 1] = [str(folder / "cpu_host.py")]
    done = python(tree, *run[1:])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    losses = re.findall(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+)", output)
    assert losses
    return losses


def test_trains_as_under_the_launcher(tree: Path, folder: Path) -> None:
    """Every seam at work: the launcher's run, continued without it from a checkpoint in its middle, to every printed digit."""
    job = ["--enable-mhc", "--mhc-init=paper", *PP2_VPP2, *RESHARDABLE, "--mhc-monitor-interval=4", "--train-iters=5"]
    theirs, ours = folder / "launcher", folder / "patched"
    expected = dict(train(SITE, folder, *job, f"--save={theirs}", "--save-interval=2", launcher=True, processes=2))
    (theirs / "latest_checkpointed_iteration.txt").write_text("2")
    resume = [f"--load={theirs}", "--use-checkpoint-args", f"--save={ours}", "--save-interval=5"]
    losses = dict(train(tree, folder, *job, *resume, launcher=False, processes=2))
    assert list(losses) == ["3", "4", "5"]
    del losses["4"]  # the second iteration after a start is logged as the average of the first two
    assert losses == {"3": expected["3"], "5": expected["5"]}
    assert (ours / "latest_checkpointed_iteration.txt").read_text() == "5"
    gains = [records.read(run).monitored for run in (theirs, ours)]
    assert [[record["iteration"] for record in run] for run in gains] == [[1, 4], [4]]
    assert gains[0][1:] == gains[1]


def test_stock_without_the_flag(tree: Path, folder: Path) -> None:
    job = ["--train-iters=3"]
    assert train(tree, folder, *job, launcher=False) == train(SITE, folder, *job, launcher=False)
