"""The planner against the GPU: peak memory of whole training steps, predicted and measured.

    python benchmarks/plan_check.py [--configurations NAME ...] [--steps 2] [--json FILE] [--cpu]

Every configuration is a list of Megatron arguments, parsed and planned as `python -m mhc_megatron plan` does it. Then a
process of its own builds the GPTModel, Megatron's data-parallel wrapper and distributed optimizer of these arguments on
one GPU and trains a few steps of two microbatches. Measured is torch.cuda.max_memory_allocated. A configuration that
fails, or does not fit the GPU, is reported and the next one goes on. --cpu: tiny shapes and Megatron's local modules; the
whole way is run, and no memory is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

GIB = 2**30
TIMEOUT = 300  # seconds of one configuration

SHARED = """
--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 4 --bf16 --use-distributed-optimizer
--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--hidden-dropout 0 --attention-dropout 0 --no-gradient-accumulation-fusion --no-persist-layer-norm --lr 1e-4 --train-iters 10
--mock-data --tokenizer-type NullTokenizer --transformer-impl transformer_engine
"""
# The paper's 27B layers with 16 of their experts: one GPU has the optimizer's states as well.
MOE = """
--num-layers 8 --hidden-size 2560 --num-attention-heads 32 --ffn-hidden-size 12288 --vocab-size 32000
--multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --no-rope-fusion
--num-experts 16 --moe-router-topk 6 --moe-ffn-hidden-size 1536 --moe-shared-expert-intermediate-size 3072
--moe-layer-freq ([0]+[1]*7) --moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall
--moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-load-balancing-type none
"""
DENSE = """
--num-layers 6 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8
--ffn-hidden-size 14336 --vocab-size 32000
"""
MHC, RECOMPUTE = "--enable-mhc", "--enable-mhc --mhc-recompute"
CONFIGURATIONS = {
    "moe residual": MOE,
    "moe mhc": MOE + MHC,
    "moe mhc recompute": MOE + RECOMPUTE,
    "moe mhc, 129280 tokens to choose from": f"{MOE} {MHC} --num-layers 6 --moe-layer-freq ([0]+[1]*5) --vocab-size 129280",
    "dense residual": DENSE,
    "dense mhc": DENSE + MHC,
    "dense mhc recompute": DENSE + RECOMPUTE,
    "moe mhc, moe_act and mla_up_proj": MOE
    + MHC
    + " --recompute-granularity selective --recompute-modules moe_act mla_up_proj",
    "moe mhc, full recompute": MOE
    + MHC
    + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}
# Later ones win: the same flags, small.
TINY = """
--seq-length 32 --max-position-embeddings 32 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --vocab-size 128
"""
TINY_MOE = """
--kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 --num-experts 4 --moe-router-topk 2
--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32
"""
TINY_DENSE = "--num-query-groups 2"


def arguments_of(name: str, cpu: bool) -> list[str]:
    """A configuration's Megatron arguments."""
    text = SHARED + CONFIGURATIONS[name]
    if cpu:
        text += TINY + (TINY_MOE if name.startswith("moe") else TINY_DENSE)
    return text.split()


def predict(arguments: list[str]) -> dict[str, Any]:
    """What the planner says, in GiB."""
    from mhc_megatron.dry_run import parse
    from mhc_megatron.plan.memory import stage_memory
    from mhc_megatron.plan.run import Run

    memory = stage_memory(Run.from_arguments(*parse(arguments, 1)), 0)
    return {
        "predicted_gib": memory.total / GIB,
        "static_gib": memory.static.total / GIB,
        "activations_gib": memory.activations / GIB,
        "block_length": memory.block_length,
    }


