"""What a training step reads: rows of the phrase table as batches, and every random choice of the step.

Both are functions of the seed, the step and the place in the global batch, so a step is the same whichever process takes
which part of it, in whatever micro-batches, and a thread can prepare it ahead.
"""

from __future__ import annotations

import math
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
from genseg.training.loop import step_generator, step_rng

AHEAD = 2
"""Steps whose data are prepared while the device computes."""

Item = TypeVar("Item")
DrawT = Callable[[int, torch.Generator], torch.Tensor]


@dataclass
class Batch:
    """image [B, 4, h, w]; label: soft mask [B, 1, h, w] in [0, 1], or [B, 1, f h, f w] that a VAE of factor f is to encode;
    mask: soft mask [B, 1, S, S] at the size of BCE + Dice; texts: B embeddings."""

    image: torch.Tensor
    label: torch.Tensor
    mask: torch.Tensor
    texts: list[TextEmbedding]

    def to(self, device: torch.device) -> Batch:
        label = self.label.to(device)
        mask = label if self.mask is self.label else self.mask.to(device)
        return Batch(self.image.to(device), label, mask, self.texts)


class PhraseData:
    """Training rows: image latents from the store, labels reduced from the masks' codes, text from the store.

    Nothing is kept but the table and a bounded number of texts: image latents are slices of memory-mapped shards.

    Args:
        task_size: side of `Batch.mask`; None: that of the label.
        vae: what encodes the labels; None: they are the masks themselves.
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
        """(K, h, w) of the label's latent"""
        return (self._channels, *self.images[self.rows["image_id"].iloc[0]]["latent"].shape[-2:])

    def batch(self, indices: list[int], mirrored: list[bool]) -> Batch:
        """Rows `indices`; where `mirrored`, image latent and label are flipped left to right (the flip of a latent is
        nearly the latent of the flip: a convolutional VAE has no preferred side)."""
        images, labels, masks, texts = [], [], [], []
        for index, mirror in zip(indices, mirrored, strict=True):
            row = self.rows.iloc[index]
            truth = row_mask(row)
            image = self.images[row["image_id"]]["latent"].float()
            label = torch.from_numpy(area_reduce(truth, *(self._factor * side for side in image.shape[-2:])))[None]
            images.append(image.flip(-1) if mirror else image)
            labels.append(label.flip(-1) if mirror else label)
            if self.task_size is not None:
                mask = torch.from_numpy(area_reduce(truth, self.task_size, self.task_size))[None]
                masks.append(mask.flip(-1) if mirror else mask)
            texts.append(self.texts[row["phrase"]])
        label = torch.stack(labels)
        return Batch(torch.stack(images), label, torch.stack(masks) if masks else label, texts)


@dataclass
class MicroBatch:
    """b rows of a step and what was drawn for them."""

    batch: Batch
    noise: torch.Tensor
    """[b, K, h, w], standard normal."""
    t: torch.Tensor
    """[b] timesteps."""
    drop: torch.Tensor
    """[b] bool: rows whose text is replaced by the nulls."""


def micro_batches(data: PhraseData, train: Train, draw_t: DrawT, seed: int, step: int, places: range) -> list[MicroBatch]:
    """The micro-batches of `places` in the global batch of `step`.

    Everything is drawn for the whole global batch and then cut: a process that takes other places draws the same.

    Args:
        draw_t: (count, generator) -> timesteps [count].
    """
    rng, generator = step_rng(seed, "step", step), step_generator(seed, "noise", step)
    indices = step_indices(seed, step, train.batch, len(data))
    mirrored = [train.flip and rng.random() < 0.5 for _ in indices]
    drop = torch.tensor([rng.random() < train.p_drop for _ in indices])
    t = draw_t(train.batch, generator)
    noise = torch.randn((train.batch, *data.label_shape), generator=generator)
    cuts = [slice(low, min(low + train.micro_batch, places.stop)) for low in places[:: train.micro_batch]]
    return [MicroBatch(data.batch(indices[cut], mirrored[cut]), noise[cut], t[cut], drop[cut]) for cut in cuts]


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the rows in an epoch."""
    return np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count)


def step_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Rows of the global batch of `step`: the epochs' orders, one after the other."""
    orders: dict[int, np.ndarray] = {}
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, count)
        found.append(int(orders[epoch][place]))
    return found


def total_steps(train: Train, rows: int) -> int:
    """Steps before the stages."""
    return train.steps or math.ceil((train.epochs or 0) * rows / train.batch)


def prefetched(make: Callable[[int], Item], steps: range) -> Iterator[Item]:
    """`make(step)` for every step, in order, made up to `AHEAD` steps early by a thread; what it raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        waiting: deque[Future[Item]] = deque()
        try:
            for step in steps:
                waiting.append(thread.submit(make, step))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
