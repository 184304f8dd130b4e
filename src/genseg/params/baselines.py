"""Params of the phase `baselines`: attention-based methods and ground truth made inexact."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from genseg.params.base import Fraction, Section, StableDiffusion, Timestep
from genseg.params.sample import GuidanceScale

Attention = Literal["cross_attention", "diffpng_cross", "diffpng_cross_self", "diffpng_sam", "diffseg"]
Inexact = Literal["box", "dilated", "eroded", "shifted", "scribble"]


class Inversion(Section):
    """Null-text inversion (Mokady et al. 2023). DiffPNG uses {steps: 20, guidance_scale: 7.5, inner_steps: 10}."""

    steps: Annotated[int, Field(gt=0, lt=1000)] = 20
    """DDIM steps."""
    guidance_scale: GuidanceScale = 7.5
    """Guidance scale."""
    inner_steps: NonNegativeInt = 10
    """Maximum number of Adam steps on the null text at each denoising step."""
    lr: PositiveFloat = 1e-2
    """Learning rate of Adam at the first step; it falls linearly to half."""
    tolerance: PositiveFloat = 1e-5
    """Mean squared error at which the optimisation of the first step's null text ends; each further step adds 2e-5."""


class CrossAttention(Section):
    """Cross-attention maps."""

    timesteps: Annotated[list[Timestep], Field(min_length=1)] = [400]
    """Timesteps whose maps are averaged. Each needs one forward pass."""


class DiffPng(Section):
    """DiffPNG."""

    timesteps: Annotated[list[Timestep], Field(min_length=1)] = [400]
    """Timesteps whose attention is averaged when `inversion` is null."""
    inversion: Inversion | None = None
    """Null-text inversion; null: noise is added to the latent instead, at a hundredth of the cost."""
    cross_side: PositiveInt = 16
    """Side of the token grid whose cross-attention is read."""
    self_side: PositiveInt = 16
    """Side of the token grid whose self-attention is read."""
    anchor: Fraction = 0.6
    """Value of the min-max scaled phrase map above which a token is an anchor."""
    sam: str | None = None
    """Folder of SAM's masks for `diffpng_sam`: a JSON of COCO RLEs per test image, as `amg.py --convert-to-rle` writes them."""
    sam_overlap: Fraction = 0.6
    """Part of one of SAM's masks, or of the thresholded map, that must be common to both for the mask to be selected."""


class DiffSeg(Section):
    """DiffSeg."""

    timestep: Timestep = 300
    """Timestep of the forward pass. No noise is added to the image."""
    anchors: PositiveInt = 16
    """Side of the grid of anchors; it is limited to the side of the finest token grid."""
    sides: Annotated[list[PositiveInt], Field(min_length=1)] = [16, 8]
    """Sides of the token grids whose self-attention is aggregated."""
    tau: PositiveFloat = 0.1
    """Divergence below which attention maps are merged. It depends on `sides`; 1.1 was published for 64, 32, 16 and 8."""


class Baselines(StableDiffusion):
    """Baselines: attention-based methods and ground truth made inexact."""

    batch: PositiveInt = 32
    """Maximum number of phrases of an image in a forward pass. It affects masks only through rounding."""
    val_images: PositiveInt = 32
    """Number of val images, chosen by a hash, on which thresholds are selected."""
    thresholds: Annotated[list[Fraction], Field(min_length=1)] = [round(0.05 * step, 2) for step in range(1, 20)]
    """Candidate thresholds of min-max scaled maps."""
    attention: list[Attention] = ["cross_attention", "diffpng_cross", "diffpng_cross_self", "diffseg"]
    """Attention-based methods."""
    cross_attention: CrossAttention = CrossAttention()
    diffpng: DiffPng = DiffPng()
    diffseg: DiffSeg = DiffSeg()
    inexact: dict[Inexact, Annotated[float, Field(gt=0, lt=1)]] = {
        "box": 0.45,
        "dilated": 0.5,
        "eroded": 0.4,
        "shifted": 0.4,
        "scribble": 0.4,
    }
    """Mean IoU between each kind of inexact mask and the ground truth that it is made from."""

    @model_validator(mode="after")
    def _sam_has_masks(self) -> Self:
        if "diffpng_sam" in self.attention and self.diffpng.sam is None:
            raise ValueError("baselines.attention: diffpng_sam needs the folder of SAM's masks, baselines.diffpng.sam")
        return self
