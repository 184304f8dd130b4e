"""What every training loop shares: learning-rate schedule, checkpoints for exact resume, the log."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import Any, Literal

import torch

from genseg.artifacts.files import atomic_path
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError

KEEP = 2
"""Checkpoints kept: the newest and, should its disk block be bad, the one before."""


def lr_factor(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """Factor in (0, 1] on the learning rate of 0-based `step`: linear warm-up, then constant or a half cosine to 0."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_rng(seed: int, *ids: object) -> random.Random:
    """Randomness of one step: a function of the seed and the step, so a resumed run draws what the whole run would."""
    return random.Random(derive_seed(seed, *ids))


def step_generator(seed: int, *ids: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *ids))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-XXXXXXX.pt` atomically and remove all but the newest `KEEP`."""
    with atomic_path(folder / f"step-{step:07d}.pt") as temporary:
        torch.save({"step": step, **state}, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None; an unreadable one is named and passed over."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file raises anything from EOFError to RuntimeError
            print(f"{path}: unreadable checkpoint passed over ({' '.join(str(error).split())[:120]})", flush=True)
    return None


class TrainLog:
    """A CSV of losses that survives resume (rows after the resumed step are dropped) and is printed under `name`."""

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int, name: str) -> None:
        self.path, self.columns, self.name = path, columns, name
        rows: list[dict[str, str]] = []
        if resume_step and path.exists():
            with path.open(newline="") as handle:
                rows = [row for row in csv.DictReader(handle) if int(row["step"]) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: dict[str, Any], timing: str = "") -> None:
        """Append a row (reproducible figures only) and print it with `timing` (what differs from run to run)."""
        with self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)
        shown = "  ".join(f"{key} {value}" for key, value in row.items() if value != "")
        print(f"{self.name}: {shown}  {timing}".rstrip(), flush=True)


def check_finite(loss: torch.Tensor, step: int) -> None:
    """Stop before a bad step reaches the weights.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise UserError(
            f"step {step}: the loss is {loss.item()}; the last checkpoint is unharmed: lower train.optimizer.lr, "
            "or use train.precision bf16 or fp32, and run again"
        )
