"""The planner against models that Megatron has built, and launches that Megatron refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mhc_megatron import MHCConfig
from mhc_megatron.__main__ import main
from mhc_megatron.dry_run import LaunchError, parse
from mhc_megatron.plan.block_length import choose_block_length
from mhc_megatron.plan.gpus import GPUS
from mhc_megatron.plan.memory import stage_memory, variant
from mhc_megatron.plan.order import Place
from mhc_megatron.plan.parameters import active_count, model_count, rank_count, static_memory
from mhc_megatron.plan.run import Run
from mhc_megatron.plan.traffic import added_seconds, boundary_bytes, chunk_flops, kernel_traffic
from mhc_megatron.residual.recompute import microbatches_in_flight
from tests import models
from tests.ranks import run_ranks
from tests.unit.test_plan_measured import benchmark_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30
MHC = MHCConfig()


def make_run(config: Any, mhc: MHCConfig | None = MHC, world_size: int = 1, **fields: Any) -> Run:
    settings: dict[str, Any] = {"sequence": 16, "micro_batch": 2, "microbatches": 4, "vocabulary": models.VOCABULARY}
    return Run(config, mhc, world_size, **(settings | fields))


# Parameters.

ODD: dict[str, dict[str, Any]] = {
    "dense": models.DENSE,
    "layer norm, grouped queries": {
        "normalization": "LayerNorm", "num_query_groups": 2, "qk_layernorm": True, "add_qkv_bias": True, "add_bias_linear": False,
    },
    "moe": models.MOE,
    "mla": models.MLA,
    "mla, qk norms": {**models.MLA, "qk_layernorm": True},
    "mla, queries in full": {**models.MLA, "q_lora_rank": None},
}  # fmt: skip


@pytest.mark.parametrize("mhc", [None, MHC, MHCConfig(num_streams=2, profile="deepseek-v4")])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.usefixtures("one_process")
def test_parameters_of_one_process(kind: str, mhc: MHCConfig | None) -> None:
    config = models.make_config(**ODD[kind])
    run = make_run(config, mhc)
    built = dict(models.build(config, mhc).named_parameters())
    own = sum(p.numel() for name, p in built.items() if "hyper_connection" in name)
    count = rank_count(run, run.chunks()[0])
    assert (count.total, count.mhc) == (sum(p.numel() for p in built.values()), own)
    assert model_count(run) == count
    # A token meets all but the embedding's table and the experts beyond the top k.
    routed = sum(p.numel() for name, p in built.items() if ".experts." in name)
    idle = routed - routed * config.moe_router_topk // config.num_moe_experts if routed else 0
    assert active_count(run).total == count.total - idle - built["embedding.word_embeddings.weight"].numel()


def _check_rank(settings: dict[str, Any], processes: int) -> None:
    """This rank's parameters, layers, buffers and optimizer states are those of the plan."""
    config = models.make_config(**models.MOE, **settings, bf16=True, params_dtype=torch.bfloat16)
    run = make_run(config, world_size=processes)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = run.chunks()[stage]
    vpp = config.virtual_pipeline_model_parallel_size
    built = [models.build(config, MHC, chunk.number if vpp else None) for chunk in chunks]
    for chunk, model in zip(chunks, built, strict=True):
        offset = get_transformer_layer_offset(config, vp_stage=chunk.number if vpp else None)
        assert chunk.layers == 0 or chunk.first_layer == offset
        assert (chunk.embedding, chunk.loss) == (model.pre_process, model.post_process)
    count = rank_count(run, chunks)
    assert count.total == sum(p.numel() for model in built for p in model.parameters())

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped: Any = [DistributedDataParallel(config, ddp, Float16Module(config, model)) for model in built]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, lr=1e-3), wrapped
    )
    optimizer.step()
    static = static_memory(run, count)
    parameters = sum(p.numel() * p.element_size() for model in wrapped for p in model.parameters())
    assert static.parameters == parameters
    gradients = sum(p.main_grad.numel() * p.main_grad.element_size() for model in wrapped for p in model.parameters())
    assert static.gradients == gradients
    held = 0
    for one in optimizer.chained_optimizers:
        for group in one.shard_fp32_from_float16_groups:
            held += sum(t.numel() * 4 for t in group)
        for state in one.optimizer.state.values():
            held += sum(t.numel() * 4 for t in state.values() if t.dim())
    # A shard ends where the buffer's share ends, not where a parameter does: ranks differ by a few values.
    assert static.optimizer == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}),
        (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
        (4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|tt|tt|L"}),
    ],
)
def test_rank_under_layouts(world: int, settings: dict[str, Any], tmp_path: Path, hooks: None) -> None:
    sizes = {name: value for name, value in settings.items() if name.endswith("parallel_size")}
    if "pipeline_model_parallel_size" in settings:
        settings = {**settings, "pipeline_dtype": torch.bfloat16, "batch_p2p_comm": False}
    run_ranks(_check_rank, world, tmp_path, sizes, settings=settings, processes=world)


