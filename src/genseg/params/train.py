"""Params of the phase `train`: the label-diffusion model and its discriminative control."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from genseg.params.base import Fraction, ImageSize, Precision, Section
from genseg.params.sample import GuidanceScale

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Label = Literal["mask", "vae"]


class Optimizer(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adam", "adamw"] = "adamw"
    """Optimiser."""
    lr: PositiveFloat = 3e-4
    """Learning rate."""
    lr_new: PositiveFloat | None = 1.2e-3
    """Learning rate of the new layers (conv_in, conv_out, adapter, null embeddings); null: `lr`."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Decay rates of the moments."""
    gradient_clip: PositiveFloat | None = 1.0
    """Maximum norm of the gradient; null: no clipping."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up."""


class Stage(Section):
    """Further training that starts from the averaged weights of the previous one, with a new optimiser and schedule.

    `distill` (Meng et al. 2023, arXiv 2210.03142): the student learns to predict in one forward pass at x_t what the
    frozen model predicts there with guidance scale w. The student then approximates the guided model at half the evaluations.
    `mask_loss`: BCE + Dice on the estimate of x_0 from pure noise at the last timestep, which is the result of sampling in
    one step with w = 1.
    """

    objective: Literal["distill", "mask_loss"]
    """Loss of the stage."""
    steps: PositiveInt
    """Optimiser steps."""
    lr_factor: PositiveFloat
    """Factor by which the learning rates of `optimizer` are multiplied."""
    guidance_scale: GuidanceScale | None = None
    """Guidance scale w of the teacher; null for mask_loss."""

    @model_validator(mode="after")
    def _distillation_has_guidance(self) -> Self:
        if (self.objective == "distill") != (self.guidance_scale is not None):
            raise ValueError("guidance_scale is required with objective distill and must be null with mask_loss")
        return self


class Train(Section):
    """Training of the label-diffusion model and of its discriminative control."""

    seed: int = 0
    """Seed of the initial weights and of the order, noise and mirroring of the samples. Evaluation does not depend on it."""
    size: ImageSize = 128
    """Side of the square images in pixels. The label latent has side size / VAE factor."""
    label: Label = "mask"
    """x_0: the mask as a one-channel map at latent size, or as a grey image in the VAE's latent channels."""
    prediction_type: PredictionType = "sample"
    """Output of the network: the noise (the paper, Eq. 7), v, or x_0 / b."""
    zero_terminal_snr: bool = True
    """Whether the schedule is rescaled so that x_t is pure noise at the last timestep."""
    label_scale: PositiveFloat = 0.1
    """b: masks are scaled to x_0 in [-b, b]."""
    mask_loss_weight: NonNegativeFloat = 16.0
    """Weight of BCE + Dice on the estimate of x_0 in a weighted mean with the diffusion loss, of weight 1; 0 in the paper."""
    terminal_warmup: Fraction = 0.7
    """Fraction of `steps`, from the start, in which every sample is at the last timestep; 0 in the paper."""
    terminal_timestep_prob: Fraction = 0.5
    """Probability of drawing the last timestep afterwards; otherwise t is uniform. 0 in the paper."""
    self_estimate_prob: Fraction = 1.0
    """Probability that x_t before the last timestep is made from the network's own one-step estimate; 0 in the paper."""
    conv_in_init: Literal["masked_image", "latent"] = "latent"
    """Pretrained conv_in weights for the image latent: channels 5:9 (masked image) or 0:4 (noisy latent)."""
    text: Literal["tokens", "pooled"] = "tokens"
    """e_i^t: the token sequence (the paper, Eq. 3) or one pooled token (the paper, Eq. 2: "global")."""
    token_injection: bool = True
    """Whether adapted text tokens are injected into self-attention (the paper, Eq. 3-5)."""
    cond_drop_prob: Fraction = 0.02
    """Probability that a row's text is replaced by the learned null embeddings (the paper, Eq. 6)."""
    batch: PositiveInt = 16
    """Global batch size, for any micro-batch and any number of devices and processes."""
    micro_batch: PositiveInt = 16
    """Batch size of one forward pass on one device."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """On several GPUs, each holds the whole model (ddp) or a part of the weights, gradients and moments (fsdp)."""
    steps: PositiveInt | None = 1200
    """Optimiser steps before the stages; null: `epochs` is used."""
    epochs: PositiveInt | None = None
    """Passes over the training phrases before the stages; null: `steps` is used."""
    stages: list[Stage] = []
    """Stages after the first training, e.g. {objective: distill, steps: 300, lr_factor: 0.3, guidance_scale: 2.0}."""
    optimizer: Optimizer = Optimizer()
    ema: Annotated[float, Field(ge=0, lt=1)] | None = 0.98
    """Decay of the exponential moving average of the weights; null: no average."""
    precision: Precision = "bf16"
    """Precision of the arithmetic. Master weights are fp32."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    flip: bool = True
    """Whether images and masks are mirrored at random; use false if phrases say left or right."""
    log_every: PositiveInt = 20
    """Steps between log lines."""
    validate_every: PositiveInt = 300
    """Steps between validations."""
    validate_phrases: PositiveInt = 96
    """Number of val phrases in a validation."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        has_mask_stage = any(stage.objective == "mask_loss" for stage in self.stages)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("exactly one of train.steps and train.epochs must be null")
        if self.batch % self.micro_batch:
            raise ValueError(f"train.batch ({self.batch}) must be divisible by train.micro_batch ({self.micro_batch})")
        if self.prediction_type == "epsilon":
            if self.zero_terminal_snr:
                raise ValueError(
                    "train.prediction_type epsilon is undefined at zero terminal SNR (train.zero_terminal_snr); use "
                    "v_prediction or sample"
                )
            if self.mask_loss_weight:
                raise ValueError(
                    "train.mask_loss_weight needs an estimate of x_0 at every timestep; use train.prediction_type "
                    "v_prediction or sample"
                )
            if has_mask_stage:
                raise ValueError(
                    "a stage with objective mask_loss needs an estimate of x_0 from pure noise; use "
                    "train.prediction_type v_prediction or sample"
                )
        if self.label == "vae" and (self.mask_loss_weight or has_mask_stage):
            raise ValueError(
                "BCE + Dice (train.mask_loss_weight, objective mask_loss) compares masks and is undefined for train.label vae"
            )
        for name in ("terminal_warmup", "terminal_timestep_prob"):
            if getattr(self, name) and not self.zero_terminal_snr:
                raise ValueError(f"train.{name} needs train.zero_terminal_snr: otherwise the last timestep is not pure noise")
        if self.self_estimate_prob and self.prediction_type == "epsilon":
            raise ValueError(
                "train.self_estimate_prob needs an estimate of x_0 from pure noise; use train.prediction_type v_prediction or "
                "sample"
            )
        return self
