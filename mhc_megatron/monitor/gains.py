"""The numbers of one monitored step, from the mappings of a sample of tokens.

``H_res[i, j]`` carries stream j into stream i, so the row sums of a matrix are the gains of what the streams receive (forward)
and its column sums those of what their gradients receive (backward).

* Gain magnitude (Amax, arXiv 2512.24880, section 3.1): of one token's matrix M, ``max_i |sum_j M[i, j]|`` forward and
  ``max_j |sum_i M[i, j]|`` backward. The same with ``min``: a maximum can't show a stream that fades (the paper's figure 8
  has column sums of 0.41).
* Single-layer gains are those of each sublayer's H_res (figures 3a and 7a), composite gains those of ``H_L ... H_l``, the map
  from the streams before sublayer l to the model's exit (Eq. 4; figures 3b and 7b); l = 1: the whole model.
* Products are taken token by token, and then the gains of the tokens averaged: the mean of the gains, never the gain of a mean
  matrix, in which tokens cancel each other. The tokens' extremes are beside the means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_megatron.monitor.records import numbers

Numbers = list[float | None]


def to_exit(res: Tensor) -> Tensor:
    """``H_L ... H_l`` for every l, token by token.

    Args:
        res: ``[L, T, n, n]``, H_res of L sublayers in their order, of T tokens.

    Returns:
        ``[L, T, n, n]``; ``[0]`` is the product of all.
    """
    product = torch.eye(res.shape[-1], dtype=res.dtype).expand(res.shape[1:])
    products = []
    for matrix in res.flip(0):
        product = product @ matrix
        products.append(product)
    return torch.stack(products[::-1])


def gains(matrices: Tensor) -> dict[str, dict[str, Numbers]]:
    """Gains of ``[L, T, n, n]``: ``{"forward" | "backward": {"max", "min", "highest", "lowest": L numbers}}``.

    max, min: the largest and smallest absolute row (column) sum of a token's matrix, mean over tokens. highest, lowest: the
    largest and smallest of all tokens.
    """
    result = {}
    for direction, axis in (("forward", -1), ("backward", -2)):
        sums = matrices.sum(axis).abs()  # [L, T, n]
        largest, smallest = sums.amax(-1), sums.amin(-1)
        result[direction] = {
            "max": numbers(largest.mean(-1)),
            "min": numbers(smallest.mean(-1)),
            "highest": numbers(largest.amax(-1)),
            "lowest": numbers(smallest.amin(-1)),
        }
    return result


def summarize(res: Tensor, post: Tensor, pre: Tensor, similarity: Tensor) -> dict[str, Any]:
    """All numbers of a step that can be written as JSON.

    Args:
        res ``[L, T, n, n]``, post and pre ``[L, T, n]``, similarity ``[L, T]``: of L sublayers in their order and T tokens, on
            the CPU; computed in float64.

    Returns:
        ``single``, ``composite``: `gains` of H_res and of `to_exit`.
        ``row_error``, ``column_error``: L numbers, ``max |sum - 1|`` of a token's H_res, mean over tokens.
        ``pre``, ``post``: ``{"mean", "std": L lists of n}``, a stream's mean and standard deviation over tokens.
        ``similarity``: L numbers, mean cosine of two streams before the sublayer, over pairs and tokens (null for n = 1).
        ``res_mean``: L matrices, mean H_res over tokens; ``composite_mean``: the same of the product of all.
        null stands for a number that is not finite.
    """
    res, post, pre, similarity = (t.double() for t in (res, post, pre, similarity))
    products = to_exit(res)
    return {
        "single": gains(res),
        "composite": gains(products),
        "row_error": numbers((res.sum(-1) - 1).abs().amax(-1).mean(-1)),
        "column_error": numbers((res.sum(-2) - 1).abs().amax(-1).mean(-1)),
        "pre": {"mean": numbers(pre.mean(1)), "std": numbers(pre.std(1, correction=0))},
        "post": {"mean": numbers(post.mean(1)), "std": numbers(post.std(1, correction=0))},
        "similarity": numbers(similarity.mean(1)),
        "res_mean": numbers(res.mean(1)),
        "composite_mean": numbers(products[0].mean(0)),
    }
