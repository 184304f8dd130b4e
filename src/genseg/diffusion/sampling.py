"""Sampling with classifier-free guidance (Eq. 8-11). The update rules are listed in `SAMPLERS`."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, SchedulerMixin

from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.guidance import step_is_guided
from genseg.diffusion.objectives import estimate_x_0
from genseg.params.sample import OperatingPoint, SamplerName

Denoise = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(x_t [B, K, h, w], t scalar, guided) -> network output; if guided, [2 B, K, h, w]: conditional, then unconditional."""
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called after each step with (t, x_t before the step, the step's estimate of x_0)."""
OnStepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, t, x_t after the step) -> x_t from which sampling continues."""


def phrase_generator(
    seed: int, image_id: object, narrative_id: object, phrase_id: object, size: int, member: int = 0
) -> torch.Generator:
    """Return the generator of all randomness of one phrase's mask.

    It depends only on the seed, the ids, the image size and the ensemble member, not on batch, shard, order, steps or guidance.
    Member 0 of an ensemble equals the single sample, so larger ensembles contain smaller ones.
    """
    ids = (image_id, narrative_id, phrase_id, size, *([member] if member else []))
    return torch.Generator().manual_seed(derive_seed(seed, "sample", *ids))


def phrase_generators(
    seed: int, keys: Iterable[tuple[object, object, object]], point: OperatingPoint
) -> list[list[torch.Generator]]:
    """Return the generators [B][E] of the ensembles of B phrases with the keys (image_id, narrative_id, phrase_id)."""
    return [[phrase_generator(seed, *key, point.size, member) for member in range(point.ensemble_size)] for key in keys]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """Return standard normal noise [B, *shape], row i from generator i, drawn on the CPU to be equal on all devices."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@dataclass
class StepContext:
    """Inputs of an update rule besides x_t and the estimate of x_0.

    Attributes:
        alpha, alpha_next: scalar alpha_bar at this timestep and at the next one.
        generators: one per row, for stochastic rules.
        previous: estimate of x_0 and alpha_bar of the previous step; None at the first step.
    """

    alpha: torch.Tensor
    alpha_next: torch.Tensor
    generators: Sequence[torch.Generator]
    previous: tuple[torch.Tensor, torch.Tensor] | None = None


def ddim_step(x_t: torch.Tensor, x_0: torch.Tensor, context: StepContext) -> torch.Tensor:
    """DDIM (Song et al. 2021, Eq. 12) with eta = 0."""
    alpha, alpha_next = context.alpha, context.alpha_next
    noise = (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next).sqrt() * noise


def ddpm_step(x_t: torch.Tensor, x_0: torch.Tensor, context: StepContext) -> torch.Tensor:
    """DDPM (Ho et al. 2020, Eq. 6-7) over the chosen timesteps: a sample of q(x_next | x_t, x_0)."""
    alpha, alpha_next = context.alpha, context.alpha_next
    noise = draw_noise(context.generators, x_t.shape[1:]).to(x_t.device)
    ratio = alpha / alpha_next
    mean = (alpha_next.sqrt() * (1 - ratio) * x_0 + ratio.sqrt() * (1 - alpha_next) * x_t) / (1 - alpha)
    return mean + ((1 - alpha_next) / (1 - alpha) * (1 - ratio)).sqrt() * noise


def dpmpp_step(x_t: torch.Tensor, x_0: torch.Tensor, context: StepContext) -> torch.Tensor:
    """DPM-Solver++(2M) with data prediction (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    With lambda = log(sqrt(alpha_bar) / sigma), its increase h in this step and h' in the previous step, and r = h' / h:
    D = (1 + 1 / (2r)) x_0 - x_0' / (2r), and x_next = (sigma_next / sigma) x_t - sqrt(alpha_bar_next) (exp(-h) - 1) D.
    The first step has no previous estimate x_0' and is first-order, which equals DDIM. With zero terminal SNR, h' is infinite
    in the second step, which is then first-order as well.
    """
    alpha, alpha_next = context.alpha, context.alpha_next
    h = _half_log_snr(alpha_next) - _half_log_snr(alpha)
    data = x_0
    if context.previous is not None:
        previous_x_0, previous_alpha = context.previous
        correction = h / (2 * (_half_log_snr(alpha) - _half_log_snr(previous_alpha)))  # 1 / (2r)
        data = (1 + correction) * x_0 - correction * previous_x_0
    return ((1 - alpha_next) / (1 - alpha)).sqrt() * x_t - alpha_next.sqrt() * torch.expm1(-h) * data


def mean_step(x_t: torch.Tensor, x_0: torch.Tensor, context: StepContext) -> torch.Tensor:
    """Fresh noise on the estimate of x_0 (multistep consistency sampling, Song et al. 2023, arXiv 2303.01469, Algorithm 1).

    For this rule, `sample_labels` replaces each estimate by the mean of all estimates so far, which is also its result.
    """
    noise = draw_noise(context.generators, x_t.shape[1:]).to(x_t.device)
    return context.alpha_next.sqrt() * x_0 + (1 - context.alpha_next).sqrt() * noise


