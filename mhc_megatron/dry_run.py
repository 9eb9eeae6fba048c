"""Megatron's arguments and configuration of a launch, without its GPUs: for `plan`, and to check a command before it is sent.

`parse` runs Megatron's own parser, its argument validation and its TransformerConfig checks as rank 0 of a pretended
world. Nothing is built, no process group and no GPU is needed. What the checks ask of the machine is answered for one
that Megatron supports: Hopper's compute capability, and where Transformer Engine is not installed, a current version of
it. None of that stays after `parse`; the hooks of `mhc_megatron.enable` do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

# What the checks are told where the machine has none.
COMPUTE_CAPABILITY = (9, 0)
TRANSFORMER_ENGINE = "2.20.2"
# Fused operations of Transformer Engine that a TransformerConfig looks for by name; None where it is not installed.
_FUSED = {
    "megatron.core.transformer.moe.moe_utils": (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
    ),
    "megatron.core.models.common.embeddings.rope_utils": (
        "fused_apply_rotary_pos_emb",
        "fused_apply_rotary_pos_emb_thd",
    ),
}


class LaunchError(ValueError):
    """Megatron, or mHC, refuses these arguments."""


def parse(arguments: Sequence[str], world_size: int) -> tuple[argparse.Namespace, Any]:
    """What a launch script's arguments mean.

    Args:
        arguments: as on the command line, ``--enable-mhc`` and ``--mhc-*`` among them.
        world_size: the number of GPUs of the run.

    Returns:
        Megatron's arguments, validated, with ``padded_vocab_size``; and the TransformerConfig that Megatron makes of them, with
        what its training loop sets from them.

    Raises:
        LaunchError: with Megatron's message, for arguments that it, or mHC, refuses; and without a way to know the
        vocabulary's size.
    """
    from mhc_megatron.megatron_hooks import enable

    enable()
    from megatron.training import arguments as megatron_arguments

    with _pretended_machine(arguments, world_size) as printed:
        try:
            args = megatron_arguments.parse_args()
            megatron_arguments.validate_args(args)
            config = megatron_arguments.core_transformer_config_from_args(args)
        except SystemExit as stop:  # argparse has said what is wrong, or printed its help
            if not stop.code:
                print(printed.getvalue(), file=sys.__stdout__)
                raise
            raise LaunchError("Megatron's parser refuses these arguments (see above)") from None
        except (AssertionError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            raise LaunchError(str(error) or f"Megatron refuses these arguments: {_where(error)}") from error
    _set_vocabulary(args)
    return args, config


@contextlib.contextmanager
def _pretended_machine(arguments: Sequence[str], world_size: int) -> Iterator[io.StringIO]:
    import torch
    from megatron.core import utils

    version = utils.get_te_version()
    environment = {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    # Megatron asks for it with TP; the launch script sets it where it is due.
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(sys, "argv", [sys.argv[0], *arguments]))
        if not torch.cuda.is_available():
            properties = types.SimpleNamespace(major=COMPUTE_CAPABILITY[0], minor=COMPUTE_CAPABILITY[1])
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=COMPUTE_CAPABILITY))
        if version == utils.PkgVersion("0.0.0"):
            stack.enter_context(mock.patch.object(utils, "_te_version", utils.PkgVersion(TRANSFORMER_ENGINE)))
            for module, names in _FUSED.items():
                for name in names:
                    stack.enter_context(mock.patch(f"{module}.{name}"))
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # every argument, and choices made
        yield printed


def _where(error: BaseException) -> str:
    """The line of an assertion that has no message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    return f"{type(error).__name__} at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _set_vocabulary(args: argparse.Namespace) -> None:
    """``padded_vocab_size``, which Megatron computes when it has built the tokenizer."""
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    if getattr(args, "padded_vocab_size", None):
        return
    if not args.vocab_size:
        raise LaunchError(
            f"the vocabulary's size is not known: --tokenizer-type {args.tokenizer_type} has it in its files, which are "
            "not read here; add --vocab-size N (tokens, before padding) or --padded-vocab-size N"
        )
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args, logging_enabled=False)
