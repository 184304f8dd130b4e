"""What the network is trained to predict, apart from the network: noise (Eq. 7), v or x_0."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genseg.params import Prediction


def _levels(alphas_bar: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [B, 1, 1, 1]."""
    alpha = alphas_bar.to(t.device)[t].float()[:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()


def noised(x_0: torch.Tensor, noise: torch.Tensor, alphas_bar: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Eq. 1: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, for x_0 [B, K, h, w] and t [B]."""
    signal, sigma = _levels(alphas_bar, t)
    return signal * x_0 + sigma * noise


def target(
    prediction: Prediction,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    alphas_bar: torch.Tensor,
    t: torch.Tensor,
    label_scale: float,
) -> torch.Tensor:
    """The wanted answer: the noise; v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022); or x_0 / b,
    the label in [-1, 1], so that neither the loss nor the network's last layer has to know the label scale b."""
    if prediction == "noise":
        return noise
    if prediction == "x0":
        return x_0 / label_scale
    signal, sigma = _levels(alphas_bar, t)
    return signal * noise - sigma * x_0


def estimate_x_0(
    prediction: Prediction,
    output: torch.Tensor,
    x_t: torch.Tensor,
    alphas_bar: torch.Tensor,
    t: torch.Tensor,
    label_scale: float,
) -> torch.Tensor:
    """The network's estimate of x_0 [B, K, h, w] from what it answered at x_t (the inverse of `target`)."""
    if prediction == "x0":
        return output * label_scale
    signal, sigma = _levels(alphas_bar, t)
    return (x_t - sigma * output) / signal if prediction == "noise" else signal * x_t - sigma * output


def diffusion_loss(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Eq. 7, mean over pixels, per sample [B]."""
    return (output.float() - wanted).square().mean((1, 2, 3))


def discriminative_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy + soft Dice per sample [B], for logits and soft masks [B, 1, h, w] in [0, 1]."""
    bce = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none").mean((1, 2, 3))
    probability = logits.float().sigmoid()
    overlap = (probability * mask).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return bce + dice


LOGIT_SLOPE = 4.0


def task_loss(x_0: torch.Tensor, mask: torch.Tensor, label_scale: float) -> torch.Tensor:
    """`discriminative_loss` per sample [B] of an estimate of x_0 [B, 1, h, w], whose logit is 4 x_0 / b: a label at +-b is
    a probability of 0.98 or 0.02, and the threshold of the read-out, x_0 = 0, is a probability of one half."""
    return discriminative_loss(LOGIT_SLOPE * x_0 / label_scale, mask)
