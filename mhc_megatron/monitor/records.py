"""mhc-monitor.jsonl: one JSON object a line, written while training, read by `report`.

A line is either ``{"run": {...}, "iteration": first}``, at each start, or a monitored step: ``iteration``, ``loss`` and
``grad_norm`` where known, ``tokens``, ``sublayers`` (``[layer from 1, "attention" | "mlp"]``) and what `gains.summarize`
returns. A run without mHC has losses only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "mhc-monitor.jsonl"
DIRECTIONS = ("forward", "backward")
Record = dict[str, Any]


def numbers(values: Any) -> Any:
    """A number, nested lists of numbers or a tensor, as numbers of 6 digits for JSON; null for what is not finite."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, list):
        return [numbers(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


class Writer:
    """Appends to ``folder/mhc-monitor.jsonl``; a restarted run goes on in the same file.

    Args:
        folder: made if it is missing.
        run: what is written at the start, ahead of the first record.
    """

    def __init__(self, folder: str | Path, run: Record):
        self.path = Path(folder) / FILE
        self._run: Record | None = run

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            OSError: if the file can't be written.
        """
        lines = [] if self._run is None else [{"run": self._run, "iteration": record["iteration"]}]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [*lines, record])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if _ends_within_a_line(file):
                text = "\n" + text  # killed while it wrote, or a full disk: that line stays unreadable, ours does not
            file.write(text.encode())
        self._run = None


def _ends_within_a_line(file: Any) -> bool:
    if file.seek(0, 2) == 0:
        return False
    file.seek(-1, 2)
    return file.read(1) != b"\n"


@dataclass
class Run:
    """A run's records by iteration, and what its last start said of it."""

    name: str
    run: Record = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    skipped: int = 0  # lines that are not JSON: a run killed while it wrote

    @property
    def monitored(self) -> list[Record]:
        """The records that have gains."""
        return [record for record in self.records.values() if "composite" in record]


def read(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder, or the file itself. What a restart has done again counts as it was done last.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no record.
    """
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no {FILE} in {folder}: it is written by runs with --enable-mhc and --mhc-monitor-dir, --save or --tensorboard-dir"
        )
    run = Run(name or path.resolve().parent.name)
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            run.skipped += bool(line)
            continue
        first = record["iteration"]
        if "run" in record:
            run.run = record["run"]
            run.records = {i: r for i, r in run.records.items() if i < first}
        else:
            run.records[first] = record
    if not run.records:
        raise ValueError(f"{path} has no record yet: none of its iterations was monitored")
    return run
