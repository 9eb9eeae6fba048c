"""The doctor: its page on this machine, and that it notices what is broken."""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mhc_kernels import self_test
from mhc_megatron import megatron_hooks
from mhc_megatron.doctor import apex, command, communication
from mhc_megatron.megatron_hooks.rebind import Rebinding


def test_page() -> None:
    """As a user runs it: everything works here, every hook is listed, and nothing says whose machine it is."""
    done = subprocess.run(
        [sys.executable, "-m", "mhc_megatron", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "NCCL_SOCKET_IFNAME": "secret0", "WANDB_API_KEY": "secret1"},
    )
    page = done.stdout
    assert done.returncode == 0, page + done.stderr
    for section in ("Versions", "Machine", "Kernels", "Communication", "Data", "Hooks", "Result"):
        assert f"\n## {section}\n" in page
    for package in ("python", "torch", "triton", "transformer-engine", "apex", "megatron-core", "mhc-megatron"):
        assert f"\n- {package}: " in page
    for rebinding in megatron_hooks.rebindings():
        assert f"{rebinding.module}.{rebinding.name}: ok" in page
    assert "not checked: there is no CUDA GPU" in page
    assert "sum and ring exchange right" in page
    assert "checks passed" in page
    private = {socket.gethostname(), getpass.getuser(), os.getcwd(), "secret"} - {"localhost", "root"}
    assert not [word for word in private if word in page]


def problems(findings: list[command.Finding]) -> list[str]:
    return [f"{finding.name}: {finding.text}" for finding in findings if finding.passed is False]


_HELPERS_OF = """
import sys
import megatron.core.datasets as datasets
from mhc_megatron.doctor import tree
datasets.__path__ = sys.argv[1:]
print(*tree.dataset_helpers())
"""


def test_a_checkout_that_cannot_compile(tmp_path: Path) -> None:
    """A Megatron-LM checkout runs make when training starts; what it will lack there is said before."""
    tools = tmp_path / "bin"
    tools.mkdir()

    def said() -> str:
        run = [sys.executable, "-c", _HELPERS_OF, tmp_path]
        done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PATH": str(tools)})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    def tool(name: str, prints: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\necho {prints}\n")
        (tools / name).chmod(0o755)

    assert said() == "not compiled: install megatron-core again False"
    (tmp_path / "Makefile").touch()
    assert said().endswith(
        "it needs make, g++, a python3-config of this Python (there is none on PATH), pybind11 for the python3 on PATH False"
    )
    for name in ("make", "g++", "python3"):
        tool(name, "-I/include")
    tool("python3-config", ".of-another.so")
    assert said().endswith("it needs a python3-config of this Python (that on PATH makes .of-another.so files) False")
    tool("python3-config", sysconfig.get_config_var("EXT_SUFFIX"))
    assert said() == "not compiled yet: Megatron runs make when training starts True"


def test_missing_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Rebinding("megatron.training.training", "train_forever", lambda original: original)
    gone = Rebinding("megatron.no_such_module", "name", lambda original: original)
    monkeypatch.setattr(megatron_hooks, "rebindings", lambda: [moved, gone])
    first, second = problems(command._hooks())
    assert first.startswith(
        "megatron.training.training.train_forever: RuntimeError: mhc-megatron: megatron-core 0.19.2"
    )
    assert "ModuleNotFoundError" in second


def test_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A result that is off by one part in 10,000 is found, named, and fails the command."""
    right = self_test.boundary

    def wrong(*arguments, **settings):
        streams, u, post, res = right(*arguments, **settings)
        return streams, u * 1.0001, post, res

    monkeypatch.setattr(self_test, "boundary", wrong)
    monkeypatch.setattr(command, "_communication", list)
    assert command.run(argparse.Namespace(json=False)) == 1
    page = capsys.readouterr().out
    assert "- BROKEN: Kernels, reference, float32: " in page
    assert "too far off: u" in page


@pytest.fixture
def apex_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package apex comes from, if there is one."""
    for name in ("apex", *apex._EXTENSIONS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    return tmp_path


def test_apex_of_another_kind(apex_folder: Path) -> None:
    text = apex.apex()
    assert "NOT NVIDIA's" in text
    assert "pip uninstall apex" in text
    (apex_folder / "apex" / "__init__.py").unlink()  # Python imports a folder as well
    assert "NOT NVIDIA's" in apex.apex()


def test_nvidias_apex(apex_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in apex._NVIDIAS_OWN:
        (apex_folder / "apex" / name).mkdir()
    extensions = {name: apex_folder / f"{name}.py" for name in apex._EXTENSIONS}
    for path in extensions.values():
        path.write_text("")
    text = apex.apex()
    assert "NVIDIA's; " in text
    assert text.count(" loads") == len(extensions)
    assert "Megatron fails" not in text
    for name in extensions:
        monkeypatch.delitem(sys.modules, name)
    extensions["amp_C"].write_text(f"raise ImportError('{apex_folder}/amp_C.so: undefined symbol')")
    extensions["fused_layer_norm_cuda"].unlink()
    importlib.invalidate_caches()
    text = apex.apex()
    assert "fused_weight_gradient_mlp_cuda loads" in text
    assert "fused_layer_norm_cuda is missing" in text
    assert "amp_C does not load" in text
    assert "Megatron fails" in text
    assert str(apex_folder) not in text
    extensions["amp_C"].write_text("raise RuntimeError('no driver')")
    assert "amp_C does not load (RuntimeError)" in apex.apex()


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> tuple[str, str, bool]:
        raise OSError("no network")

    monkeypatch.setattr(communication, "exchange", fails)
    assert command.run(argparse.Namespace(json=True)) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == 1
    (broken,) = [finding for finding in report["findings"] if finding["passed"] is False]
    assert broken == {"section": "Communication", "name": "check", "text": "OSError: no network", "passed": False}