def train(arguments: list[str], steps: int) -> dict[str, Any]:
    """Build and train; the peak, and what is there between steps, in GiB (zero on the CPU)."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from mhc_megatron.dry_run import parse

    on_gpu = torch.cuda.is_available()
    args, config = parse(arguments, 1)
    config.finalize_model_grads_func = finalize_model_grads
    start_megatron()
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=on_gpu)
    model: Any = GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.seq_length,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    model = Float16Module(config, model.cuda() if on_gpu else model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32, use_distributed_optimizer=True
    )
    model = DistributedDataParallel(config, ddp, model)
    settings = OptimizerConfig(
        lr=args.lr, weight_decay=0.1, bf16=True, params_dtype=config.params_dtype, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, [model], get_standard_config_overrides(settings))
    config.grad_scale_func = optimizer.scale_loss
    schedule, losses = get_forward_backward_func(), []

    def forward_step(ids: Any, model: Any) -> Any:
        tokens = next(ids)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        # Transformer Engine knows that it is causal.
        mask = None if on_gpu else torch.ones(*[tokens.shape[1]] * 2, dtype=torch.bool).triu(1)[None, None]
        output = model(tokens, positions, mask, labels=tokens.roll(-1, 1))
        return output, lambda out: (out.float().mean(), {"loss": out.detach().float().mean()})

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    microbatches = args.global_batch_size // args.micro_batch_size
    for _ in range(steps):
        batch = [
            torch.randint(0, args.vocab_size, (args.micro_batch_size, args.seq_length), device="cuda")
            for _ in range(microbatches)
        ]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batch),
            model=[model],
            num_microbatches=microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        losses.append(sum(float(result["loss"]) for result in results) / microbatches)
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    between = torch.cuda.memory_allocated() if on_gpu else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.distributed.destroy_process_group()
    return {"measured_gib": peak / GIB, "between_gib": between / GIB, "parameters": parameters, "losses": losses}


def start_megatron() -> None:
    """Process groups of one process."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A configuration, in this process."""
    from mhc_megatron import cpu

    if options.cpu:
        cpu.install()
    import torch

    arguments = arguments_of(name, options.cpu)
    result: dict[str, Any] = {"name": name, **predict(arguments)}
    if options.cpu:
        # Modules that run there; the prediction above was of Transformer Engine's.
        arguments = [a for a in arguments if a not in ("--moe-grouped-gemm", "--moe-permute-fusion")]
        arguments += [*(" ".join(cpu.MEGATRON_ARGUMENTS).replace("=", " ").split()), "--use-cpu-initialization"]
        if "moe_act" in arguments:  # grouped GEMM only
            arguments.remove("moe_act")
    else:
        result["device"] = torch.cuda.get_device_name()
        there = torch.cuda.get_device_properties(0).total_memory / GIB
        if result["predicted_gib"] > 0.95 * there:
            return {**result, "failure": f"does not fit {there:.0f} GiB"}
    return {**result, **train(arguments, options.steps)}


def apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A configuration, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps), "--json", str(written)]
        try:
            done = subprocess.run(
                [*command, *(["--cpu"] if options.cpu else [])], capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return {"name": name, "failure": f"not done after {TIMEOUT} s"}
        if not written.exists():
            return {"name": name, "failure": f"exit code {done.returncode}", "log": (done.stdout + done.stderr)[-3000:]}
        return json.loads(written.read_text())


def show(result: dict[str, Any], seconds: float) -> None:
    """One line of the table."""
    if "measured_gib" not in result:
        print(
            f"{result['name']:36s} FAILED: {result['failure']}  ({seconds:.0f} s)\n{result.get('log', '')}", flush=True
        )
        return
    measured, predicted, between = result["measured_gib"], result["predicted_gib"], result["between_gib"]
    errors = "       -        -"
    if measured:
        above = measured - between  # of this, the activations
        errors = f"{(predicted / measured - 1) * 100:+6.1f} % {(result['activations_gib'] / above - 1) * 100:+6.1f} %"
    print(
        f"{result['name']:38s} {result['parameters'] / 1e9:7.3f} {result['static_gib']:7.2f} {between:8.2f} {predicted:10.2f} "
        f"{measured:9.2f} {errors}  {result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}  ({seconds:.0f} s)",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true", help="tiny, on the CPU: to try the script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        try:
            result = one(options.one, options)
        except Exception as error:
            result = {"name": options.one, "failure": repr(error)[:300], "log": traceback.format_exc()[-3000:]}
        options.json.write_text(json.dumps(result))
        return 0
    columns = f"{'params':>7s} {'static':>7s} {'between':>8s} {'predicted':>10s} {'measured':>9s}    error  activations"
    print(f"{'peak memory of one GPU, GiB':38s} {columns}", flush=True)
    results = []
    for name in options.configurations:
        started = time.monotonic()
        results.append(apart(name, options))
        show(results[-1], time.monotonic() - started)
        if options.json:
            options.json.write_text(json.dumps({"results": results}, indent=1))
    return 1 if any("failure" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
