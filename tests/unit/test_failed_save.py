"""What a save that fails says is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_megatron.megatron_hooks.failed_save import _note


@pytest.mark.parametrize(
    ("tracker", "folders", "says"),
    [
        ("20", ["iter_0000020", "iter_0000030"], "That of iteration 20 is whole and the one that is loaded: make room"),
        (None, ["iter_0000010"], "There is none before it: make room"),
        (
            "",
            ["iter_0000020", "iter_0000010"],
            "is empty: write the iteration of a whole one of iter_0000010, iter_0000020 into it",
        ),
    ],
)
def test_what_is_left(tracker: str | None, folders: list[str], says: str, tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    note = _note(30, tmp_path)
    assert says in note
    assert f"iteration 30 could not be saved to {tmp_path}" in note
