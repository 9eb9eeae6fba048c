"""python -m mhc_megatron check: a launch's arguments, checked by Megatron itself, before a cluster is asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_megatron.doctor.tree import version
from mhc_megatron.dry_run import LaunchError, parse

if TYPE_CHECKING:
    from mhc_megatron.plan.run import Chunk, Run

# Optional packages, without which Megatron's tokenizers fail on an undefined name.
_TOKENIZER_PACKAGES = {
    "HuggingFaceTokenizer": "transformers",
    "SFTTokenizer": "transformers",
    "GPT2BPETokenizer": "transformers",
    "BertWordPieceLowerCase": "transformers",
    "BertWordPieceCase": "transformers",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
}


def add_parser(commands: Any) -> None:
    """Add `check` to the command line's sub-commands."""
    parser = commands.add_parser(
        "check",
        help="check the arguments of a launch with Megatron's own parser and validation; needs no GPU",
        description="Checks Megatron's arguments as a training script gets them: parser, validation, model configuration, "
        "layout, microbatches, process groups, data and tokenizer, and an mHC run's checkpoint. Starts nothing. Exit status 1 if "
        "something is wrong.",
        usage="%(prog)s --world-size N <Megatron's arguments>",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, required=True, help="GPUs of the run")


def run(options: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    warnings.simplefilter("ignore")  # of every optional package that Megatron does without
    for chatty in ("torch.utils.cpp_extension", "megatron.core.datasets"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):  # every argument's value, and Megatron's warnings
            args, config = parse(options.arguments, options.world_size)
        planned = _run(args, config, _microbatches(args, config))
        with _refusals("the layers can't be split over the pipeline"):
            stages = planned.chunks()
            _check_mtp(planned)
        slow = _slow(planned)
        _process_groups(args)
        _data(args)
        _tokenizer(args)
    except LaunchError as error:
        # The parser prints its whole usage, and last what is wrong.
        reasons = [line.partition(": error: ")[2] for line in told.getvalue().splitlines() if ": error: " in line]
        print(f"check: FAILED: {'; '.join(reasons) or error}", file=sys.stderr)
        return 1
    print(f"check: megatron-core {version()} accepts these arguments on {options.world_size} GPUs")
    print(_model(planned))
    if slow is not None:
        print(f"  mHC runs its slow reference: {slow}")
    print(f"  data-parallel {args.data_parallel_size}, {planned.microbatches} microbatches a step")
    for stage, chunks in enumerate(stages):
        print(f"  pipeline stage {stage}: layers {' | '.join(map(_layers, chunks))}")
    return 0


def _layers(chunk: Chunk) -> str:
    """From 1, as Megatron numbers them."""
    first, last = chunk.first_layer + 1, chunk.first_layer + chunk.layers
    return "none" if not chunk.layers else str(first) if first == last else f"{first}-{last}"


def _microbatches(args: Any, config: Any) -> int:
    """What Megatron's training loop and its pipeline schedules demand of their number."""
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % step:
        raise LaunchError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size x data-parallel size = "
            f"{args.micro_batch_size} x {args.data_parallel_size}"
        )
    microbatches, pipeline = args.global_batch_size // step, args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size:
        group = config.microbatch_group_size_per_vp_stage
        if group > microbatches or 0 < microbatches % group < pipeline:
            raise LaunchError(
                f"interleaved pipeline: {microbatches} microbatches can't run in groups of {group} over {pipeline} stages; make "
                f"--global-batch-size a multiple of {step * pipeline}"
            )
    return microbatches


