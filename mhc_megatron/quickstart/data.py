"""Real text that every machine has: the Python standard library's sources, byte by byte, as Megatron's indexed dataset."""

from __future__ import annotations

import math
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

END_OF_DOCUMENT = 256
VOCABULARY = 257  # 256 bytes and the end of a document


@dataclass(frozen=True)
class Text:
    """An indexed dataset on disk and what is known of its text."""

    prefix: Path
    documents: int
    tokens: int
    unigram_entropy: float  # nats a token: the loss of a model that has learned the frequencies of bytes and no more


def prepare(folder: Path) -> Text:
    """Write ``folder/text.bin`` and ``.idx``, one document a module of the standard library (uint16 tokens).

    Raises:
        FileNotFoundError: if this Python comes without its library's sources.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(library.glob("*.py"))
    if not sources:
        raise FileNotFoundError(f"no Python sources in {library}: this Python comes without its library's sources")
    prefix = folder / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    counts: Counter[int] = Counter()
    for source in sources:
        document = [*source.read_bytes(), END_OF_DOCUMENT]
        counts.update(document)
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return Text(prefix, len(sources), total, entropy)
