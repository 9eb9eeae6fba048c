"""python -m mhc_megatron <command>"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

_DESCRIPTION = "Manifold-Constrained Hyper-Connections for Megatron-Core"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mhc_megatron", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    pretrain = commands.add_parser(
        "pretrain",
        help="run a Megatron training script, unmodified, with the --enable-mhc flags",
        description="Run a Megatron training script with the --enable-mhc and --mhc-* flags; list them with "
        "`pretrain script.py --help`. Under torchrun: torchrun <options> -m mhc_megatron pretrain script.py <arguments>.",
    )
    pretrain.add_argument("--cpu", action="store_true", help="run Megatron on the CPU with gloo (see mhc_megatron.cpu)")
    pretrain.add_argument("script", help="the training script, e.g. Megatron-LM's pretrain_gpt.py")
    pretrain.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, and --enable-mhc")

    from mhc_megatron import check
    from mhc_megatron.doctor import command as doctor
    from mhc_megatron.monitor import report
    from mhc_megatron.plan import command as plan
    from mhc_megatron.quickstart import command as quickstart
    from mhc_megatron.stability import command as stability

    modules = {
        "quickstart": quickstart,
        "check": check,
        "plan": plan,
        "report": report,
        "stability": stability,
        "doctor": doctor,
    }
    for module in modules.values():
        module.add_parser(commands)
    # These take Megatron's arguments among their own, in whatever order; argparse.REMAINDER would stop at the first option.
    options, options_of_megatron = parser.parse_known_args(argv)
    if options.command in ("check", "plan"):
        options.arguments = options_of_megatron
    elif options_of_megatron:
        parser.error(f"unrecognized arguments: {' '.join(options_of_megatron)}")
    return _pretrain(options) if options.command == "pretrain" else modules[options.command].run(options)


def _pretrain(options: argparse.Namespace) -> int:
    if not os.path.isfile(options.script):
        print(f"mhc-megatron: no training script at {options.script}", file=sys.stderr)
        return 2
    # As for `python script.py`, and before Megatron is imported: a script in a Megatron-LM checkout means the megatron beside it,
    # not one that is pip-installed as well.
    sys.path.insert(0, os.path.dirname(os.path.realpath(options.script)))
    if options.cpu:
        from mhc_megatron import cpu

        cpu.install()
    from mhc_megatron.megatron_hooks import enable

    enable()
    sys.argv = [options.script, *options.arguments]
    runpy.run_path(options.script, run_name="__main__")
    if options.cpu:
        cpu.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
