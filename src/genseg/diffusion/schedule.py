"""The noise schedule, as a diffusers scheduler that a pipeline can hold."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from diffusers import DDIMScheduler

from genseg.params import Prediction

PREDICTION_TYPES = {"noise": "epsilon", "v": "v_prediction", "x0": "sample"}
"""diffusers' names of what the network predicts."""
PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
Scheduler: TypeAlias = DDIMScheduler


def make_scheduler(
    betas: dict[str, Any],
    prediction: Prediction,
    zero_terminal_snr: bool,
    spacing: Literal["trailing", "leading"] = "trailing",
    clip: float | None = None,
) -> Scheduler:
    """Schedule, timesteps, prediction type and clipping over the backbone's betas; the update rule is the sampler's.

    Args:
        betas: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (see `models.backbone.noise_schedule`).
        zero_terminal_snr: rescale so that nothing of x_0 is left at the last timestep (Lin et al. 2024, Alg. 1).
        clip: bound |x_0| by this in every step; None leaves the estimate as it is.
    """
    return DDIMScheduler(
        **betas,
        prediction_type=PREDICTION_TYPES[prediction],
        rescale_betas_zero_snr=zero_terminal_snr,
        **_sampling(spacing, clip),
    )


def sampled(scheduler: Scheduler, spacing: Literal["trailing", "leading"], clip: float | None) -> Scheduler:
    """The same schedule with other timesteps and clipping (see `make_scheduler`)."""
    return DDIMScheduler.from_config(scheduler.config, **_sampling(spacing, clip))


def _sampling(spacing: str, clip: float | None) -> dict[str, Any]:
    return {
        "timestep_spacing": spacing,
        "steps_offset": int(spacing == "leading"),
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
    }
