"""Noise schedule, training targets and losses. The network predicts the noise (Eq. 7), v, or x_0 / b."""

from typing import Any

import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from genseg.params.sample import TimestepSpacing
from genseg.params.train import PredictionType

LOGIT_SLOPE = 4.0
"""Logit of a pixel with x_0 = b. The probability of a pixel at +-b is 0.98 or 0.02."""


def make_scheduler(
    betas: dict[str, Any],
    prediction_type: PredictionType,
    zero_terminal_snr: bool,
    timestep_spacing: TimestepSpacing = "trailing",
    clip_range: float | None = None,
) -> DDIMScheduler:
    """Return a scheduler with the backbone's betas. Its own update rule is not used (see `diffusion.sampling`).

    Args:
        betas: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (see `models.backbone.noise_schedule`).
        zero_terminal_snr: rescale the betas so that x_t is pure noise at the last timestep (Lin et al. 2024, Alg. 1).
        clip_range: bound on |x_0| in every step but the last; None: no clipping.
    """
    return DDIMScheduler(
        **betas,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        **_sampling_config(timestep_spacing, clip_range),
    )


def with_sampling(scheduler: DDIMScheduler, timestep_spacing: TimestepSpacing, clip_range: float | None) -> DDIMScheduler:
    """Return a scheduler with the same betas but another spacing of timesteps and clip range (see `make_scheduler`)."""
    return DDIMScheduler.from_config(scheduler.config, **_sampling_config(timestep_spacing, clip_range))


def _sampling_config(timestep_spacing: TimestepSpacing, clip_range: float | None) -> dict[str, Any]:
    return {
        "timestep_spacing": timestep_spacing,
        "steps_offset": int(timestep_spacing == "leading"),
        "clip_sample": clip_range is not None,
        "clip_sample_range": clip_range or 1.0,
    }


def _coefficients(alphas_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [B, 1, 1, 1]."""
    alpha = alphas_bar.to(t.device)[t].float()[:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()


def add_noise(x_0: Tensor, noise: Tensor, alphas_bar: Tensor, t: Tensor) -> Tensor:
    """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Eq. 1), for x_0 [B, K, h, w] and t [B]."""
    signal, sigma = _coefficients(alphas_bar, t)
    return signal * x_0 + sigma * noise


def training_target(
    prediction_type: PredictionType, x_0: Tensor, noise: Tensor, alphas_bar: Tensor, t: Tensor, label_scale: float
) -> Tensor:
    """Return the training target [B, K, h, w].

    It is the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans and Ho, 2022), or x_0 / b in [-1, 1], so
    that neither the loss nor the last layer depends on the label scale b.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0 / label_scale
    signal, sigma = _coefficients(alphas_bar, t)
    return signal * noise - sigma * x_0


def estimate_x_0(
    prediction_type: PredictionType, output: Tensor, x_t: Tensor, alphas_bar: Tensor, t: Tensor, label_scale: float
) -> Tensor:
    """Return the estimate of x_0 [B, K, h, w] from the network output at x_t. It is the inverse of `training_target`."""
    if prediction_type == "sample":
        return output * label_scale
    signal, sigma = _coefficients(alphas_bar, t)
    return (x_t - sigma * output) / signal if prediction_type == "epsilon" else signal * x_t - sigma * output


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over pixels (Eq. 7) for each sample [B]."""
    return (output.float() - target).square().mean((1, 2, 3))


def discriminative_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Return binary cross-entropy + soft Dice [B] of logits and soft masks [B, 1, h, w] in [0, 1]."""
    bce = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none").mean((1, 2, 3))
    probability = logits.float().sigmoid()
    overlap = (probability * mask).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return bce + dice


def mask_loss(x_0: Tensor, mask: Tensor, label_scale: float) -> Tensor:
    """Return `discriminative_loss` [B] of the logits `LOGIT_SLOPE` x_0 / b, where x_0 [B, 1, h, w] is an estimate.

    The probability is 1/2 at x_0 = 0, the threshold of the read-out.
    """
    return discriminative_loss(LOGIT_SLOPE * x_0 / label_scale, mask)
