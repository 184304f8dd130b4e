"""Helpers of all training loops: learning rate, random numbers, precision, checks for NaN, and checkpoints."""

import contextlib
import math
from pathlib import Path
from typing import Any, Literal

import torch

from genseg.artifacts.files import atomic_path
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.models.device import DTYPES
from genseg.params.train import Train

KEEP = 2
"""Number of checkpoints to keep: the newest, and the previous one in case the newest cannot be read."""


def lr_factor(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """Return the learning-rate factor in (0, 1] of a 0-based step: linear warm-up times a constant 1 or half a cosine."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise if schedule == "constant" else rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_generator(seed: int, *ids: object) -> torch.Generator:
    """Return a torch generator that depends only on the seed and the ids, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, *ids))


def mixed_precision(train: Train, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a forward pass: fp32 master weights, arithmetic in `train.precision`. Casts of weights are not
    cached: each weight is used once per forward pass, and under FSDP with gradient checkpointing, the cache would hold a copy
    of all weights in every process."""
    if train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[train.precision], cache_enabled=False)


def check_finite(value: torch.Tensor, step: int, name: str = "loss") -> None:
    """Raise UserError if a value is NaN or infinite. Call this before the weights are updated."""
    if not torch.isfinite(value):
        raise UserError(
            f"step {step}: the {name} is {value.item()}; the last checkpoint is valid: lower train.optimizer.lr, "
            "or use train.precision bf16 or fp32, and run again"
        )


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-XXXXXXX.pt` atomically and remove all but the newest `KEEP` checkpoints."""
    with atomic_path(folder / f"step-{step:07d}.pt") as temporary:
        torch.save({"step": step, **state}, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest readable checkpoint, or None. A message is printed for each unreadable checkpoint."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mmap: processes share the memory
        except Exception as error:  # a truncated file raises anything from EOFError to RuntimeError
            print(f"{path}: skipped an unreadable checkpoint ({' '.join(str(error).split())[:120]})", flush=True)
    return None
