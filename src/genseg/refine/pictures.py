"""Pictures of what the refiner saw and did: one PNG a phrase, one row an iteration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts.files import atomic_path
from genseg.models.text_to_image import TextToImage
from genseg.models.vae import decode_latents
from genseg.refine.g4seg import Trace

TILE = 192


def write_trace(trace: Trace, model: TextToImage, folder: Path) -> Path:
    """First row: picture, coarse mask, refined mask. Then per iteration: P^k, discrepancy g, target Q, confusion area U,
    P^{k+1}, and the decoded mask-conditioned image, where one was generated."""
    rows = [[_tile(trace.picture), _tile(trace.coarse), _tile(trace.refined)]]
    for number, step in enumerate(trace.steps):
        maps = (step.before, step.discrepancy, step.target, step.confusion, step.after)
        side = round(len(step.before) ** 0.5)
        row = [_tile(value.float().view(side, side).cpu().numpy()) for value in maps]
        if trace.generated:
            decoded = decode_latents(model.vae, trace.generated[min(number, len(trace.generated) - 1)][None])[0]
            row.append(_tile(((decoded.float() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()))
        rows.append(row)
    width = max(map(len, rows))
    sheet = np.full((len(rows) * TILE, width * TILE, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, tile in enumerate(row):
            sheet[top * TILE : (top + 1) * TILE, left * TILE : (left + 1) * TILE] = tile
    path = folder / f"{'_'.join(map(str, trace.key))}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    return path


def _tile(values: NDArray) -> NDArray[np.uint8]:
    """A picture, mask or map in [0, 1] as TILE x TILE x 3."""
    if values.ndim == 2:
        values = np.repeat(np.rint(values.astype(np.float32) * 255).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(Image.fromarray(values).resize((TILE, TILE), Image.Resampling.NEAREST))
