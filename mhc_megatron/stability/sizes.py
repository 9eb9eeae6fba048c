"""The experiment's models: deep and narrow, because a composite gain is a product over sublayers."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_megatron.quickstart.data import Text
from mhc_megatron.quickstart.jobs import data_arguments, host_arguments, transformer_implementation

# The paper's initialisation is random phi, alpha 0.01, zero biases: H_res of mHC then starts as the mean of all streams, that of
# HC (arXiv 2409.19606) as the identity. This package's default starts mHC near the identity as well: shown beside it.
MODES = {
    "residual": [],
    "hc": ["--enable-mhc", "--mhc-mode=hc", "--mhc-init=paper"],
    "mhc": ["--enable-mhc", "--mhc-init=paper"],
    "mhc-preserve": ["--enable-mhc", "--mhc-init=preserve"],
}
_POINTS = 60  # monitored steps of a run, about


@dataclass(frozen=True)
class Size:
    """A MoE (first layer dense, 4 experts, 2 of them active) and its training.

    layers: two sublayers each. lr: peak learning rate (cosine to a tenth of it).
    """

    layers: int
    hidden: int
    heads: int
    sequence: int
    batch: int
    iterations: int
    lr: float

    @property
    def interval(self) -> int:
        """Iterations between monitored steps: so that the last one is monitored, if a near number allows it."""
        least = max(1, self.iterations // _POINTS)
        return next((k for k in range(least, 2 * least + 1) if self.iterations % k == 0), least)

    def describe(self) -> str:
        """For a table's caption."""
        return (
            f"{self.layers} layers ({2 * self.layers} sublayers), hidden {self.hidden}, MoE of 4 experts, "
            f"{self.batch} sequences of {self.sequence} bytes a step, {self.iterations} steps, peak learning rate {self.lr:g}"
        )

    def arguments(self, text: Text, *, gpu: bool) -> list[str]:
        """Megatron's arguments, shared by all runs."""
        s = str(self.sequence)
        model = ["--num-layers", str(self.layers), "--hidden-size", str(self.hidden), "--seq-length", s]
        model += ["--num-attention-heads", str(self.heads), "--max-position-embeddings", s]
        model += ["--ffn-hidden-size", str(4 * self.hidden), "--moe-ffn-hidden-size", str(self.hidden)]
        model += [f"--moe-layer-freq=[0]+[1]*{self.layers - 1}"]
        training = ["--micro-batch-size", str(self.batch), "--global-batch-size", str(self.batch)]
        training += ["--lr", str(self.lr), "--min-lr", str(self.lr / 10), f"--train-iters={self.iterations}"]
        training += ["--lr-warmup-iters", str(max(1, self.iterations // 20))]
        training += [f"--eval-interval={max(1, self.iterations // 4)}"]
        grouped = gpu and transformer_implementation() == "transformer_engine"  # local modules have no grouped GEMM
        host = [*host_arguments(gpu), *(["--moe-grouped-gemm"] if grouped else [])]
        return [*model, *_SHARED, *training, *data_arguments(text), *host]


# A loss that is not finite is a result here, not a reason to stop.
_SHARED = """
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-2
--lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 1234
--log-interval 1 --eval-iters 8 --num-workers 0 --no-check-for-nan-in-loss-and-grad
""".split()

GPU = Size(layers=32, hidden=256, heads=4, sequence=512, batch=16, iterations=400, lr=4e-3)
CPU = Size(layers=12, hidden=64, heads=4, sequence=64, batch=8, iterations=200, lr=1e-2)
