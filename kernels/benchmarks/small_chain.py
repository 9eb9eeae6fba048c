"""Every kernel on ragged shapes, for the sanitizer: a small one, and one with at least four turns of every pipelined loop (three
stages), where a copy could overtake what still reads its place.

compute-sanitizer --tool memcheck python kernels/benchmarks/small_chain.py [n[:dtype[:tokens]] ...]      (or racecheck)

n streams, of dtype bfloat16 where it says no other; tokens of the second shape, fewer for a quicker racecheck. That takes minutes
for each: a process for each is quickest. Run it without the sanitizer first: compilation is slow inside. (Without a GPU,
TRITON_INTERPRET=1 runs the small shape.)
"""

import sys

import torch

from mhc_kernels import (
    RMSNorm,
    add_output_,
    aggregate,
    boundary,
    connect,
    free_until_backward,
    mappings,
    mix,
    output_gradients,
    recompute,
    sinkhorn,
)

SMALL, LOOPS = (70, 48), (2000, 1552)
CHAINS = ("4", "4:float32", "3", "5", "8", "2")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    for given in sys.argv[1:] or CHAINS:
        n, dtype, tokens = (*given.split(":"), "", "")[:3]
        loops = (int(tokens or LOOPS[0]), LOOPS[1])
        for shape in (SMALL, loops) if DEVICE == "cuda" else (SMALL,):
            chain(int(n), *shape, getattr(torch, dtype or "bfloat16"))
            print(f"{n} streams, {shape[0]} x {shape[1]}, {dtype or 'bfloat16'}: ran", flush=True)


def chain(n: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    rows = n * n + 2 * n
    x, y = (random(tokens, *shape).to(dtype).requires_grad_() for shape in ((n, width), (width,)))
    own = [random(*shape).mul(0.1).requires_grad_() for shape in ((rows, n * width), (3,), (rows,))]
    streams, u, post, res = connect(x, *own, backend="triton")
    norm = RMSNorm(torch.ones(width, device=DEVICE, dtype=dtype).requires_grad_(), 1e-5)
    streams, u, post, res = boundary(streams, res, post, u, None, *own, norm=norm, backend="triton")
    bias = y[0].detach()
    streams, u, post, res = boundary(streams, res, post, y, bias, *own, dropout_p=0.1, backend="triton")
    out = mix(streams, res, post, u, backend="triton")
    pre, post, res = mappings(out, *own, backend="triton")
    matrices = sinkhorn(random(tokens, n, n).requires_grad_(), backend="triton")
    total = aggregate(out, pre, backend="triton").float().sum() + post.sum() + (res * matrices).sum()
    total.backward()
    recomputed(x, own, None if n > 4 else norm)
    rest, last = x.detach().flatten(-2).clone(), y.detach()
    add_output_(rest, post.detach(), last, backend="triton")
    output_gradients(rest, post.detach(), last, torch.empty_like(last), torch.empty_like(post), backend="triton")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert x.grad.isfinite().all()


def recomputed(x: torch.Tensor, own: list[torch.Tensor], norm: RMSNorm | None) -> None:
    """A block of three boundaries that keeps its first streams alone, and nothing of what its sublayers read."""
    streams, u, post, res = connect(x, *own, norm=norm, backend="triton")
    place = recompute(3)
    for _ in range(3):
        y = u.sin()
        assert free_until_backward(u, y)
        streams, u, post, res = boundary(
            streams, res, post, y, None, *own, norm=norm, recompute=place, backend="triton"
        )
        place = place.next()
    mix(streams, res, post, u, backend="triton").float().sum().backward()


if __name__ == "__main__":
    main()
