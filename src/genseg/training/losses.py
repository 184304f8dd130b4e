"""The training losses of label diffusion (Eq. 7), the discriminative control and the later stages, and their validation.

Every loss is called as `loss(networks, micro)` with a `MicroBatch` of B samples and returns one value per sample [B].
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from genseg.artifacts.phrases import hash_unit
from genseg.diffusion import objectives
from genseg.diffusion.objectives import add_noise, diffusion_loss, discriminative_loss, estimate_x_0, training_target
from genseg.diffusion.pipeline import DISCRIMINATIVE_TIMESTEP
from genseg.models.vae import encode_masks
from genseg.params import Params
from genseg.params.train import Train
from genseg.training.data import Batch, MicroBatch, PhraseData
from genseg.training.distributed import Ranks
from genseg.training.stages import Kind
from genseg.training.steps import mixed_precision, step_generator

Loss = Callable[[nn.Module, MicroBatch], Tensor]
BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Timestep bands of the validation loss, half-open."""


@dataclass(frozen=True, eq=False)
class DiffusionLoss:
    """Eq. 7 for noise, v or x_0, averaged with BCE + Dice of the estimate of x_0: (Eq. 7 + w (BCE + Dice)) / (1 + w) with
    w = `train.mask_loss_weight`, so that w does not change the scale of the gradient. `alphas_bar` [T] is the noise
    schedule. `vae` encodes the labels; it is None if x_0 is the mask itself.

    Where `micro.self_estimated`, x_t is the noised estimate of x_0 that the network makes from the same noise at the last
    timestep, as in sampling, and the target is still the true x_0 (self-aligned denoising of DDP, Ji et al. 2023,
    arXiv 2303.17559). The network thereby learns to correct its own estimates.
    """

    train: Train
    alphas_bar: Tensor
    vae: AutoencoderKL | None = None

    def __call__(self, networks: nn.Module, micro: MicroBatch) -> Tensor:
        train, batch = self.train, micro.batch
        x_0 = encode_labels(batch.label, train.label_scale, self.vae)
        clean = x_0
        if micro.self_estimated is not None:
            clean = torch.where(micro.self_estimated[:, None, None, None], self._self_estimates(networks, micro), x_0)
        x_t = add_noise(clean, micro.noise, self.alphas_bar, micro.t)
        output = networks(x_t, batch.image, micro.t, batch.texts, micro.drop, train.size)
        target = training_target(train.prediction_type, x_0, micro.noise, self.alphas_bar, micro.t, train.label_scale)
        losses = diffusion_loss(output, target)
        if train.mask_loss_weight:
            mask_losses = _mask_loss(train, self.alphas_bar, output, x_t, batch, micro.t)
            losses = (losses + train.mask_loss_weight * mask_losses) / (1 + train.mask_loss_weight)
        return losses

    @torch.no_grad()
    def _self_estimates(self, networks: nn.Module, micro: MicroBatch) -> Tensor:
        """Return the network's one-step estimates of x_0 [B, K, h, w] in rows that are `self_estimated`, and 0 elsewhere."""
        assert micro.self_estimated is not None
        # At least one row, because under FSDP every process must take part in a forward pass.
        rows = micro.self_estimated.nonzero()[:, 0] if micro.self_estimated.any() else micro.t.new_zeros(1)
        noise, texts = micro.noise[rows], [micro.batch.texts[row] for row in rows.tolist()]
        last = torch.full_like(rows, len(self.alphas_bar) - 1)
        output = networks(noise, micro.batch.image[rows], last, texts, None, self.train.size).float()
        estimates = torch.zeros_like(micro.noise)
        estimates[rows] = estimate_x_0(self.train.prediction_type, output, noise, self.alphas_bar, last, self.train.label_scale)
        # VAE latents are unbounded.
        return estimates if self.vae is not None else estimates.clamp(-self.train.label_scale, self.train.label_scale)


