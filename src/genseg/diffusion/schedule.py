"""The noise schedule and its update rules, as diffusers schedulers that a pipeline can hold."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from diffusers import DDIMScheduler, DDPMScheduler

from genseg.params import Prediction

Rule = Literal["ddim", "ddpm"]
PREDICTION_TYPES = {"noise": "epsilon", "v": "v_prediction", "x0": "sample"}
"""diffusers' names of what the network predicts."""
PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
Scheduler: TypeAlias = DDIMScheduler | DDPMScheduler


def make_scheduler(
    betas: dict[str, Any],
    prediction: Prediction,
    zero_terminal_snr: bool,
    rule: Rule = "ddim",
    spacing: Literal["trailing", "leading"] = "trailing",
    clip: float | None = None,
) -> Scheduler:
    """Scheduler over the backbone's betas.

    Args:
        betas: `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule` (see `models.backbone.noise_schedule`).
        zero_terminal_snr: rescale so that nothing of x_0 is left at the last timestep (Lin et al. 2024, Alg. 1).
        rule: DDIM with eta 0 (section 4.2 of the paper) or DDPM (its Eq. 11).
        clip: bound |x_0| by this in every step; None leaves the estimate as it is.
    """
    cls = DDIMScheduler if rule == "ddim" else DDPMScheduler
    options = {"steps_offset": 1} if spacing == "leading" else {}
    return cls(
        **betas,
        **options,
        prediction_type=PREDICTION_TYPES[prediction],
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
