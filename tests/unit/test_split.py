"""Split pipeline transfers: their numbers, their order, what comes of what they can't do. Across stages: tests/distributed."""

from __future__ import annotations

import re
import weakref
from collections import deque
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_kernels import reference
from mhc_megatron import MHCConfig
from mhc_megatron.pipeline import split
from mhc_megatron.pipeline.communicator import StreamsCommunicator
from mhc_megatron.pipeline.links import Arrival, _settings
from mhc_megatron.pipeline.passes import Plan
from mhc_megatron.pipeline.sends import Sends
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.state import PipelineState, _report, choose, communication, share_pipeline, splits
from tests import models

N, C, TOKENS = 4, 32, (6, 2)

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


class Done:
    def wait(self) -> None: ...


class Loop(SideChannel):
    """Both ends of a link in one process."""

    def __init__(self) -> None:
        self._gradients: deque[Tensor] = deque()
        self.sent: Tensor | None = None

    def send_streams(self, tensor: Tensor) -> None:
        self.sent = tensor

    def arrival(self) -> Arrival:
        assert self.sent is not None
        return Arrival(self.sent, Done())

    def gradient(self) -> Arrival:
        return Arrival(self._gradients.popleft(), Done())


def over_the_boundary(values: dict[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Streams after a stage boundary crossed by split transfers, and the gradients of what went in."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    state = PipelineState(N, split=True)
    state.channel = loop = Loop()
    u = leaves["y"].detach()
    post, departure = split.depart(state, leaves["x"], leaves["res"], leaves["post"], u, None, "reference")
    packed = split.pack(leaves["y"], None, 0.0, post, departure)
    received = packed.detach().clone().requires_grad_()
    split.accompany(received, loop.arrival())
    streams = split.arrive(received, state, "reference")
    streams.backward(gradient)
    returned = received.grad
    assert returned is not None
    split.accompany(returned, loop.gradient())
    packed.backward(returned)
    return streams.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_boundary_equals_float64(dtype: torch.dtype, bound: float) -> None:
    """bf16: x' is rounded twice (H_res @ x, then the sum), where a mix rounds it once."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*TOKENS, *shape, generator=generator)

    values = {"x": draw(N * C).to(dtype), "y": draw(C).to(dtype), "post": draw(N), "res": draw(N, N).softmax(-1)}
    gradient = draw(N * C).to(dtype)
    streams, gradients = over_the_boundary(values, gradient)

    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    expected = reference.mix(exact["x"].unflatten(-1, (N, C)), exact["res"], exact["post"], exact["y"]).flatten(-2)
    expected.backward(gradient.double())
    assert streams.dtype == dtype
    for name, ours, theirs in [("x'", streams, expected), *((k, gradients[k], exact[k].grad) for k in values)]:
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mappings_keep_their_bits(dtype: torch.dtype) -> None:
    """Any 32 bits, those of NaNs too: they travel as numbers of the streams' dtype."""
    y = torch.randn(*TOKENS, C).to(dtype)
    post = torch.randint(-(2**31), 2**31 - 1, (*TOKENS, N), dtype=torch.int32).view(torch.float32)
    packed = split._join(y, post)
    assert packed.shape == (*TOKENS, C + split.columns(N, dtype))
    assert packed.dtype == dtype
    y_there, post_there = split._part(packed.clone(), N)
    assert torch.equal(y_there, y)
    assert torch.equal(post_there.view(torch.int32), post.view(torch.int32))


def test_streams_take_no_second_tensor() -> None:
    state = PipelineState(N, split=True)
    state.channel = Loop()
    packed = split._join(torch.ones(*TOKENS, C), torch.ones(*TOKENS, N)).requires_grad_()
    buffer = torch.zeros(*TOKENS, N * C)
    split.accompany(packed, Arrival(buffer, Done()))
    streams = split.arrive(packed, state, "reference")
    assert streams.data_ptr() == buffer.data_ptr()
    assert (streams == 1).all()


def test_the_streams_gradient_goes_with_the_backward() -> None:
    """The schedule keeps its own tensor until the next one has come."""
    state = PipelineState(N, split=True)
    state.channel = Loop()
    x, y = torch.randn(*TOKENS, N * C).requires_grad_(), torch.randn(*TOKENS, C).requires_grad_()
    res, post = torch.rand(*TOKENS, N, N), torch.rand(*TOKENS, N)
    packed = split.pack(y, None, 0.0, *split.depart(state, x, res, post, y.detach(), None, "reference"))
    gradient, of_streams = torch.ones_like(packed), torch.ones(*TOKENS, N * C)
    split.accompany(gradient, Arrival(of_streams, Done()))
    alive = weakref.ref(of_streams)
    del of_streams
    packed.backward(gradient)
    assert x.grad is not None
    assert alive() is None


def test_what_came_alone_is_no_boundary() -> None:
    with pytest.raises(RuntimeError, match=r"a tensor 40 wide.*mhc_megatron.enable\(\)"):
        split.arrive(torch.zeros(*TOKENS, 40), PipelineState(N, split=True), "reference")


def test_output_has_the_dtype_of_the_streams() -> None:
    """Under autocast a sublayer returns another one; what the schedule receives is as wide as pipeline_dtype makes it."""
    state = PipelineState(N, split=True)
    state.channel = Loop()
    x, y = torch.randn(*TOKENS, N * C), torch.randn(*TOKENS, C).bfloat16().requires_grad_()
    res, post = torch.rand(*TOKENS, N, N), torch.rand(*TOKENS, N)
    packed = split.pack(y, None, 0.0, *split.depart(state, x, res, post, x[..., :C], None, "reference"))
    assert packed.dtype == torch.float32
    assert torch.equal(split._part(packed, N)[0], y.float())
    gradient = torch.ones_like(packed)
    split.accompany(gradient, Arrival(torch.zeros_like(x), Done()))
    packed.backward(gradient)
    assert y.grad.dtype == torch.bfloat16
    assert (y.grad == 1).all()


@pytest.mark.parametrize("split_transfers", [False, True])
def test_another_pipeline_dtype_is_an_error(split_transfers: bool) -> None:
    """NCCL would not tell: it counts bytes, and waits."""
    communicator = StreamsCommunicator.__new__(StreamsCommunicator)
    communicator.config = models.make_config(pipeline_dtype=torch.bfloat16)
    state = PipelineState(N, split_transfers)
    with pytest.raises(RuntimeError, match=r"sends torch.float32, .* receives torch.bfloat16: set pipeline_dtype"):
        communicator._exchange(state, Any, torch.zeros(*TOKENS, N * C), None, False, False, None, True)


@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs a PyTorch with NCCL")
def test_links_have_the_settings_of_the_pipeline_group() -> None:
    theirs = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    theirs.config.max_ctas, theirs._timeout = 4, timedelta(seconds=77)
    settings = _settings(theirs, ahead=True)
    options = settings["pg_options"]
    assert options is not theirs  # new_group writes the group's name on it
    assert (options.config.max_ctas, options.is_high_priority_stream) == (4, True)
    assert settings["timeout"] == options._timeout == theirs._timeout
    unset = dist.ProcessGroupNCCL.Options()
    made = [_settings(unset, ahead)["pg_options"].config.max_ctas for ahead in (True, False)]
    assert made == [8, unset.config.max_ctas]
    assert unset.config.max_ctas < 0


def test_streams_without_a_schedule_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"needs mhc_megatron.enable\(\) before training starts"):
        split.departs(PipelineState(N, split=True))


def test_a_gradient_without_a_send_is_an_error() -> None:
    loop = Loop()
    with pytest.raises(RuntimeError, match=r"0 gradients of streams .* --mhc-pipeline-comm wide"):
        loop.send_gradient()


def test_what_is_sent_is_kept_until_it_has_gone() -> None:
    gone = [False, False, True, False]
    tensor: Any = SimpleNamespace(is_cuda=True)
    sends = Sends()
    for number in range(4):
        work = SimpleNamespace(is_completed=lambda number=number: gone[number])
        sends.keep(work, tensor, more=number < 3)  # all of one pass
    sends.release()
    assert len(sends) == 4  # in order
    gone[0] = True
    assert len(sends) == 4  # not on its own: letting go of memory may wait for the GPU
    sends.release()
    assert len(sends) == 3


def test_sends_that_are_not_seen_to_complete_are_waited_for() -> None:
    """Of a host that is far ahead of its GPU."""
    waited: list[int] = []
    tensor: Any = SimpleNamespace(is_cuda=True)
    sends = Sends()
    # Of three passes, and the first of a fourth.
    for number, more in enumerate([True, False, False, True, False, True]):
        work = SimpleNamespace(is_completed=lambda: False, wait=lambda number=number: waited.append(number))
        sends.keep(work, tensor, more)
    sends.release()
    assert waited == [0, 1, 2]
    assert len(sends) == 3
    sends.release()
    assert len(sends) == 3


def test_passes_without_a_send_are_an_error() -> None:
    links: Any = None
    channel = SideChannel(links, Plan(early=0))
    for _ in range(2):
        assert channel.departs()
        channel.send_streams(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"2 streams where .* sends one; use --mhc-pipeline-comm wide"):
        channel.send_held()


def test_no_links_where_the_host_waits_for_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    config = models.make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    state = share_pipeline(config, MHCConfig(pipeline_comm="split"))
    assert (state.links, state.split) == (False, False)


@pytest.mark.parametrize(
    ("settings", "chosen", "says"),
    [
        ({}, True, "mHC: pipeline: split"),
        ({"pipeline_model_parallel_size": 1}, False, None),
        (
            FULL,
            False,
            "wide instead of split: recompute_granularity 'full' .* would send twice",
        ),
        (
            {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"},
            False,
            "wide instead of split: variable_seq_lengths",
        ),
        (
            {"pipeline_model_parallel_comm_backend": "ucc"},
            False,
            "wide instead of split: pipeline_model_parallel_comm_backend",
        ),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, True, "split"),
    ],
)
def test_choice(settings: dict[str, Any], chosen: bool, says: str | None, caplog: pytest.LogCaptureFixture) -> None:
    _report.cache_clear()
    stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
    config = models.make_config(**{**stages, **settings})
    assert splits(MHCConfig(pipeline_comm="split"), config) is chosen
    if says is not None:
        assert re.search(says, caplog.text), caplog.text
    assert not splits(MHCConfig(pipeline_comm="wide"), config)
    assert not splits(MHCConfig(pipeline_comm="auto"), config)


@pytest.mark.parametrize(
    ("transport", "comm", "expected", "says"),
    [
        ("auto", "wide", "nccl", None),
        ("nccl", "wide", "nccl", None),
        ("copy-engine", "wide", "copy-engine", None),
        ("copy-engine", "wide-stock", "copy-engine", "has no effect: the transfers are Megatron's own"),
    ],
)
def test_transport(
    transport: str, comm: str, expected: str, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    _report.cache_clear()
    config = models.make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    state = share_pipeline(config, MHCConfig(pipeline_comm=comm, pipeline_transport=transport))
    assert state.transport == expected
    assert ("--mhc-pipeline-transport copy-engine" in caplog.text) is (says is not None)
    assert says is None or says in caplog.text


@pytest.mark.parametrize(
    ("comm", "links", "split"),
    [("auto", True, False), ("wide", True, False), ("split", True, True), ("wide-stock", False, False)],
)
def test_links_are_asked_for(comm: str, links: bool, split: bool) -> None:
    config = models.make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    state = share_pipeline(config, MHCConfig(pipeline_comm=comm))
    assert (state.links, state.split) == (links, split)
    assert communication(MHCConfig(pipeline_comm=comm), config) == ("wide" if comm == "auto" else comm)


@pytest.mark.parametrize(
    ("settings", "leaves", "expected", "why"),
    [
        ({}, True, "split", "1F1B across nodes"),
        ({}, False, "wide", "one node"),
        ({}, None, "wide", "not known"),
        ({"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}, True, "wide", "interleaved"),
        (FULL, True, "wide", "recompute_granularity"),
    ],
)
def test_auto(settings: dict[str, Any], leaves: bool | None, expected: str, why: str) -> None:
    config = models.make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **settings)
    assert choose(config, leaves)[0] == expected
    assert why in choose(config, leaves)[1]
    assert communication(MHCConfig(), config, leaves) == expected


def test_auto_gives_a_reason_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    _report.cache_clear()
    monkeypatch.setattr("mhc_megatron.pipeline.state.leaves_node", lambda: True)
    stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
    config = models.make_config(**stages, variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
    assert not splits(MHCConfig(), config)
    assert "wide (auto), 4 streams" in caplog.text
    assert caplog.text.count("variable_seq_lengths") == 1


@pytest.mark.parametrize(
    ("settings", "streams", "expected"),
    [
        (FULL, 4, "wide"),
        ({"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}, 4, "wide-stock"),
        ({}, 1, "wide-stock"),
    ],
)
def test_split_can_not_be_had(settings: dict[str, Any], streams: int, expected: str) -> None:
    config = models.make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **settings)
    mhc_config = MHCConfig(pipeline_comm="split", num_streams=streams)
    assert communication(mhc_config, config) == expected
    state = share_pipeline(config, mhc_config)
    assert (state.split, state.links) == (False, expected == "wide")


@pytest.mark.parametrize(("stages", "streams"), [(1, 4), (2, 1)])
def test_no_links_for_nothing(stages: int, streams: int) -> None:
    config = models.make_config(pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32)
    state = share_pipeline(config, MHCConfig(pipeline_comm="split", num_streams=streams))
    assert (state.links, state.split) == (False, False)
