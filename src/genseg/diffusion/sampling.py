"""Sampling with classifier-free guidance (Eq. 8-11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler

from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.schedule import Scheduler

Denoise = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(x_t [B, K, h, w], t scalar, guided) -> the network's answer; guided: [2 B, K, h, w], conditional then unconditional."""
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called after each step with (t, x_t before the step, the step's estimate of x_0)."""


def phrase_generator(seed: int, image_id: object, narrative_id: object, phrase_id: object, size: int) -> torch.Generator:
    """All randomness of one phrase's mask: independent of batch, shard, order and of steps and guidance."""
    return torch.Generator().manual_seed(derive_seed(seed, "sample", image_id, narrative_id, phrase_id, size))


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """x_T ~ N(0, I) [B, *shape], row i from generator i, drawn on the CPU so that devices agree."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample_labels(
    denoise: Denoise,
    scheduler: Scheduler,
    x_t: torch.Tensor,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    observe: Observe | None = None,
) -> torch.Tensor:
    """Denoise x_T [B, K, h, w] to x_0 [B, K, h, w] in `steps` steps.

    Guidance w = 1 costs one evaluation a step and phrase; any other w two: Eq. 10, uncond + w (cond - uncond).
    """
    scheduler.set_timesteps(steps, device=x_t.device)
    for t in scheduler.timesteps:
        answer = denoise(x_t, t, guidance != 1)
        if guidance != 1:
            conditional, unconditional = answer.chunk(2)
            answer = unconditional + guidance * (conditional - unconditional)
        options = {"generator": list(generators)} if isinstance(scheduler, DDPMScheduler) else {}
        result = scheduler.step(answer.float(), t, x_t, **options)
        if observe is not None:
            observe(int(t), x_t, result.pred_original_sample)
        x_t = result.prev_sample
    return x_t
