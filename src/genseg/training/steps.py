"""What a single training step needs: its learning rate, its random numbers, its precision, and a check of its loss."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any, Literal

import torch

from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.models.device import DTYPES
from genseg.params import Train


def lr_factor(step: int, steps: int, warmup: int, schedule: Literal["constant", "cosine"]) -> float:
    """Return the factor in (0, 1] on the learning rate of the 0-based `step`: linear warm-up, then constant or half a
    cosine down to 0."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return rise
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_rng(seed: int, *ids: object) -> random.Random:
    """Return the random numbers of one step. They depend on the seed and the ids only, so a resumed run draws the same."""
    return random.Random(derive_seed(seed, *ids))


def step_generator(seed: int, *ids: object) -> torch.Generator:
    """Return the torch generator of one step. It depends on the seed and the ids only, so a resumed run draws the same."""
    return torch.Generator().manual_seed(derive_seed(seed, *ids))


def mixed_precision(train: Train, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a forward pass: fp32 master weights, arithmetic in `train.precision`.

    Each weight is used once per forward pass, so its cast is not cached. (Under FSDP with gradient checkpointing, a cache
    would hold a whole copy of the weights in every process.)
    """
    if train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[train.precision], cache_enabled=False)


def check_finite(value: torch.Tensor, step: int, name: str = "loss") -> None:
    """Stop before a bad step reaches the weights.

    Raises:
        UserError: the value is NaN or infinite.
    """
    if not torch.isfinite(value):
        raise UserError(
            f"step {step}: the {name} is {value.item()}; the last checkpoint is unharmed: lower train.optimizer.lr, "
            "or use train.precision bf16 or fp32, and run again"
        )
