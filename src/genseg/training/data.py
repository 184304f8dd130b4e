"""The data of a training step: rows of the phrase table as batches, and every random choice of the step.

Both depend only on the seed, the step and the position in the global batch. So a step is the same for any number of processes
and any micro-batch, and a thread can prepare it in advance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL

from genseg.artifacts.latents import LatentStore
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import area_reduce
from genseg.artifacts.seeds import derive_seed
from genseg.latents import Texts
from genseg.models.text import TextEmbedding
from genseg.models.vae import vae_factor
from genseg.params import Train
from genseg.training.steps import step_generator, step_rng

AHEAD = 2
"""Number of steps whose data are prepared in advance, while the device computes."""

Item = TypeVar("Item")


@dataclass
class Batch:
    """B training samples."""

    image: torch.Tensor
    """Image latents [B, 4, h, w]."""
    label: torch.Tensor
    """Soft masks [B, 1, h, w] in [0, 1], or [B, 1, f h, f w] for a VAE of factor f to encode."""
    mask: torch.Tensor
    """Soft masks [B, 1, S, S] in [0, 1] for BCE + Dice."""
    texts: list[TextEmbedding]
    """B text embeddings."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`. The texts stay where they are."""
        label = self.label.to(device)
        mask = label if self.mask is self.label else self.mask.to(device)
        return Batch(self.image.to(device), label, mask, self.texts)


class PhraseData:
    """Training rows: image latents and text embeddings from the stores, labels area-reduced from the masks' run lengths.

    Only the table and a limited number of texts are held in memory; image latents are slices of memory-mapped shards.

    Args:
        rows: rows of the phrase table.
        task_size: side of `Batch.mask`; None for that of the label.
        vae: encodes the labels; None if the labels are the masks themselves.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        images: LatentStore,
        texts: Texts,
        task_size: int | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        self.rows, self.images, self.texts, self.task_size = rows.reset_index(drop=True), images, texts, task_size
        self._factor: int = 1 if vae is None else vae_factor(vae)
        self._channels: int = 1 if vae is None else vae.config.latent_channels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label_shape(self) -> tuple[int, int, int]:
        """Shape (K, h, w) of x_0."""
        return (self._channels, *self.images[self.rows["image_id"].iloc[0]]["latent"].shape[-2:])

    def batch(self, indices: list[int], mirrored: list[bool]) -> Batch:
        """Return the rows `indices`. Where `mirrored` is true, image latent and masks are flipped left to right. (The flip of
        a latent is nearly the latent of the flipped image, because a convolutional VAE has no preferred side.)"""
        images, labels, masks, texts = [], [], [], []
        for index, mirror in zip(indices, mirrored, strict=True):
            row = self.rows.iloc[index]
            native_mask = row_mask(row)
            image = self.images[row["image_id"]]["latent"].float()
            label = torch.from_numpy(area_reduce(native_mask, *(self._factor * side for side in image.shape[-2:])))[None]
            images.append(image.flip(-1) if mirror else image)
            labels.append(label.flip(-1) if mirror else label)
            if self.task_size is not None:
                mask = torch.from_numpy(area_reduce(native_mask, self.task_size, self.task_size))[None]
                masks.append(mask.flip(-1) if mirror else mask)
            texts.append(self.texts[row["phrase"]])
        label = torch.stack(labels)
        return Batch(torch.stack(images), label, torch.stack(masks) if masks else label, texts)


@dataclass
class MicroBatch:
    """b rows of a step and the random numbers drawn for them."""

    batch: Batch
    noise: torch.Tensor
    """Standard normal noise [b, K, h, w]."""
    t: torch.Tensor
    """Timesteps [b]."""
    drop: torch.Tensor
    """[b] bool, rows whose text is replaced by the learned nulls."""


def micro_batches(data: PhraseData, train: Train, timesteps: int, seed: int, positions: range, step: int) -> list[MicroBatch]:
    """Return the micro-batches of `positions` in the global batch of `step`.

    All random numbers are drawn for the whole global batch and then cut, so every process draws the same.

    Args:
        timesteps: number of diffusion timesteps.
    """
    rng, generator = step_rng(seed, "step", step), step_generator(seed, "noise", step)
    indices = step_indices(seed, step, train.batch, len(data))
    mirrored = [train.flip and rng.random() < 0.5 for _ in indices]
    drop = torch.tensor([rng.random() < train.p_drop for _ in indices])
    t = draw_timesteps(train.batch, timesteps, train.p_last, generator)
    noise = torch.randn((train.batch, *data.label_shape), generator=generator)
    cuts = [slice(low, min(low + train.micro_batch, positions.stop)) for low in positions[:: train.micro_batch]]
    return [MicroBatch(data.batch(indices[cut], mirrored[cut]), noise[cut], t[cut], drop[cut]) for cut in cuts]


def draw_timesteps(count: int, timesteps: int, p_last: float, generator: torch.Generator) -> torch.Tensor:
    """Return t [count], uniform in 0 ... timesteps - 1, but the last timestep with probability `p_last`."""
    t = torch.randint(0, timesteps, (count,), generator=generator)
    return t.masked_fill(torch.rand(count, generator=generator) < p_last, timesteps - 1) if p_last else t


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of the rows in an epoch."""
    return np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count)


def step_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Return the rows of the global batch of `step`. The batches run through the epochs' orders one after the other."""
    orders: dict[int, np.ndarray] = {}
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, count)
        indices.append(int(orders[epoch][offset]))
    return indices


def prefetched(make: Callable[[int], Item], steps: range) -> Iterator[Item]:
    """Yield `make(step)` for every step in order. A thread computes it up to `AHEAD` steps early; its errors are raised
    here."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        pending: deque[Future[Item]] = deque()
        try:
            for step in steps:
                pending.append(thread.submit(make, step))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
