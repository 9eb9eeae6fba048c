"""Which tokens of a microbatch are sampled, and which of them a rank has.

The sample is chosen in the whole microbatch, so every layout takes the very tokens that one process takes, under the same
numbers: number k of T is the token at position ``(2k + 1) S / (2T)`` of the S of a sequence, in sequence ``k mod b``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """This rank's part of every sequence: its ranks and sizes among context- and sequence-parallel ranks (0, 1 without)."""

    context_rank: int = 0
    contexts: int = 1
    sequence_rank: int = 0
    sequences: int = 1

    def tokens(self, count: int, length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sampled tokens that this rank has.

        Args:
            count: T, of all ranks; no more than a sequence has.
            length, batch: of this rank's streams.

        Returns:
            three int64 tensors, one entry a token: its number in the sample, its position and its sequence in the streams.
        """
        whole = length * self.contexts * self.sequences
        count = min(count, whole)
        number = torch.arange(count)
        position = (2 * number + 1) * whole // (2 * count)
        ours = torch.ones(count, dtype=torch.bool)
        if self.contexts > 1:
            # Megatron cuts a sequence into two chunks a rank, and rank r gets chunks r and 2 * contexts - 1 - r.
            size = whole // (2 * self.contexts)
            chunk, position = position // size, position % size
            second = chunk == 2 * self.contexts - 1 - self.context_rank
            ours &= (chunk == self.context_rank) | second
            position = position + size * second
        ours &= position // length == self.sequence_rank
        return number[ours], position[ours] % length, number[ours] % batch
