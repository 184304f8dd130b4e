"""The data of a training step: batches of rows of the phrase table, and all random numbers of the step.

Both depend only on the seed, the step and the position in the global batch. A step is therefore the same for any number of
processes and any micro-batch size, and a thread can prepare it in advance.
"""

import random
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
from genseg.params.train import Train
from genseg.training.stages import total_steps
from genseg.training.steps import step_generator

AHEAD = 2
"""Number of steps whose data is prepared in advance, while the device computes."""
Item = TypeVar("Item")


@dataclass
class Batch:
    """B rows of the phrase table: image latents, labels and text embeddings."""

    image: torch.Tensor
    """[B, 4, h, w]."""
    label: torch.Tensor
    """Soft masks [B, 1, h, w] in [0, 1], or [B, 1, f h, f w] for a VAE of factor f to encode."""
    texts: list[TextEmbedding]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`. The texts stay where they are."""
        return Batch(self.image.to(device), self.label.to(device), self.texts)


@dataclass
class MicroBatch:
    """B rows and the random numbers drawn for them."""

    batch: Batch
    noise: torch.Tensor
    """Standard normal noise [B, K, h, w], of the shape of x_0."""
    t: torch.Tensor
    """Timesteps [B]."""
    drop: torch.Tensor | None
    """[B] bool, True for rows whose text is replaced by the learned null embeddings; None if there are none."""
    self_estimated: torch.Tensor | None = None
    """[B] bool, True for rows whose x_t is made from the network's own estimate of x_0; None if there are none."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch with its tensors on `device`."""
        drop = None if self.drop is None else self.drop.to(device)
        self_estimated = None if self.self_estimated is None else self.self_estimated.to(device)
        return MicroBatch(self.batch.to(device), self.noise.to(device), self.t.to(device), drop, self_estimated)


class PhraseData:
    """Rows of the phrase table as training data: image latents and text embeddings are read from the stores on demand; labels
    are reduced from the run-length encoded masks by area averaging. `vae` will encode the labels; it is None if the labels
    are the masks themselves."""

    def __init__(self, rows: pd.DataFrame, images: LatentStore, texts: Texts, vae: AutoencoderKL | None = None) -> None:
        self.rows, self.images, self.texts = rows.reset_index(drop=True), images, texts
        self._factor: int = 1 if vae is None else vae_factor(vae)
        self._channels: int = 1 if vae is None else vae.config.latent_channels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label_shape(self) -> tuple[int, int, int]:
        """Shape (K, h, w) of x_0."""
        return (self._channels, *self.images[self.rows["image_id"].iloc[0]]["latent"].shape[-2:])

    def batch(self, indices: list[int], mirrored: list[bool]) -> Batch:
        """Return the rows `indices`. Where `mirrored` is True, image latent and label are flipped left to right. (A flipped
        latent is nearly the latent of the flipped image, because a convolutional VAE has no preferred side.)"""
        images, labels, texts = [], [], []
        for index, mirror in zip(indices, mirrored, strict=True):
            row = self.rows.iloc[index]
            flipped = (-1,) if mirror else ()
            image = self.images[row["image_id"]]["latent"].float()
            label = area_reduce(row_mask(row), *(self._factor * side for side in image.shape[-2:]))
            images.append(image.flip(flipped))
            labels.append(torch.from_numpy(label)[None].flip(flipped))
            texts.append(self.texts[row["phrase"]])
        return Batch(torch.stack(images), torch.stack(labels), texts)


def micro_batches(data: PhraseData, train: Train, timesteps: int, seed: int, positions: range, step: int) -> list[MicroBatch]:
    """Return the micro-batches of `positions` in the global batch of `step`. `timesteps` is the number of diffusion timesteps.

    Every process draws the random numbers of the whole global batch and uses those of its own positions.
    """
    rng, generator = random.Random(derive_seed(seed, "step", step)), step_generator(seed, "noise", step)
    indices = step_indices(seed, step, train.batch, len(data))
    mirrored = [train.flip and rng.random() < 0.5 for _ in indices]
    drop = torch.tensor([rng.random() < train.cond_drop_prob for _ in indices])
    is_warmup = step < train.terminal_warmup * total_steps(train, len(data))
    t = draw_timesteps(train.batch, timesteps, 1.0 if is_warmup else train.terminal_timestep_prob, generator)
    noise = torch.randn((train.batch, *data.label_shape), generator=generator)
    chosen = torch.rand(train.batch, generator=generator) < train.self_estimate_prob
    self_estimated = chosen & (t < timesteps - 1) if train.self_estimate_prob else None
    cuts = [slice(low, min(low + train.micro_batch, positions.stop)) for low in positions[:: train.micro_batch]]
    return [
        MicroBatch(
            data.batch(indices[cut], mirrored[cut]),
            noise[cut],
            t[cut],
            drop[cut],
            None if self_estimated is None else self_estimated[cut],
        )
        for cut in cuts
    ]


def draw_timesteps(count: int, timesteps: int, terminal_timestep_prob: float, generator: torch.Generator) -> torch.Tensor:
    """Return t [count], uniform in 0..timesteps - 1, then replaced by timesteps - 1 with prob. `terminal_timestep_prob`."""
    t = torch.randint(0, timesteps, (count,), generator=generator)
    if terminal_timestep_prob:
        t[torch.rand(count, generator=generator) < terminal_timestep_prob] = timesteps - 1
    return t


def step_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Return the row indices, in 0..count - 1, of the global batch of `step`. Every epoch has its own random order."""
    positions = range(step * batch, (step + 1) * batch)
    epochs = range(positions[0] // count, positions[-1] // count + 1)
    orders = {epoch: np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count) for epoch in epochs}
    return [int(orders[position // count][position % count]) for position in positions]


def prefetched(make: Callable[[int], Item], steps: range) -> Iterator[Item]:
    """Yield `make(step)` for every step in order. A thread computes it up to `AHEAD` steps early; its errors are re-raised."""
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
