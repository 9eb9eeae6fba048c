"""Every kernel on small, ragged shapes, for the sanitizer.

compute-sanitizer --tool memcheck python kernels/benchmarks/small_chain.py [n ...]      (or racecheck)

Run it without the sanitizer first: compilation is slow inside.
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

TOKENS, WIDTH = 70, 48
STREAMS = (4, 3, 5, 8)


def main() -> None:
    for n in [int(n) for n in sys.argv[1:]] or STREAMS:
        rows = n * n + 2 * n
        x, y = (
            torch.randn(TOKENS, *shape, device="cuda").bfloat16().requires_grad_() for shape in ((n, WIDTH), (WIDTH,))
        )
        own = [torch.randn(*s, device="cuda").mul(0.1).requires_grad_() for s in ((rows, n * WIDTH), (3,), (rows,))]
        streams, u, post, res = connect(x, *own, backend="triton")
        norm = RMSNorm(torch.ones(WIDTH, device="cuda").bfloat16().requires_grad_(), 1e-5)
        streams, u, post, res = boundary(streams, res, post, u, None, *own, norm=norm, backend="triton")
        bias = y[0].detach()
        streams, u, post, res = boundary(streams, res, post, y, bias, *own, dropout_p=0.1, backend="triton")
        out = mix(streams, res, post, u, backend="triton")
        pre, post, res = mappings(out, *own, backend="triton")
        logits = torch.randn(TOKENS, n, n, device="cuda").requires_grad_()
        matrices = sinkhorn(logits, backend="triton")
        total = aggregate(out, pre, backend="triton").float().sum() + post.sum() + (res * matrices).sum()
        total.backward()
        recomputed(x, own, None if n > 4 else norm)
        rest, last = x.detach().flatten(-2).clone(), y.detach()
        add_output_(rest, post.detach(), last, backend="triton")
        output_gradients(rest, post.detach(), last, torch.empty_like(last), torch.empty_like(post), backend="triton")
        torch.cuda.synchronize()
        assert x.grad.isfinite().all()
        print(f"{n} streams: ran", flush=True)


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
