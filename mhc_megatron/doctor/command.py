"""The page: versions, GPUs, kernels against the reference, communication between two processes, data, hooks."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from mhc_megatron.doctor import machine, tree

if TYPE_CHECKING:
    from mhc_megatron.megatron_hooks.rebind import Rebinding


class Finding(NamedTuple):
    """A line of the page. passed: None for what is only stated."""

    section: str
    name: str
    text: str
    passed: bool | None = None


def add_parser(commands: Any) -> None:
    """Add the doctor to the command line's sub-commands."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation and print a page for a bug report",
        description="Versions, GPUs, the kernels against the float64 reference, communication between processes, what datasets "
        "need, and which hooks apply on this Megatron: the one in the current folder (a Megatron-LM checkout) if there is one. "
        "Prints no host name, path or user name. Exit status 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    warnings.simplefilter("ignore")  # of every optional package that Megatron does without
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    findings = examine()
    broken = [finding for finding in findings if finding.passed is False]
    if options.json:
        print(json.dumps({"findings": [f._asdict() for f in findings], "broken": len(broken)}, indent=2))
    else:
        print(page(findings))
    return 1 if broken else 0


def examine() -> list[Finding]:
    """Everything on the page. A check that raises is a finding, too."""
    found = [Finding("Versions", name, text) for name, text in machine.versions().items()]
    found += [Finding("Machine", name, text) for name, text in machine.hardware().items()]
    for section, check in (
        ("Kernels", _kernels),
        ("Communication", _communication),
        ("Data", _data),
        ("Hooks", _hooks),
    ):
        print(f"doctor: {section.lower()} ...", file=sys.stderr, flush=True)  # kernels take a minute to build on a GPU
        try:
            found += check()
        except Exception as error:
            found.append(Finding(section, "check", _one_line(error), False))
    return found


def page(findings: list[Finding]) -> str:
    """Markdown, readable as it is."""
    lines = ["# mhc-megatron doctor"]
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", f"## {section}", ""]
        mark = {None: "", True: "ok: ", False: "BROKEN: "}[finding.passed]
        lines.append(f"- {finding.name}: {mark}{finding.text}")
    broken = [finding for finding in findings if finding.passed is False]
    checked = sum(finding.passed is not None for finding in findings)
    lines += ["", "## Result", ""]
    lines += [f"- BROKEN: {f.section}, {f.name}: {f.text}" for f in broken] or [f"- all {checked} checks passed"]
    return "\n".join(lines)


def _kernels() -> list[Finding]:
    import torch

    from mhc_kernels.backend import why_not_triton
    from mhc_kernels.self_test import deviations

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    found = []
    if not gpu:
        found.append(
            Finding("Kernels", "Triton kernels", "not checked: there is no CUDA GPU; the reference is checked")
        )
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        backend, what = "reference", f"reference, {_name(dtype)}"
        if gpu:
            what = f"Triton kernels, {_name(dtype)}"
            if (reason := why_not_triton(4, 1280, dtype, device)) is not None:
                found.append(Finding("Kernels", what, reason, False))
                continue
            backend = "triton"
        results = deviations(device, dtype, backend=backend, tokens=1024 if gpu else 32, width=1280 if gpu else 64)
        worst = max(results, key=lambda d: d.error / d.bound if d.error == d.error else float("inf"))
        failed = ", ".join(d.name for d in results if not d.passed)
        text = f"{len(results)} results and gradients of a boundary against float64: {worst.name} is furthest off, by "
        text += f"{worst.error:.1e} (allowed: {worst.bound:.0e})" + (f"; too far off: {failed}" if failed else "")
        found.append(Finding("Kernels", what, text, not failed))
    return found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _communication() -> list[Finding]:
    from mhc_megatron.doctor.communication import exchange

    return [Finding("Communication", *exchange())]


def _data() -> list[Finding]:
    return [Finding("Data", "megatron.core.datasets.helpers_cpp", *tree.dataset_helpers())]


def _hooks() -> list[Finding]:
    from mhc_megatron.megatron_hooks import rebindings

    version = tree.version()
    supported = version.startswith("0.19.")
    text = f"{version} is supported" if supported else f"{version}: mhc-megatron supports 0.19"
    if not tree.is_installed_package():
        text += "; a source tree, before the installed package on sys.path"
    found = [Finding("Hooks", "megatron-core", text, supported)]
    for rebinding in rebindings():
        name = f"{rebinding.module}.{rebinding.name}"
        found.append(Finding("Hooks", name, *_resolves(rebinding)))
    return found


def _resolves(rebinding: Rebinding) -> tuple[str, bool]:
    try:
        in_source = rebinding.is_applied()
    except Exception as error:
        return _one_line(error), False
    return "in this tree's source (patches/)" if in_source else "found", True


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