# Activations and time.


def _pipeline_run(**settings: Any) -> Run:
    fields: dict[str, Any] = {"pipeline_model_parallel_size": 4, "pipeline_dtype": torch.float32, "num_layers": 16}
    config = models.make_config(**{**models.MOE, "moe_layer_freq": 1, **fields, **settings})
    return make_run(config, world_size=8, microbatches=16)


def test_stages_hold_what_is_in_flight() -> None:
    run = _pipeline_run()
    held = [stage_memory(run, stage) for stage in range(4)]
    assert [stage.in_flight for stage in held] == [4, 3, 2, 1]
    assert held[0].activations > held[1].activations > held[2].activations
    interleaved = _pipeline_run(virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True)
    assert [stage_memory(interleaved, stage).in_flight for stage in range(4)] == [
        microbatches_in_flight(4, Place(4, 2, stage)) for stage in range(4)
    ]


def test_block_length() -> None:
    """As given, or chosen (tests/unit/test_block_length.py); recompute never needs more than all streams."""
    run = variant(_pipeline_run(), "recompute")
    given = dataclasses.replace(run, mhc=MHCConfig(recompute=True, recompute_sublayers=3))
    for stage in range(4):
        assert stage_memory(given, stage).block_length == 3
        memory = stage_memory(run, stage)
        assert memory.block_length == choose_block_length(run, stage).length
        assert memory.activations <= stage_memory(variant(run, "mhc"), stage).activations


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]},
    ],
)
def test_recompute_saves(settings: dict[str, Any]) -> None:
    for mode in ("residual", "mhc"):
        plain, changed = variant(_pipeline_run(), mode), variant(_pipeline_run(**settings), mode)
        assert stage_memory(changed, 0).activations < stage_memory(plain, 0).activations


def test_sequence_parallelism_divides_the_streams() -> None:
    whole = make_run(models.make_config(tensor_model_parallel_size=2), world_size=2)
    divided = make_run(models.make_config(tensor_model_parallel_size=2, sequence_parallel=True), world_size=2)
    assert boundary_bytes(whole)["wide"] == 2 * boundary_bytes(divided)["wide"] == 16 * 2 * 4 * 32 * 4
    assert (
        kernel_traffic(whole, whole.chunks()[0], None).moved
        == 2 * kernel_traffic(divided, divided.chunks()[0], None).moved
    )


# The command.

_SHARED = """
--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 2 --global-batch-size 64 --bf16
--use-distributed-optimizer --lr 1e-4 --train-iters 10 --mock-data --tokenizer-type NullTokenizer --vocab-size 1000
--hidden-size 512 --num-attention-heads 8 --ffn-hidden-size 2048 --pipeline-model-parallel-size 2
"""
LAUNCH = f"""
{_SHARED} --num-layers 6 --multi-latent-attention --kv-lora-rank 64 --num-experts 8 --moe-router-topk 2
--moe-ffn-hidden-size 256 --moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall
--moe-layer-freq ([0]+[1]*5) --moe-shared-expert-intermediate-size 512 --expert-model-parallel-size 2
""".split()
DENSE_LAUNCH = f"{_SHARED} --num-layers 8 --num-layers-per-virtual-pipeline-stage 2".split()