@dataclass(frozen=True, eq=False)
class DiscriminativeLoss:
    """BCE + Dice of the control's logits. Ignores noise and t, and drops no text."""

    train: Train

    def __call__(self, networks: nn.Module, micro: MicroBatch) -> Tensor:
        batch, t = micro.batch, torch.full_like(micro.t, DISCRIMINATIVE_TIMESTEP)
        logits = networks(torch.zeros_like(batch.label), batch.image, t, batch.texts, None, self.train.size)
        return discriminative_loss(logits, batch.label)


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """Squared difference from the guided output (Eq. 10) of a frozen teacher with w = `guidance_scale`: the student learns to
    replace two forward passes with one (stage `distill`). Drops no text. `alphas_bar` and `vae` are as in `DiffusionLoss`."""

    teacher: nn.Module
    guidance_scale: float
    train: Train
    alphas_bar: Tensor
    vae: AutoencoderKL | None = None

    def __call__(self, networks: nn.Module, micro: MicroBatch) -> Tensor:
        batch, t, size = micro.batch, micro.t, self.train.size
        x_0 = encode_labels(batch.label, self.train.label_scale, self.vae)
        inputs = (add_noise(x_0, micro.noise, self.alphas_bar, t), batch.image, t, batch.texts)
        with torch.no_grad():
            conditional = self.teacher(*inputs, None, size)
            unconditional = self.teacher(*inputs, torch.ones_like(t, dtype=torch.bool), size)
            guided = unconditional + self.guidance_scale * (conditional - unconditional)
        return diffusion_loss(networks(*inputs, None, size), guided.float())


@dataclass(frozen=True, eq=False)
class MaskLoss:
    """BCE + Dice of the estimate of x_0 from pure noise at the last timestep; ignores t (stage `mask_loss`). Drops no text."""

    train: Train
    alphas_bar: Tensor

    def __call__(self, networks: nn.Module, micro: MicroBatch) -> Tensor:
        batch, t = micro.batch, torch.full_like(micro.t, len(self.alphas_bar) - 1)
        output = networks(micro.noise, batch.image, t, batch.texts, None, self.train.size)
        return _mask_loss(self.train, self.alphas_bar, output, micro.noise, batch, t)


def encode_labels(labels: Tensor, label_scale: float, vae: AutoencoderKL | None) -> Tensor:
    """Return x_0 [B, K, h, w] of soft masks [B, 1, H, W] in [0, 1]: scaled to [-label_scale, label_scale] or, with a VAE,
    its latents times `label_scale`, computed in full precision."""
    if vae is None:
        return (2 * labels - 1) * label_scale
    with torch.autocast(labels.device.type, enabled=False):
        return encode_masks(vae, labels) * label_scale


def _mask_loss(train: Train, alphas_bar: Tensor, output: Tensor, x_t: Tensor, batch: Batch, t: Tensor) -> Tensor:
    """Return BCE + Dice [B] of the estimate of x_0 from the networks' output at x_t."""
    estimate = estimate_x_0(train.prediction_type, output.float(), x_t, alphas_bar, t, train.label_scale)
    return objectives.mask_loss(estimate, batch.label, train.label_scale)


def validation_rows(phrases: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return `count` fixed rows of the validation split, chosen by hash."""
    val = phrases[phrases["split"] == "val"]
    keys = list(zip(val["narrative_id"], val["phrase_id"], strict=True))
    order = sorted(range(len(val)), key=lambda row: hash_unit(seed, "validate", *keys[row]))
    return val.iloc[sorted(order[:count])]


@torch.no_grad()
def validate(kind: Kind, loss: Loss, networks: nn.Module, data: PhraseData, params: Params, ranks: Ranks) -> dict[str, str]:
    """Return the mean loss of the validation rows as columns of the log: one per timestep band (label diffusion only) and
    their mean, `val_loss`.

    Every row has one fixed t and noise per band. The rows are divided among the processes. All processes make the same
    number of forward passes, because every process must take part in gathering sharded weights.
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
            generators = [step_generator(params.seed, "validation", low, row) for row in rows]
            t = torch.cat([torch.randint(low, high, (1,), generator=generator) for generator in generators])
            noise = torch.stack([torch.randn(data.label_shape, generator=generator) for generator in generators])
            micro = MicroBatch(data.batch(rows, [False] * len(rows)), noise, t, None)
            with mixed_precision(params.train, ranks.device):
                row_losses = loss(networks, micro.to(ranks.device))
            if number < len(blocks):  # extra blocks only equalise the number of forward passes
                losses[rows] = row_losses.float()
        means.append(ranks.sum(losses).mean().item())
        if kind == "gs":
            columns[f"val_t{low}_{high - 1}"] = f"{means[-1]:.6f}"
    networks.train()
    return columns | {"val_loss": f"{sum(means) / len(means):.6f}"}