def _half_log_snr(alpha: torch.Tensor) -> torch.Tensor:
    """Return lambda = log(sqrt(alpha_bar) / sigma), minus infinity for alpha_bar = 0."""
    return 0.5 * torch.log(alpha / (1 - alpha))


SAMPLERS: dict[SamplerName, Callable[[torch.Tensor, torch.Tensor, StepContext], torch.Tensor]] = {
    "ddim": ddim_step,
    "ddpm": ddpm_step,
    "dpmpp": dpmpp_step,
    "mean": mean_step,
}
"""Update rules: (x_t [B, K, h, w], estimate of x_0 [B, K, h, w], context) -> x_t at the next timestep."""


def _guide(denoise: Denoise, x_t: torch.Tensor, t: torch.Tensor, point: OperatingPoint, step: int) -> torch.Tensor:
    """Evaluate the network, and mix its outputs as uncond + w (cond - uncond) (Eq. 10) where the operating point is guided."""
    guided = step_is_guided(point, step)
    output = denoise(x_t, t, guided)
    if guided:
        conditional, unconditional = output.chunk(2)
        output = unconditional + point.guidance_scale * (conditional - unconditional)
    return output.float()


@torch.no_grad()
def sample_labels(
    denoise: Denoise,
    scheduler: DDIMScheduler,
    x_t: torch.Tensor,
    point: OperatingPoint,
    generators: Sequence[torch.Generator],
    label_scale: float = 1.0,
    observe: Observe | None = None,
    on_step_end: OnStepEnd | None = None,
) -> torch.Tensor:
    """Denoise x_T [B, K, h, w] to x_0 [B, K, h, w] (Eq. 8-11).

    The scheduler defines schedule, timesteps, prediction type and clipping. The update is our own: diffusers computes the next
    timestep as t - 1000 // steps, which is not a scheduled timestep if `steps` does not divide 1000, and ends with residual
    noise. Guidance intervals follow Kynkaanniemi et al. 2024, arXiv 2404.07724.

    Args:
        generators: one per row, for stochastic update rules.
        label_scale: b; with prediction type "sample", the network output is multiplied by it.
    """
    steps, config = point.num_inference_steps, scheduler.config
    clip_range = config.clip_sample_range if config.clip_sample else None
    scheduler.set_timesteps(steps, device=x_t.device)
    timesteps = scheduler.timesteps[:steps]  # for some numbers of steps, such as 61, the trailing grid also has t = -1
    alphas_bar = scheduler.alphas_cumprod.to(x_t.device)
    previous: tuple[torch.Tensor, torch.Tensor] | None = None
    mean: torch.Tensor | None = None
    for step, t in enumerate(timesteps):
        # 1. Estimate x_0. The final estimate is not clipped: values beyond the bounds still show which of two phrases a pixel
        # belongs to.
        output = _guide(denoise, x_t, t, point, step)
        x_0 = estimate_x_0(config.prediction_type, output, x_t, alphas_bar, t.expand(len(x_t)), label_scale)
        if point.sampler == "mean":
            mean = x_0 if mean is None else mean + (x_0 - mean) / (step + 1)
            x_0 = mean
        is_last = step + 1 == steps
        if clip_range is not None and not is_last:
            x_0 = x_0.clamp(-clip_range, clip_range)
        if observe is not None:
            observe(int(t), x_t, x_0)

        # 2. Step to the next timestep.
        if is_last:
            return x_0 if on_step_end is None else on_step_end(step, t, x_0)
        context = StepContext(alphas_bar[t], alphas_bar[timesteps[step + 1]], generators, previous)
        x_t, previous = SAMPLERS[point.sampler](x_t, x_0, context), (x_0, context.alpha)
        if on_step_end is not None:
            x_t = on_step_end(step, t, x_t)
    raise ValueError("num_inference_steps must be positive")


@torch.no_grad()
def sample_with_scheduler(
    denoise: Denoise,
    scheduler: SchedulerMixin,
    x_t: torch.Tensor,
    point: OperatingPoint,
    generators: Sequence[torch.Generator],
    label_scale: float = 1.0,
    on_step_end: OnStepEnd | None = None,
) -> torch.Tensor:
    """Denoise noise [B, K, h, w] to x_0 [B, K, h, w] with the update rule of a scheduler of diffusers (DPM++, UniPC, ...).

    The arguments are those of `sample_labels`, but the scheduler replaces `point.sampler`.
    """
    scheduler.set_timesteps(point.num_inference_steps, device=x_t.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if takes_generator else {}
    x_t = x_t * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        output = _guide(denoise, scheduler.scale_model_input(x_t, t), t, point, step)
        if scheduler.config.prediction_type == "sample":  # the network predicts x_0 / b
            output = output * label_scale
        x_t = scheduler.step(output, t, x_t, return_dict=False, **options)[0]
        if on_step_end is not None:
            x_t = on_step_end(step, t, x_t)
    return x_t
