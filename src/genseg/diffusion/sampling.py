"""Sampling with classifier-free guidance (Eq. 8-11), by one of three update rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.objectives import estimate_x_0
from genseg.diffusion.schedule import PREDICTIONS, Scheduler
from genseg.params import Interval, Rule, step_is_guided

Denoise = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(x_t [B, K, h, w], t scalar, guided) -> the network's answer; guided: [2 B, K, h, w], conditional then unconditional."""
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called after each step with (t, x_t before the step, the step's estimate of x_0)."""


def phrase_generator(
    seed: int, image_id: object, narrative_id: object, phrase_id: object, size: int, member: int = 0
) -> torch.Generator:
    """All randomness of one phrase's mask: independent of batch, shard, order and of steps and guidance. Member 0 of an
    ensemble is the single sample, so that larger ensembles hold the smaller ones."""
    ids = (image_id, narrative_id, phrase_id, size, *([member] if member else []))
    return torch.Generator().manual_seed(derive_seed(seed, "sample", *ids))


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """N(0, I) [B, *shape], row i from generator i, drawn on the CPU so that devices agree."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def ddim_step(x_t: torch.Tensor, x_0: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM (Song et al. 2021, Eq. 12, eta = 0): keep the noise that x_t and the estimate of x_0 imply."""
    noise = (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next).sqrt() * noise


def ddpm_step(
    x_t: torch.Tensor, x_0: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """DDPM (Ho et al. 2020, Eq. 6-7, over the chosen timesteps): a draw from q(x_next | x_t, x_0)."""
    ratio = alpha / alpha_next
    mean = (alpha_next.sqrt() * (1 - ratio) * x_0 + ratio.sqrt() * (1 - alpha_next) * x_t) / (1 - alpha)
    return mean + ((1 - alpha_next) / (1 - alpha) * (1 - ratio)).sqrt() * noise


def dpmpp_step(
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    alpha: torch.Tensor,
    alpha_next: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    With lambda = log(sqrt(alpha_bar) / sigma), h its increase over this step and h' over the one before, r = h' / h:
    D = (1 + 1 / 2r) x_0 - 1 / 2r x_0', and x_next = sigma_next / sigma x_t - sqrt(alpha_bar_next) (exp(-h) - 1) D.
    The first step has no x_0' and is first-order, which is DDIM; so is the second after zero terminal SNR, where h' is
    infinite.

    Args:
        previous: x_0', the estimate of x_0 one step before, and alpha_bar there; None at the first step.
    """
    h = _half_log_snr(alpha_next) - _half_log_snr(alpha)
    data = x_0
    if previous is not None:
        correction = h / (2 * (_half_log_snr(alpha) - _half_log_snr(previous[1])))  # 1 / 2r
        data = (1 + correction) * x_0 - correction * previous[0]
    return ((1 - alpha_next) / (1 - alpha)).sqrt() * x_t - alpha_next.sqrt() * torch.expm1(-h) * data


def _half_log_snr(alpha: torch.Tensor) -> torch.Tensor:
    """lambda; minus infinity where nothing is left of x_0."""
    return 0.5 * torch.log(alpha / (1 - alpha))


@torch.no_grad()
def sample_labels(
    denoise: Denoise,
    scheduler: Scheduler,
    x_t: torch.Tensor,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    label_scale: float = 1.0,
    observe: Observe | None = None,
    rule: Rule = "ddim",
    interval: Interval | None = None,
) -> torch.Tensor:
    """Denoise x_T [B, K, h, w] to x_0 [B, K, h, w] in `steps` steps (Eq. 8-11).

    The scheduler names schedule, timesteps, prediction type and clipping; the step itself is ours, because diffusers
    derives the next timestep from t - 1000 // steps, which misses the grid where steps do not divide 1000 and ends with
    noise left.

    `label_scale` is the b by which x_0 prediction multiplies the network's answer (see `objectives.target`).
    Clipping keeps the steps stable; the last estimate is nobody's input, and what lies beyond the bounds still tells which
    of two phrases a pixel belongs to.
    Guidance w = 1 costs one evaluation a step and phrase; any other w two: Eq. 10, uncond + w (cond - uncond). Outside
    `interval` w is 1 (Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Args:
        rule: DDIM with eta 0 (section 4.2 of the paper), DDPM (its Eq. 11), or DPM-Solver++(2M).
        interval: see `params.step_is_guided`; None guides every step.
    """
    scheduler.set_timesteps(steps, device=x_t.device)
    timesteps = scheduler.timesteps[:steps]  # the trailing grid has t = -1 as one more where rounding lets it, as for 61 steps
    alphas = scheduler.alphas_cumprod.to(x_t.device)
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    prediction = PREDICTIONS[scheduler.config.prediction_type]
    previous: tuple[torch.Tensor, torch.Tensor] | None = None
    for position, t in enumerate(timesteps):
        guided = step_is_guided(position, steps, guidance, interval)
        answer = denoise(x_t, t, guided)
        if guided:
            conditional, unconditional = answer.chunk(2)
            answer = unconditional + guidance * (conditional - unconditional)
        x_0 = estimate_x_0(prediction, answer.float(), x_t, alphas, t.expand(len(x_t)), label_scale)
        last = position + 1 == steps
        if clip is not None and not last:
            x_0 = x_0.clamp(-clip, clip)
        if observe is not None:
            observe(int(t), x_t, x_0)
        if last:
            return x_0
        alpha, alpha_next = alphas[t], alphas[timesteps[position + 1]]
        if rule == "ddpm":
            x_t = ddpm_step(x_t, x_0, alpha, alpha_next, draw_noise(generators, x_t.shape[1:]).to(x_t.device))
        elif rule == "dpmpp":
            x_t, previous = dpmpp_step(x_t, x_0, alpha, alpha_next, previous), (x_0, alpha)
        else:
            x_t = ddim_step(x_t, x_0, alpha, alpha_next)
    raise ValueError("steps must be positive")
