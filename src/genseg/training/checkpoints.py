"""Checkpoint files: atomic writes, and reading of the newest intact one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from genseg.artifacts.files import atomic_path

KEEP = 2
"""Number of checkpoints to keep: the newest, and the previous one in case the newest cannot be read."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-XXXXXXX.pt` atomically and remove all but the newest `KEEP` checkpoints."""
    with atomic_path(folder / f"step-{step:07d}.pt") as temporary:
        torch.save({"step": step, **state}, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest readable checkpoint, or None. Unreadable ones are skipped with a message."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # processes share the pages
        except Exception as error:  # a truncated file raises anything from EOFError to RuntimeError
            print(f"{path}: skipped an unreadable checkpoint ({' '.join(str(error).split())[:120]})", flush=True)
    return None
