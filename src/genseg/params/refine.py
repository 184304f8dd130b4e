"""Params of the phase `refine`: G4Seg (our reimplementation) and its controls."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from genseg.params.base import Fraction, PositiveFraction, Section, StableDiffusion, Timestep

Timesteps = Annotated[list[Timestep], Field(min_length=1)]
Control = Literal[
    "alpha_zero",
    "gate",
    "no_gate",
    "no_choice",
    "no_generation",
    "as_summarised",
    "unconditioned",
    "random",
    "crf",
    "trained",
]


class Sensitivity(Section):
    """Sensitivity of G4Seg: one constant is changed at a time, on some of the baselines."""

    baselines: list[str] = ["inexact_dilated"]
    """Baselines on which sensitivity is measured."""
    controls: list[Control] = ["no_choice"]
    """Controls for these baselines only. Of gate and no_gate, the one that equals G4Seg itself is omitted."""
    alpha: list[Fraction] = [1.0]
    """Values of alpha."""
    beta: list[Fraction] = []
    """Values of beta."""
    timestep: list[Timestep] = []
    """Single timesteps that replace `timesteps`."""
    iterations: list[NonNegativeInt] = []
    """Values of iterations."""
    layer: list[NonNegativeInt] = []
    """Single layers that replace `layers`."""


class Crf(Section):
    """Dense CRF (Krähenbühl and Koltun, 2011), the read-out of G4Seg and a control.

    One of ten settings is selected on val by `genseg refine --tune-crf`.
    CLIP-ES uses gaussian_weight 3, bilateral_sxy 67, bilateral_srgb 3 and confidence 0.9.
    """

    iterations: PositiveInt = 10
    """Mean-field iterations."""
    gaussian_sxy: PositiveFloat = 1.0
    """Standard deviation of the spatial kernel in pixels."""
    gaussian_weight: NonNegativeFloat = 1.0
    """Weight of the spatial kernel."""
    bilateral_sxy: PositiveFloat = 20.0
    """Spatial standard deviation of the bilateral kernel in pixels."""
    bilateral_srgb: PositiveFloat = 5.0
    """Colour standard deviation of the bilateral kernel in grey levels (0 to 255)."""
    bilateral_weight: NonNegativeFloat = 4.0
    """Weight of the bilateral kernel."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.6
    """Probability that a pixel of a hard coarse mask has its label."""


class TrainedRefiner(Section):
    """Trained control: a small network that learns to restore artificially degraded ground truth of the training phrases."""

    steps: PositiveInt = 120
    """Optimiser steps."""
    batch: PositiveInt = 16
    """Batch size."""
    lr: PositiveFloat = 3e-3
    """Learning rate."""
    size: Annotated[int, Field(gt=0, multiple_of=16)] = 128
    """Side in pixels to which images and masks are resized."""


class Refine(StableDiffusion):
    """Refinement with G4Seg (our reimplementation) and its controls. The paper gives no constants; these were chosen on val."""

    feature_size: PositiveInt = 32
    """Side of the grid on which features are compared and P is defined."""
    batch: PositiveInt = 16
    """Batch size in phrases. It affects masks only through rounding."""
    timesteps: Timesteps = [50]
    """Timesteps t over which feature distances are averaged."""
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] = [1]
    """Up-blocks whose outputs are the features, counted from 0."""
    generation: Fraction = 0.5
    """Weight of the generated image: D = (1 - generation) D(F_o, F_o) + generation D(F_o, F_g); 0 is feature matching."""
    cut_quantiles: list[Annotated[float, Field(gt=0, lt=1)]] = [0.2, 0.4, 0.6, 0.8]
    """Quantiles of the evidence that are candidate cuts of the confusion area, in addition to 0; []: always cut at 0."""
    choice_timesteps: Timesteps = [500, 700]
    """Timesteps at which images generated with each cut are compared with the original. The best cut is used."""
    reference: Literal["original", "unconditioned"] = "original"
    """Image with which the generated one is compared: the original, or one generated without the mask."""
    inject: Annotated[list[Literal["cross", "self"]], Field(min_length=1)] = ["cross", "self"]
    """Kinds of attention into which the mask is injected."""
    alpha: Fraction = 0.5
    """Strength of the injection; 0 leaves the network unchanged."""
    beta: Fraction = 0.5
    """Weight of the previous P in an update; 1 leaves P unchanged."""
    iterations: NonNegativeInt = 2
    """Number of updates of P."""
    num_neighbours: PositiveInt = 20
    """k: number of nearest cells of a region over which a distance is averaged."""
    temperature: PositiveFloat = 0.15
    """T of Q = sigmoid((d_b - d_f) / T), and of the alignment softmax(-D / T) of class evidence."""
    spatial_weight: NonNegativeFloat = 1.0
    """Weight of the squared spatial distance between cells, in image sides, that is added to feature distance."""
    confidence_thresholds: tuple[Fraction, Fraction] = (0.2, 0.8)
    """Values of P below which a cell is confident background and above which it is confident foreground."""
    boundary_width: Fraction = 0.08
    """Half-width of the confusion area around the mask's boundary, as a fraction of the image side."""
    gate: bool = False
    """Whether updates are weighted by the discrepancy g."""
    evidence_timesteps: list[Timestep] = [300, 700, 900]
    """Timesteps at which the classes of an image compete; []: class phrases are refined one at a time, like other phrases."""
    evidence_noises: PositiveInt = 4
    """Noises at each of these timesteps, over which the errors of the predicted noise are averaged."""
    readout: Literal["crf", "bilinear"] = "crf"
    """Read-out at native size: dense CRF with the constants of the CRF control, or bilinear interpolation."""
    maps: NonNegativeInt = 128
    """Side of the refined soft maps of a single file with soft maps (`--predictions`); 0: none are stored."""
    test_fraction: PositiveFraction = 0.07
    """Fraction of test, chosen by a hash of the image id, whose masks are refined."""
    controls: list[Control] = [
        "as_summarised",
        "alpha_zero",
        "no_generation",
        "random",
        "crf",
        "trained",
    ]
    """Controls for all baselines."""
    sensitivity: Sensitivity = Sensitivity()
    crf: Crf = Crf()
    trained: TrainedRefiner = TrainedRefiner()
    pictures: NonNegativeInt = 1
    """Phrases of each baseline whose maps are stored for the figure."""

    @field_validator("confidence_thresholds")
    @classmethod
    def _thresholds_enclose_half(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < 0.5 < value[1]:
            raise ValueError("the first value must be below 0.5 and the second above it")
        return value
