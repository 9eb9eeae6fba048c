"""Load the quickstart's checkpoint through Megatron and continue a prompt, byte by byte.

Run by the quickstart through ``python -m mhc_megatron pretrain`` with the training arguments, ``--load`` and ``--prompt``.
"""

from __future__ import annotations

import argparse

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.training import get_model

from mhc_megatron.quickstart.train import causal_mask


def add_sample_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("sample")
    group.add_argument("--prompt", default="import ")
    group.add_argument("--sample-bytes", type=int, default=240)
    group.add_argument("--temperature", type=float, default=0.6)
    return parser


@torch.no_grad()
def continue_text(model: torch.nn.Module, prompt: str, length: int, temperature: float, window: int) -> str:
    """``length`` bytes after the prompt, sampled from the model one by one.

    The window is the trained sequence length: the whole of it is computed for every byte, which for a model this small
    is faster than setting up an inference engine.
    """
    generator = torch.Generator().manual_seed(0)
    text = list(prompt.encode())
    for _ in range(length):
        context = text[-window:]
        ids = torch.zeros(1, window, dtype=torch.long, device="cuda")  # causal: what follows the context is not seen
        ids[0, : len(context)] = torch.tensor(context)
        logits = model(ids, torch.arange(window, device="cuda")[None], causal_mask())[0, len(context) - 1]
        probabilities = torch.softmax(logits[:256].float().cpu() / temperature, 0)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text).decode(errors="replace")


def main() -> None:
    args = parse_and_validate_args(extra_args_provider=add_sample_arguments)
    initialize_megatron()
    builder = GPTModelBuilder(gpt_config_from_args(args))

    def provider(pre_process: bool = True, post_process: bool = True, **_: object) -> torch.nn.Module:
        from megatron.core.process_groups_config import ProcessGroupCollection

        return builder.build_model(ProcessGroupCollection.use_mpu_process_groups(), pre_process, post_process)

    model = get_model(provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    model[0].eval()
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1, "sampling runs in one process"
    print("--- sample ---")
    print(continue_text(model[0], args.prompt, args.sample_bytes, args.temperature, args.seq_length))
    print("--- end of sample ---")


if __name__ == "__main__":
    main()