@pytest.fixture
def no_hooks_left() -> Any:
    yield
    import mhc_megatron

    mhc_megatron.disable()


@pytest.mark.usefixtures("no_hooks_left")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    vpp = ["--num-layers-per-virtual-pipeline-stage", "1"]
    assert (
        main(["plan", "--world-size", "8", "--json", str(written), *LAUNCH, *vpp, "--enable-mhc", "--mhc-recompute"])
        == 0
    )
    text = capsys.readouterr().out
    plan = json.loads(written.read_text())
    assert "Fits (recompute)" in text
    assert [stage["layers"] for stage in plan["stages"]] == [3, 3]
    assert plan["layout"]["microbatches"] == 8
    exposed = {row["kind"]: row["exposed"] for row in plan["pipeline"]}
    assert 0 < exposed["split"] < exposed["wide"] < exposed["wide-stock"]
    larger = plan["larger_groups"]
    assert f"With {larger['arguments']} (peak" in text
    assert larger["peak"] > plan["peak"]
    with_groups = {row["kind"]: row["exposed"] for row in larger["pipeline"]}
    assert with_groups["wide"] < exposed["wide"]
    for stage in plan["stages"]:
        modes = stage["modes"]
        assert modes["residual"]["total"] < modes["recompute"]["total"] < modes["mhc"]["total"]


FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("mhc", []),
        ("recompute", ["--mhc-recompute"]),
        ("mhc", FULL),
        ("mhc", ["--mhc-recompute", *FULL]),  # is off then
    ],
)
@pytest.mark.usefixtures("no_hooks_left")
def test_expected_step_without_a_pipeline(
    mode: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What mHC adds to a step is what its kernels take of every microbatch, less what they replace."""
    written = tmp_path / "plan.json"
    arguments = [*LAUNCH, "--pipeline-model-parallel-size", "1", "--enable-mhc", *flags]
    assert main(["plan", "--world-size", "8", "--json", str(written), *arguments]) == 0
    plan = json.loads(written.read_text())
    (stage,), (step,) = plan["stages"], plan["expected_step"]
    kernels, microbatches = stage["modes"][mode], plan["layout"]["microbatches"]
    assert step["residual"] == pytest.approx(microbatches * stage["compute_seconds"])
    assert step["kernels"] == pytest.approx(microbatches * (kernels["kernel_seconds"] - kernels["replaced_seconds"]))
    assert step["kernels"] > 0
    assert step["mhc"] - step["residual"] == pytest.approx(step["kernels"])
    name = "mHC with recompute" if mode == "recompute" else "mHC"
    expected = f"Expected step: residual {step['residual'] * 1e3:.1f} ms, {name} {step['mhc'] * 1e3:.1f} ms (+"
    assert expected in capsys.readouterr().out


@pytest.mark.usefixtures("no_hooks_left")
def test_hidden_transfers_slow_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More is exposed than what is waited for; of that alone, larger groups leave less than half over NVLink."""

    def exposed() -> tuple[dict[str, float], dict[str, float]]:
        written = tmp_path / "plan.json"
        vpp = [
            "--num-layers-per-virtual-pipeline-stage",
            "1",
            "--link-speeds",
            "300",
            "--enable-mhc",
            "--mhc-recompute",
        ]
        assert main(["plan", "--world-size", "8", "--json", str(written), *LAUNCH, *vpp]) == 0
        plan = json.loads(written.read_text())
        rows = plan["pipeline"], plan["larger_groups"]["pipeline"]
        smaller, larger = ({row["kind"]: row["exposed"] for row in of} for of in rows)
        return smaller, larger

    slowed = exposed()
    monkeypatch.setattr("mhc_megatron.plan.report.CONTENTION", 0.0)
    waited = exposed()
    for more, less in zip(slowed, waited, strict=True):
        assert all(more[kind] > less[kind] for kind in ("wide", "split"))
    smaller, larger = waited
    assert larger["wide"] < smaller["wide"] / 2


def test_kernels_of_the_forward_pass() -> None:
    """Of 14 and 24 units for four streams (kernels/README.md), 5 and 6 of which a residual model has as well."""
    run = benchmark_run("dense", "mhc", 2, {"sequence": 4096, "tokens": 4096})
    (chunk,) = run.chunks()[0]
    forward, backward = added_seconds(run, chunk, GPUS["h100"], None)
    kernels, replaced = kernel_traffic(run, [chunk], None).seconds(GPUS["h100"])
    assert forward == pytest.approx(kernels * 14 / 34 - replaced * 5 / 11)
    assert forward + backward == pytest.approx(kernels - replaced)


@pytest.mark.parametrize(
    ("comm", "node", "kind"),
    [
        ("auto", 8, "wide"),  # `--world-size 8`
        ("auto", 4, "split"),
        ("wide-stock", 8, "wide-stock"),
        ("split", 8, "split"),
    ],
)
@pytest.mark.usefixtures("no_hooks_left")
def test_expected_step_of_a_pipeline(
    comm: str, node: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its two parts make up the difference; the kernels' is at least what the slowest stage's take."""
    written = tmp_path / "plan.json"
    mhc = ["--enable-mhc", "--mhc-recompute", "--mhc-pipeline-comm", comm, "--link-speeds", "10,100"]
    mhc += ["--gpus-per-node", str(node)]
    assert main(["plan", "--world-size", "8", "--json", str(written), *LAUNCH, *mhc]) == 0
    plan = json.loads(written.read_text())
    modes = [stage["modes"]["recompute"] for stage in plan["stages"]]
    slowest = max(mode["kernel_seconds"] - mode["replaced_seconds"] for mode in modes)
    assert [step["link"] for step in plan["expected_step"]] == [10e9, 100e9]
    text = capsys.readouterr().out
    for step in plan["expected_step"]:
        steps = {row["kind"]: row["step"] for row in plan["pipeline"] if row["link"] == step["link"]}
        assert (step["residual"], step["mhc"]) == (steps["residual"], steps[kind])
        assert step["mhc"] - step["residual"] == pytest.approx(step["kernels"] + step["exposed"])
        assert step["kernels"] > plan["layout"]["microbatches"] * slowest
        assert f"Expected step at {step['link'] / 1e9:.0f} GB/s: residual {step['residual'] * 1e3:.1f} ms" in text


@pytest.mark.parametrize(
    ("world_size", "node", "stages_first", "leaves"),
    [
        (8, 8, False, False),
        (16, 8, False, True),
        (16, 8, True, False),  # TP 2 x PP 4 fill a node
        (24, 4, True, True),
        (48, 12, True, True),  # and do not divide this one
    ],
)
def test_transfers_leave_a_node(world_size: int, node: int, stages_first: bool, leaves: bool) -> None:
    config = models.make_config(
        pipeline_model_parallel_size=4,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_dtype=torch.float32,
    )
    run = make_run(config, world_size=world_size, gpus_per_node=node, stages_first=stages_first)
    assert run.leaves_node is leaves
    assert run.communication == ("split" if leaves else "wide")


@pytest.mark.usefixtures("no_hooks_left")
def test_command_compares_a_given_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    recompute = ["--enable-mhc", "--mhc-recompute", "--mhc-recompute-sublayers", "1"]
    assert main(["plan", "--world-size", "8", "--json", str(written), *LAUNCH, *recompute]) == 0
    text = capsys.readouterr().out
    for stage in json.loads(written.read_text())["stages"]:
        chosen, given = stage["automatic_block_length"], stage["modes"]["recompute"]
        assert (given["block_length"], given["activations"] > chosen["activations"]) == (1, True)
        lengths = (f"{of} {chosen[of]} ({chosen[of + '_activations'] / GIB:.2f} GiB)" for of in ("formula", "optimum"))
        peak = f"{chosen['activations'] / GIB:.2f} GiB"
        assert f"stage {stage['stage']}: L_r chosen {chosen['length']} ({peak}), {', '.join(lengths)}" in text
        assert (
            f"stage {stage['stage']}: without --mhc-recompute-sublayers {chosen['length']} would be chosen; 1 takes +"
            in text
        )


@pytest.mark.parametrize("launch", [LAUNCH, DENSE_LAUNCH])
@pytest.mark.usefixtures("no_hooks_left")
def test_command_says_what_to_change(launch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def planned(memory: float, *further: str) -> tuple[int, str]:
        sizes = ["--world-size", "8", "--gpu-memory", str(memory), "--reserve", "0"]
        return main(["plan", *sizes, *launch, "--enable-mhc", *further]), capsys.readouterr().out

    status, text = planned(80)
    needed = float(text.split("Fits (mhc): ")[1].split()[0])
    assert status == 0
    status, text = planned(needed - 0.1)
    assert status == 1
    assert f"DOES NOT FIT (mhc): {needed}" in text
    # What it offers does fit, when it is planned.
    offered = [line.split(maxsplit=2)[2] for line in text.splitlines() if "GiB  --" in line]
    assert len(offered) > 1
    for change in offered:
        status, text = planned(needed - 0.1, *change.split())
        assert status == 0, change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--global-batch-size", "63"], "63"),
        (["--enable-mhc", "--fp32-residual-connection"], "fp32-residual-connection"),
        (["--mhc-num-streams", "2"], "no effect without --enable-mhc"),
        (["--num-experts", "9"], "multiple of expert model parallel"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "x", "--vocab-size", "0"], "--vocab-size"),
        (["--enable-mhc", "--mhc-num-streams", "9", "--mhc-backend", "triton"], "1 to 8 streams, not n = 9"),
    ],
)
@pytest.mark.usefixtures("no_hooks_left")
def test_refused_launches(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--world-size", "8", *LAUNCH, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transformer-impl", "local", "--no-persist-layer-norm"], "--transformer-impl local is not covered"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid is not covered"),
        (["--optimizer", "muon"], "--optimizer muon is not covered"),
        (
            ["--enable-mhc", "--mhc-num-streams", "9"],
            "is not covered (the Triton kernels take 1 to 8 streams, not n = 9)",
        ),
        (
            ["--enable-mhc", "--mhc-backend", "reference"],
            "mHC on the slow reference is not covered (--mhc-backend reference)",
        ),
    ],
)
@pytest.mark.usefixtures("no_hooks_left")
def test_not_covered(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A status of its own: nothing is wrong with the launch."""
    assert main(["plan", "--world-size", "8", *LAUNCH, *arguments]) == 3
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("plan: ") == 1
    assert not told.out


@pytest.mark.usefixtures("no_hooks_left")
def test_parse_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import get_te_version

    before = (sys.argv[:], get_te_version(), moe_utils.fused_permute, torch.cuda.get_device_capability)
    args, config = parse(LAUNCH, 8)
    assert (args.world_size, args.padded_vocab_size, config.num_moe_experts) == (8, 1024, 8)
    with pytest.raises(LaunchError):
        parse([*LAUNCH, "--hidden-size", "511"], 8)
    assert before == (sys.argv, get_te_version(), moe_utils.fused_permute, torch.cuda.get_device_capability)


@pytest.mark.parametrize(
    "launch",
    [LAUNCH, [*DENSE_LAUNCH, *"--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2".split()]],
)
@pytest.mark.usefixtures("no_hooks_left")
def test_compute_agrees_with_megatron(launch: list[str]) -> None:
    """Megatron's own count of a step's operations, forward and backward, for a MoE model with MLA and a dense one."""
    from megatron.training.training import num_floating_point_operations

    args, config = parse(launch, 8)
    run = Run.from_arguments(args, config)
    forward = sum(chunk_flops(run, chunk)[0] for stage in run.chunks() for chunk in stage)
    forward *= args.tensor_model_parallel_size * args.context_parallel_size
    assert 3 * forward == pytest.approx(num_floating_point_operations(args, args.micro_batch_size), rel=0.02)
