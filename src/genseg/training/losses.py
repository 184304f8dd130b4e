"""The training losses: label diffusion (Eq. 7), the discriminative control, and those of the stages.

Every loss is called as `loss(networks, batch, noise, t, drop)` and returns one value per sample [B]. noise: [B, K, h, w] like
x_0, standard normal; t: [B] timesteps; drop: [B] bool, samples whose text is replaced by the learned nulls, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from genseg.diffusion.objectives import diffusion_loss, discriminative_loss, estimate_x_0, noised, target, task_loss
from genseg.diffusion.pipeline import DISCRIMINATIVE_TIMESTEP
from genseg.models.vae import encode_masks
from genseg.params import Train
from genseg.training.data import Batch
from genseg.training.stages import Kind

Loss = Callable[[nn.Module, Batch, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def make_base_loss(kind: Kind, train: Train, alphas_bar: torch.Tensor, vae: AutoencoderKL | None = None) -> Loss:
    """Return the loss of the base training, before all stages. Validation always uses it."""
    return DiffusionLoss(train, alphas_bar, vae) if kind == "gs" else DiscriminativeLoss(train)


@dataclass(frozen=True, eq=False)
class DiffusionLoss:
    """Eq. 7 on noise, v or x_0, plus `train.task_weight` times BCE + Dice of the estimate of x_0.

    Args:
        alphas_bar: [T] noise schedule.
        vae: encodes the labels; None if x_0 is the mask itself.
    """

    train: Train
    alphas_bar: torch.Tensor
    vae: AutoencoderKL | None = None

    def __call__(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        train = self.train
        x_0 = encode_labels(batch.label, train.label_scale, self.vae)
        x_t = noised(x_0, noise, self.alphas_bar, t)
        output = networks(x_t, batch.image, t, batch.texts, drop, train.size)
        losses = diffusion_loss(output, target(train.prediction, x_0, noise, self.alphas_bar, t, train.label_scale))
        if train.task_weight:
            losses = losses + train.task_weight * mask_loss(train, self.alphas_bar, output, x_t, batch.mask, t)
        return losses


@dataclass(frozen=True, eq=False)
class DiscriminativeLoss:
    """BCE + Dice of the control's logits. Ignores noise and t, and drops no text."""

    train: Train

    def __call__(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        t = torch.full_like(t, DISCRIMINATIVE_TIMESTEP)
        logits = networks(torch.zeros_like(batch.label), batch.image, t, batch.texts, None, self.train.size)
        return discriminative_loss(logits, batch.label)


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """Squared difference from the guided output of a frozen teacher (Eq. 10), so that one forward pass replaces two (stage
    `distill`). Drops no text.

    Args:
        teacher: networks that are not trained.
        guidance: guidance scale w of the teacher.
        alphas_bar: [T] noise schedule.
        vae: encodes the labels; None if x_0 is the mask itself.
    """

    teacher: nn.Module
    guidance: float
    train: Train
    alphas_bar: torch.Tensor
    vae: AutoencoderKL | None = None

    def __call__(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        x_0 = encode_labels(batch.label, self.train.label_scale, self.vae)
        inputs = (noised(x_0, noise, self.alphas_bar, t), batch.image, t, batch.texts)
        with torch.no_grad():
            conditional = self.teacher(*inputs, None, self.train.size)
            unconditional = self.teacher(*inputs, torch.ones_like(t, dtype=torch.bool), self.train.size)
            guided = unconditional + self.guidance * (conditional - unconditional)
        return diffusion_loss(networks(*inputs, None, self.train.size), guided.float())


@dataclass(frozen=True, eq=False)
class MaskLoss:
    """BCE + Dice of the estimate of x_0 from pure noise at the last timestep, whatever t is (stage `task`). Drops no text.

    Args:
        alphas_bar: [T] noise schedule.
    """

    train: Train
    alphas_bar: torch.Tensor

    def __call__(
        self, networks: nn.Module, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        t = torch.full_like(t, len(self.alphas_bar) - 1)
        output = networks(noise, batch.image, t, batch.texts, None, self.train.size)
        return mask_loss(self.train, self.alphas_bar, output, noise, batch.mask, t)


def encode_labels(labels: torch.Tensor, label_scale: float, vae: AutoencoderKL | None) -> torch.Tensor:
    """Return x_0 [B, K, h, w] of soft masks [B, 1, H, W] in [0, 1]: scaled to [-label_scale, label_scale] or, with a VAE,
    its latents times `label_scale`, computed in full precision."""
    if vae is None:
        return (2 * labels - 1) * label_scale
    with torch.autocast(labels.device.type, enabled=False):
        return encode_masks(vae, labels) * label_scale


def mask_loss(
    train: Train, alphas_bar: torch.Tensor, output: torch.Tensor, x_t: torch.Tensor, mask: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Return BCE + Dice [B] of the estimate of x_0 that follows from the networks' output at x_t, resized to the side
    `train.task_size` of `mask` if that is given."""
    estimate = estimate_x_0(train.prediction, output.float(), x_t, alphas_bar, t, train.label_scale)
    if train.task_size is not None:
        estimate = F.interpolate(estimate, size=mask.shape[-2:], mode="bilinear")
    return task_loss(estimate, mask, train.label_scale)
