"""The quickstart's picture: loss of residual, HC and mHC, side by side."""

from __future__ import annotations

from pathlib import Path

from mhc_megatron.quickstart.jobs import Losses

_LABELS = {"residual": "residual (stock Megatron)", "hc": "HC (unconstrained)", "mhc": "mHC"}


def draw(runs: dict[str, Losses], unigram_entropy: float, path: Path) -> None:
    """Write a PNG: training loss (thin, a batch each) and validation loss (marked) by iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (name, losses) in enumerate(runs.items()):
        color = f"C{i}"
        axes.plot(list(losses.training), list(losses.training.values()), color=color, lw=0.6, alpha=0.5)
        axes.plot(
            list(losses.validation),
            list(losses.validation.values()),
            color=color,
            marker="o",
            ms=4,
            label=_LABELS[name],
        )
    axes.axhline(unigram_entropy, color="grey", ls="--", lw=1, label="unigram entropy of the text")
    axes.set(
        xlabel="iteration",
        ylabel="loss (nats a byte)",
        title="Small MoE on the Python library's sources: thin training, marked validation",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
