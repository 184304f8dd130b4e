"""What training minimises: the loss of either kind of model, and the parts of a training, of which each has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from genseg.diffusion.objectives import diffusion_loss, discriminative_loss, estimate_x_0, noised, target, task_loss
from genseg.diffusion.pipeline import DISCRIMINATIVE_TIMESTEP
from genseg.models.vae import encode_masks
from genseg.params import Params, Stage, Train
from genseg.training.data import Batch, total_steps

Kind = Literal["gs", "discriminative"]


@dataclass(frozen=True)
class Part:
    """Steps `first` to `first + steps - 1` of a training, with a learning-rate schedule of their own; stage: None for what
    comes before the stages."""

    first: int
    steps: int
    stage: Stage | None = None

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher for one sample: with the text and without."""
        return 2 if self.stage is not None and self.stage.objective == "distill" else 0


def training_parts(train: Train, rows: int, kind: Kind) -> list[Part]:
    """The parts in their order. The control has one, as long as all of them: the same budget."""
    parts = [Part(0, total_steps(train, rows))]
    for stage in train.stages:
        parts.append(Part(parts[-1].first + parts[-1].steps, stage.steps, stage))
    return parts if kind == "gs" else [Part(0, parts[-1].first + parts[-1].steps)]


class Objective:
    """Loss per sample of either kind of model, for given noise and timesteps.

    part: which part of the training is on; teacher: the frozen model of a part that distils.

    Args:
        vae: encodes the labels; None: x_0 is the mask itself.
    """

    def __init__(self, kind: Kind, params: Params, alphas_bar: torch.Tensor, vae: AutoencoderKL | None = None) -> None:
        self.kind, self.params, self.alphas_bar, self.vae = kind, params, alphas_bar, vae
        self.part: Part | None = None
        self.teacher: nn.Module | None = None

    def timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """t [count]: uniform, but the last one with probability `train.p_last`. Drawn ahead, so the same in all parts."""
        t = torch.randint(0, len(self.alphas_bar), (count,), generator=generator)
        p_last = self.params.train.p_last
        return t.masked_fill(torch.rand(count, generator=generator) < p_last, len(self.alphas_bar) - 1) if p_last else t

    def __call__(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss [B] of the part that is on; stages drop no text, and `task` takes the last timestep for every t."""
        stage = self.part.stage if self.part is not None else None
        if stage is None:
            return self.first_loss(networks, batch, noise, t, drop)
        train = self.params.train
        if stage.objective == "task":
            last = torch.full_like(t, len(self.alphas_bar) - 1)
            output = networks(noise, batch.image, last, batch.texts, None, train.size)
            return self._task_loss(output, noise, batch, last)
        assert self.teacher is not None
        assert stage.guidance is not None
        x_t = noised(self._x_0(batch), noise, self.alphas_bar, t)
        inputs = (x_t, batch.image, t, batch.texts)
        with torch.no_grad():
            conditional = self.teacher(*inputs, None, train.size)
            unconditional = self.teacher(*inputs, torch.ones_like(t, dtype=torch.bool), train.size)
            answer = unconditional + stage.guidance * (conditional - unconditional)
        return diffusion_loss(networks(*inputs, None, train.size), answer.float())

    def _x_0(self, batch: Batch) -> torch.Tensor:
        scale = self.params.train.label_scale
        if self.vae is None:
            return (2 * batch.label - 1) * scale
        with torch.autocast(batch.label.device.type, enabled=False):
            return encode_masks(self.vae, batch.label) * scale

    def _task_loss(self, output: torch.Tensor, x_t: torch.Tensor, batch: Batch, t: torch.Tensor) -> torch.Tensor:
        train = self.params.train
        estimate = estimate_x_0(train.prediction, output.float(), x_t, self.alphas_bar, t, train.label_scale)
        if train.task_size is not None:
            estimate = F.interpolate(estimate, size=batch.mask.shape[-2:], mode="bilinear")
        return task_loss(estimate, batch.mask, train.label_scale)

    def first_loss(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss [B] before the stages. noise: like x_0; t: [B]; drop: [B] bool. The control ignores noise and t and drops no
        text."""
        train = self.params.train
        if self.kind == "discriminative":
            last = torch.full_like(t, DISCRIMINATIVE_TIMESTEP)
            output = networks(torch.zeros_like(batch.label), batch.image, last, batch.texts, None, train.size)
            return discriminative_loss(output, batch.label)
        x_0 = self._x_0(batch)
        x_t = noised(x_0, noise, self.alphas_bar, t)
        output = networks(x_t, batch.image, t, batch.texts, drop, train.size)
        losses = diffusion_loss(output, target(train.prediction, x_0, noise, self.alphas_bar, t, train.label_scale))
        if train.task_weight:
            losses = losses + train.task_weight * self._task_loss(output, x_t, batch, t)
        return losses
