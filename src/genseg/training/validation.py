"""Validation during training: the fixed phrases, and their loss per band of timesteps."""

from __future__ import annotations

import pandas as pd
import torch

from genseg.artifacts.phrases import hash_unit
from genseg.params import Params
from genseg.training.data import PhraseData
from genseg.training.distributed import Ranks
from genseg.training.losses import Loss
from genseg.training.networks import Networks
from genseg.training.stages import Kind
from genseg.training.steps import mixed_precision, step_generator

BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Timestep bands of the validation loss, half-open."""


def validation_rows(phrases: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return `count` fixed rows of the validation split, chosen by hash."""
    val = phrases[phrases["split"] == "val"]
    keys = list(zip(val["narrative_id"], val["phrase_id"], strict=True))
    order = sorted(range(len(val)), key=lambda i: hash_unit(seed, "validate", *keys[i]))
    return val.iloc[sorted(order[:count])]


@torch.no_grad()
def validate(kind: Kind, loss: Loss, networks: Networks, data: PhraseData, params: Params, ranks: Ranks) -> dict[str, str]:
    """Return the mean loss of the validation rows as columns of the log: one per timestep band (label diffusion only) and
    their mean, `val_loss`.

    Every row has one fixed t and noise per band. The processes share the rows, and all make the same number of forward
    passes, because sharded weights are gathered by all processes together.

    Args:
        loss: the loss of the base training in every stage, so that its values are comparable.
        networks: the averaged networks.
    """
    networks.eval()
    size = params.train.micro_batch
    blocks = [list(range(low, min(low + size, len(data)))) for low in range(0, len(data), size)]
    columns: dict[str, str] = {}
    means = []
    for low, high in BANDS if kind == "gs" else BANDS[-1:]:
        losses = torch.zeros(len(data), device=ranks.device)
        for number in range(ranks.rank, len(blocks) + ranks.rank, ranks.size):
            rows = blocks[number % len(blocks)]
            batch = data.batch(rows, [False] * len(rows)).to(ranks.device)
            generators = [step_generator(params.seed, "validation", low, row) for row in rows]
            t = torch.cat([torch.randint(low, high, (1,), generator=generator) for generator in generators])
            noise = torch.stack([torch.randn(data.label_shape, generator=generator) for generator in generators])
            with mixed_precision(params.train, ranks.device):
                row_losses = loss(networks, batch, noise.to(ranks.device), t.to(ranks.device), None)
            if number < len(blocks):  # a surplus block only keeps the processes in step
                losses[rows] = row_losses.float()
        means.append(ranks.sum(losses).mean().item())
        if kind == "gs":
            columns[f"val_t{low}_{high - 1}"] = f"{means[-1]:.6f}"
    networks.train()
    return columns | {"val_loss": f"{sum(means) / len(means):.6f}"}