def _process_groups(args: Any) -> None:
    """Megatron's own construction of every group, on processes that only pretend to be there."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.world_size)
    try:
        with _refusals("process groups"):
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
                order="tp-cp-ep-dp-pp" if not args.use_tp_pp_dp_mapping else "tp-cp-ep-pp-dp",
                create_gloo_process_groups=False,
            )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _data(args: Any) -> None:
    """That every dataset named on the command line is there (`--data-args-path` files are read by the training script)."""
    try:
        from megatron.core.datasets.indexed_dataset import _IndexReader, get_bin_path, get_idx_path
    except ImportError as error:  # it is not a public name
        raise LaunchError(f"data can't be checked on megatron-core {version()} ({error}); tested on 0.19.2") from error
    from megatron.core.datasets.utils import get_blend_from_list

    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        prefixes, _ = get_blend_from_list(getattr(args, flag)) or ([], None)
        for prefix in prefixes:
            name = f"--{flag.replace('_', '-')} {prefix}"
            for file in (get_bin_path(prefix), get_idx_path(prefix)):
                if not Path(file).is_file():
                    raise LaunchError(
                        f"{name}: there is no {file}; give the prefix of an indexed dataset's .bin and .idx files"
                    )
            with _refusals(f"{name}: not a whole indexed dataset, make it again"):
                _whole(_IndexReader(get_idx_path(prefix), multimodal=False), Path(get_bin_path(prefix)).stat().st_size)


def _whole(index: Any, size: int) -> None:
    """That the .bin file has all that its index says: Megatron notices only when it comes to what is missing."""
    if not len(index):
        raise ValueError("it has no documents")
    needed = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
    if size < needed:
        raise ValueError(f"the .bin file has {size} bytes, its index asks for {needed}")


def _tokenizer(args: Any) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    named = f"--tokenizer-type {args.tokenizer_type}, --tokenizer-model {args.tokenizer_model}"
    package = _TOKENIZER_PACKAGES.get(args.tokenizer_type)
    if package is not None and importlib.util.find_spec(package) is None:
        raise LaunchError(f"{named}: needs the Python package {package}: pip install {package}")
    with _refusals(named):
        tokenizer = build_tokenizer(args)
    if tokenizer.vocab_size > args.padded_vocab_size:
        raise LaunchError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of {args.padded_vocab_size}: raise "
            "--padded-vocab-size"
        )


def _run(args: Any, config: Any, microbatches: int) -> Run:
    """What the planner makes of it, for counts and layers: also of models whose memory it does not plan."""
    from mhc_megatron.arguments import config_from_args
    from mhc_megatron.plan.run import Run

    pattern = config.moe_layer_freq
    if config.num_moe_experts and not isinstance(pattern, int) and len(pattern) != config.num_layers:
        raise LaunchError(f"--moe-layer-freq has {len(pattern)} entries, the model {config.num_layers} layers")
    return Run(
        config=config,
        mhc=config_from_args(args),
        world_size=args.world_size,
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        microbatches=microbatches,
        vocabulary=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
        learned_positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
    )


def _check_mtp(run: Run) -> None:
    from mhc_megatron.pipeline.cut import check_mtp  # with Megatron, whose warnings are silent by now

    if run.mhc is not None:
        check_mtp(run.config)


def _slow(run: Run) -> str | None:
    """Why mHC would run without its kernels."""
    from mhc_megatron.residual.backend import why_reference

    with _refusals("mHC"):
        return None if run.mhc is None else why_reference(run.mhc, run.config)


def _model(run: Run) -> str:
    from mhc_megatron.plan.parameters import active_count, model_count

    whole, active = model_count(run), active_count(run)
    beside = " (beside its MTP layers)" if run.config.mtp_num_layers else ""
    return (
        f"  {run.config.num_layers} layers, {_short(whole.total)} parameters{beside}, {_short(active.total)} active a token, "
        f"{_short(whole.mhc)} of them mHC's"
    )


def _short(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


class _refusals(contextlib.AbstractContextManager[None]):  # noqa: N801
    """Turns what Megatron raises into a LaunchError that says what was looked at; silences what it prints."""

    def __init__(self, what: str):
        self.what = what
        self.silence = contextlib.redirect_stdout(io.StringIO())

    def __enter__(self) -> None:
        self.silence.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.silence.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, LaunchError):
            raise LaunchError(f"{self.what}: {error or type(error).__name__}") from error
