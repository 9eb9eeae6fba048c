"""Stock Megatron on a CPU: `install` redirects what Megatron asks of CUDA, for this process.

For the quickstart, tests and debugging; not for speed, and never on unless asked for. Megatron-Core 0.19 trains on a CPU with
gloo in one process or several (TP, SP, EP, PP, interleaved PP, distributed optimizer, recompute, checkpoints) once
the calls below are redirected. What does NOT run: context parallelism (the local attention refuses it), Transformer
Engine, grouped GEMM, FP8, CUDA graphs.

What is redirected, and nothing else:

* ``device="cuda"``, ``.cuda()`` and ``.to("cuda")`` mean the CPU, and ``Tensor.type()`` says ``torch.cuda.*``, by a
  TorchFunctionMode that stays on for the process.
* ``torch.cuda``: current device, streams, events, synchronisation, random state, and (training) device count and
  properties.
* Megatron's random-state tracker works on the CPU generator.
* Five places in megatron-core that assume CUDA, Transformer Engine or apex: see `_patch_megatron`.
* For ``megatron.training.pretrain``: `_patch_training`.

Megatron needs the arguments `MEGATRON_ARGUMENTS` then: local modules, gloo, no fused kernels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import types
from typing import Any

MEGATRON_ARGUMENTS = (
    "--transformer-impl=local",
    "--distributed-backend=gloo",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--attention-softmax-in-fp32",
)

_installed = False


def install() -> None:
    """Redirect CUDA to the CPU for this process, before any model is built. Idempotent; there is no way back.

    Sets OMP_NUM_THREADS=1 (several ranks share few cores: spinning threads are 1000 times slower),
    TORCHDYNAMO_DISABLE=1 (Megatron's jit_fuser would compile for 20 s) and CUDA_DEVICE_MAX_CONNECTIONS=1
    (Megatron asks for it) unless they are set. Call it before torch is imported, or set them yourself.
    """
    global _installed
    if _installed:
        return
    for name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        os.environ.setdefault(name, "1")
    _patch_torch()
    _patch_megatron()
    _patch_training()
    _installed = True


def shut_down() -> None:
    """End the process groups. Left to the interpreter's exit, ranks were seen to abort at a run's end (exit code -6)."""
    import gc

    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()


def _patch_torch() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def is_cuda(device: Any) -> bool:
        return (isinstance(device, str) and device.startswith("cuda")) or (
            isinstance(device, torch.device) and device.type == "cuda"
        )

    class CudaToCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": cpu}
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
                args = (args[0], cpu, *args[2:])
            result = func(*args, **kwargs)
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                # The optimizer sorts parameters by names such as 'torch.cuda.FloatTensor'.
                return result.replace("torch.", "torch.cuda.", 1)
            return result

    class Stream:
        """Stands for a CUDA stream or event: everything on a CPU has happened when it is asked."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def wait_stream(self, *args: Any) -> None: ...

        wait_event = synchronize = wait = record = wait_stream

        def record_event(self, event: Any = None) -> Stream:
            return self

        def query(self) -> bool:
            return True

    def ignore(*args: Any, **kwargs: Any) -> None: ...

    stream = Stream()
    redirected: dict[str, Any] = {
        "current_device": lambda: cpu,
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": ignore,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)) and None,
        "manual_seed_all": ignore,
        "device_count": lambda: 1,
        "set_device": ignore,
        "get_device_properties": lambda *a: types.SimpleNamespace(
            name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1
        ),
    }
    for name, value in redirected.items():
        setattr(torch.cuda, name, value)
    # Its argument parser rejects a stand-in stream before a TorchFunctionMode sees the call.
    torch.Tensor.record_stream = ignore  # type: ignore[method-assign]
    CudaToCpu().__enter__()


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    random_: Any = random
    random_._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random_._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    if not random.HAVE_TE:
        # CheckpointWithoutOutput's default reads as "FP8 on" and then reaches for these Transformer Engine names.
        random_.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
        random_.fp8_autocast = random_.activation_recompute_forward = lambda **k: contextlib.nullcontext()
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())

    # Stock converts only tensors that are on a GPU, and its callers rely on the conversion.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )

    # The torch norm refuses sequence parallelism though all it lacks is the mark on its parameters.
    stock_new = WrappedTorchNorm.__new__

    def new_norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        without_sp = copy.copy(config)
        without_sp.sequence_parallel = False
        norm = stock_new(cls, without_sp, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new_norm)

    # Local-spec MLA passes k_channels and v_channels, which the local attention does not take.
    stock_attention_init = DotProductAttention.__init__

    def attention_init(
        self: Any, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kw: Any
    ) -> None:
        stock_attention_init(self, config, *args, **kw)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = attention_init

    # Its state handling expects Transformer Engine's or apex's Adam; torch's keeps `step` and needs no_grad.
    stock_set = DistributedOptimizer._set_main_param_and_optimizer_states
    stock_sharded = DistributedOptimizer.sharded_state_dict
    stock_load = DistributedOptimizer.load_state_dict

    def set_main(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        # The step came with the parameter groups; what stands here is this run's, from before loading.
        with torch.no_grad():
            return stock_set(self, parameter, {**tensors, "step": None})

    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return stock_sharded(self, model, is_loading, *args, **kwargs)

    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = stock_load(self, state_dict)
        # Stock gives every parameter the SAME step tensor; torch's Adam then counts each update once a parameter.
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main
    DistributedOptimizer.sharded_state_dict = sharded_state_dict


def _patch_training() -> None:
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    # These two assert a GPU or compile kernels.
    initialize.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    training.initialize_megatron = initialize.initialize_megatron
    training.set_jit_fusion_options = lambda *a, **k: None
