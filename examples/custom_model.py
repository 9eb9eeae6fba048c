"""Your own Megatron model with mHC: convert the spec, build the model, train. Runs on a GPU, or on a CPU without one.

python examples/custom_model.py
"""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    from mhc_megatron import cpu

    cpu.install()

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from mhc_megatron import MHCConfig, to_mhc_spec

VOCABULARY, LENGTH = 256, 64


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """No weight decay on mHC's phi, alpha and biases, as in the launcher; on the others the optimizer's."""
    own = [p for name, p in model.named_parameters() if ".hyper_connection." in name]
    others = [p for name, p in model.named_parameters() if ".hyper_connection." not in name]
    return [{"params": own, "weight_decay": 0.0}, {"params": others}]


def main() -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)

    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        add_bias_linear=False,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=128,
        moe_layer_freq=[0, 1, 1, 1],
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec = to_mhc_spec(spec, MHCConfig(num_streams=4))  # the one line
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").cuda()

    text = torch.tensor(list(Path(os.__file__).read_bytes()))
    positions = torch.arange(LENGTH, device="cuda").expand(8, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").triu(1)[None, None]
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3, weight_decay=0.1)
    for step in range(61):
        starts = torch.randint(0, len(text) - LENGTH - 1, (8,)).tolist()
        window = torch.stack([text[i : i + LENGTH + 1] for i in starts]).cuda()
        loss = model(window[:, :-1], positions, mask, labels=window[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
