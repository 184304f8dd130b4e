"""Every knob of a study: one typed, validated document, one class per phase.

A params file is *complete*: no key has a default here, because Snakemake and DVC only see what stands in the
file. Unknown keys are errors that name the nearest valid one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from genseg.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Guidance = Annotated[float, Field(ge=1, lt=100)]
ImageSize = Annotated[int, Field(gt=0, lt=10_000)]
Steps = Annotated[int, Field(gt=0, le=1000)]

DevicePreference = Literal["auto", "cpu", "cuda"]
Prediction = Literal["noise", "v", "x0"]
Protocol = Literal["native", "png-official", "ppmn"]
Rule = Literal["ddim", "ddpm", "dpmpp"]
Interval = tuple[Fraction, Fraction]
Readout = Literal["bilinear", "nearest", "vae"]
Label = Literal["mask", "vae"]
Part = Literal["main", "controls", "grid", "val"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Document = TypeVar("Document", bound=Section)


def _has_one(template: str, place: str) -> bool:
    """Whether `place` (`{name}`) stands in a template, once, and nothing else in braces."""
    return template.count(place) == 1 and not set(template.replace(place, "")) & {"{", "}"}


# ------------------------------------------------------------------------------------------------------- data
class Scenes(Section):
    """The embedded data set, generated from a seed and written as COCO panoptic + PNG narratives."""

    seed: int
    size: Positive
    """Side of the square pictures in pixels."""
    train_images: Positive
    test_images: Positive
    shapes: Annotated[list[Literal["circle", "square", "triangle", "star", "cross", "ring"]], Field(min_length=2)]
    colours: Annotated[list[Literal["red", "green", "blue", "yellow", "purple", "white"]], Field(min_length=2)]
    surfaces: Annotated[list[Literal["plain", "striped", "dotted"]], Field(min_length=2)]
    """What things look like: distractors differ in one of these, so each needs two values."""
    radii: dict[Literal["small", "large"], tuple[Fraction, Fraction]]
    """Radius of a thing as a part of the picture's side, from and to; a gap between them keeps the words unambiguous."""
    most_things: Positive
    hold_back: bool
    """Keep some (colour, shape) pairs out of the training scenes: what only the test scenes show is the compositional part."""

    @field_validator("shapes", "colours", "surfaces")
    @classmethod
    def each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("name each once")
        return value

    @field_validator("radii")
    @classmethod
    def small_is_under_large(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        bounds = [0.0, *value.get("small", ()), *value.get("large", ()), 0.5]
        if len(bounds) < 6 or bounds != sorted(bounds) or bounds[1] == 0 or bounds[2] == bounds[3]:
            raise ValueError("give small: [from, to] and large: [from, to], ascending, over 0, at most 0.5, a gap between them")
        return value


class Png(Section):
    """COCO panoptic + Panoptic Narrative Grounding, in their published layout.

    `images` holds `train2017/` and `val2017/`; `annotations` holds `panoptic_{train,val}2017.json` and the folders
    of PNGs of the same names; `narratives` holds `png_coco_{train,val}2017.json`.
    """

    images: str
    annotations: str
    narratives: str
    download: bool
    """Fetch what is missing (resumed, checksummed) from `data/sources.csv` before reading."""


class IndexMasks(Section):
    """A folder of images and a folder of index masks (PNG, one class index a pixel), and the classes' names."""

    images: dict[Literal["train", "test"], str]
    masks: dict[Literal["train", "test"], str]
    lists: dict[Literal["train", "test"], str] | None
    """Text files of image stems, one a line (VOC's `ImageSets/Segmentation/train.txt`); null: every image of the folder."""
    mask_suffix: str
    """What the mask's file name has after the image's stem, e.g. `.png` or `_labelTrainIds.png`."""
    classes: str
    """Text file, one line a class in index order; `# thing` or `# stuff` may follow the name."""
    ignore: list[int]
    """Indices that are no class, e.g. 255 (VOC) or 11 (CamVid)."""
    background: int | None
    """Index of the background class, which is scored but never a phrase; null where there is none."""


class CocoObject(Section):
    """COCO instances read as COCO-Object: 80 things and a background."""

    images: str
    annotations: str
    """Folder of `instances_{train,val}2017.json`."""


class Data(Section):
    source: Literal["scenes", "png", "index_masks", "coco_object"]
    scenes: Scenes | None
    png: Png | None
    index_masks: IndexMasks | None
    coco_object: CocoObject | None
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Part of the train images set apart by a hash of their id for every choice; test is scored once."""
    phrase_templates: list[str]
    """How a class name becomes a phrase where the data have no narratives, e.g. `a photo of a {name}`."""
    class_template: str
    """How a class name becomes the *class phrase* that mIoU is computed from."""

    @model_validator(mode="after")
    def chosen_source_is_described(self) -> Data:
        if getattr(self, self.source) is None:
            raise ValueError(f"data.source is {self.source}, so data.{self.source} must not be null")
        for template in [*self.phrase_templates, self.class_template]:
            if not _has_one(template, "{name}"):
                raise ValueError(f"template {template!r}: write {{name}} where the class name goes, once, and no other braces")
        return self


# --------------------------------------------------------------------------------------------------- backbone
class BackboneShape(Section):
    """Shape of a miniature SDXL-inpainting pipeline trained from scratch."""

    unet_channels: list[Positive]
    transformer_layers: list[Positive]
    attention_head_channels: Positive
    vae_channels: list[Positive]
    """One entry a level; the down-sampling factor is 2 ** (levels - 1)."""
    text_width: Positive
    text_layers: Positive
    vocabulary: Positive
    """Most tokens of the byte-pair vocabulary learned from the training captions."""


class BackboneTraining(Section):
    steps: NonNegative
    batch: Positive
    lr: PositiveFloat
    precision: Literal["fp32", "bf16"]


class Backbone(Section):
    init: str | None
    """Diffusers directory or hub id of an SDXL-inpainting pipeline; null: random weights of `shape`."""
    revision: str | None
    shape: BackboneShape | None
    size: ImageSize
    """Side that images are resized to when the backbone is trained or its VAE measured."""
    vae: BackboneTraining
    """Fits the autoencoder to the study's training images; 0 steps leave it as it is."""
    unet: BackboneTraining
    """Trains U-Net (and, from scratch, the text encoders) as text-to-image in-painting on the training images."""

    @model_validator(mode="after")
    def one_origin(self) -> Backbone:
        if (self.init is None) == (self.shape is None):
            raise ValueError("exactly one of backbone.init and backbone.shape must be given, the other null")
        return self


# ------------------------------------------------------------------------------------------------------ latents
class Latents(Section):
    batch: Positive
    shard_rows: Positive
    """Rows of one safetensors shard: the unit of resume."""
    precision: Literal["fp32", "fp16", "bf16"]
    """Of the stored tensors; encoding itself runs in `encode_precision`."""
    encode_precision: Literal["fp32", "bf16"]
    """fp16 is not offered: SDXL's VAE gives NaN in it."""


# -------------------------------------------------------------------------------------------------------- train
class Optimizer(Section):
    name: Literal["adam", "adamw"]
    lr: PositiveFloat
    lr_new: PositiveFloat | None
    """Learning rate of the new layers (conv_in, conv_out, adapter, nulls); null: one parameter group, as the paper."""
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[Fraction, Fraction]
    gradient_clip: PositiveFloat | None
    warmup_steps: NonNegative
    schedule: Literal["constant", "cosine"]


class Stage(Section):
    """Training that goes on from the averaged weights of what came before, with a fresh optimiser and schedule.

    `distill` (Meng et al. 2023, arXiv 2210.03142): the student's one pass at x_t learns the answer that the frozen model gives
    there with guidance w, so w = 1 then samples as w did, at half the evaluations. `task`: BCE + Dice on the estimate of
    x_0 from pure noise at the last timestep, which is what one step at w = 1 asks for.
    """

    objective: Literal["distill", "task"]
    steps: Positive
    lr_factor: PositiveFloat
    """On the learning rates of `optimizer`."""
    guidance: Guidance | None
    """w of the teacher; null for `task`."""

    @model_validator(mode="after")
    def guidance_is_the_teachers(self) -> Stage:
        if (self.objective == "distill") != (self.guidance is not None):
            raise ValueError("guidance belongs to objective distill; give null for task")
        return self


class Train(Section):
    size: ImageSize
    """Side of the square image; the label latent has side size / VAE factor."""
    label: Label
    """What is denoised: the mask as a 1-channel map at latent size, or as a grey image in the VAE's latent channels."""
    prediction: Prediction
    """What the network predicts: the paper's noise (Eq. 7), v, or x_0 / b."""
    zero_terminal_snr: bool
    label_scale: PositiveFloat
    """b: the mask is x_0 in [-b, b]."""
    task_weight: Annotated[float, Field(ge=0)]
    """Weight of BCE + Dice on the estimate of x_0, added to the diffusion loss; 0 in the paper."""
    task_size: ImageSize | None
    """Side that the estimate is up-sampled to, bilinearly, for BCE + Dice; null: as it is, at latent size."""
    p_last: Fraction
    """Probability of the last timestep, where x_t is pure noise; else t is uniform. 0 in the paper."""
    image_columns: Literal["masked_image", "latent"]
    """Which pretrained conv_in columns the image latent inherits: 5:9 (masked image) or 0:4 (noisy latent)."""
    text: Literal["tokens", "pooled"]
    """e_i^t as the token sequence (Eq. 3's M tokens) or as one pooled token (Eq. 2's "global")."""
    inject: Literal["all", "none"]
    """Token-level adapter injection into self-attention (Eq. 3-5)."""
    p_drop: Fraction
    batch: Positive
    """Global batch: independent of micro-batch, devices and workers."""
    micro_batch: Positive
    """Rows that one device computes at a time."""
    sharding: Literal["replicate", "shard"]
    """Of several GPUs (`resources.train.gpu`): each holds everything (DDP), or its part of weights, gradients and moments
    (FSDP). One GPU holds everything in either."""
    steps: Positive | None
    epochs: Positive | None
    stages: list[Stage]
    """What follows these steps, for the label-diffusion model."""
    optimizer: Optimizer
    ema: Annotated[float, Field(ge=0, lt=1)] | None
    precision: Literal["fp32", "bf16", "fp16"]
    gradient_checkpointing: bool
    flip: bool
    """Mirror images and masks at random. Off where phrases say left or right."""
    log_every: Positive
    validate_every: Positive
    validate_phrases: Positive
    checkpoint_every: Positive

    @model_validator(mode="after")
    def consistent(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("exactly one of train.steps and train.epochs must be given, the other null")
        if self.batch % self.micro_batch:
            raise ValueError(f"train.batch {self.batch} is no multiple of train.micro_batch {self.micro_batch}")
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ValueError("train.prediction: noise is undefined at zero terminal SNR (train.zero_terminal_snr); use v or x0")
        if self.task_weight and self.prediction == "noise":
            raise ValueError("train.task_weight needs an estimate of x_0 at every timestep: use train.prediction v or x0")
        task = any(stage.objective == "task" for stage in self.stages)
        if task and self.prediction == "noise":
            raise ValueError(
                "a stage with objective task needs an estimate of x_0 from pure noise: use train.prediction v or x0"
            )
        if self.label == "vae" and (self.task_weight or task):
            raise ValueError("BCE + Dice (train.task_weight, objective task) is of masks; train.label vae has none to compare")
        if self.p_last and not self.zero_terminal_snr:
            raise ValueError("train.p_last needs train.zero_terminal_snr: without it the last timestep is not pure noise")
        return self


# ---------------------------------------------------------------------------------------------------- baselines
Inexact = Literal["box", "dilated", "eroded", "shifted", "scribble"]
Timestep = Annotated[int, Field(ge=0, lt=1000)]


class Inversion(Section):
    """Null-text inversion (Mokady et al. 2023)."""

    steps: Annotated[int, Field(gt=0, lt=1000)]
    guidance: Guidance
    inner_steps: NonNegative
    """Most Adam steps on the null text at each denoising step."""
    lr: PositiveFloat
    tolerance: PositiveFloat
    """Squared error under which a step's null text is good enough."""


class CrossAttention(Section):
    timesteps: Annotated[list[Timestep], Field(min_length=1)]
    """Noise levels whose maps are averaged, one pass each."""


class DiffPng(Section):
    timesteps: Annotated[list[Timestep], Field(min_length=1)]
    """Noise levels whose attention is averaged where there is no inversion."""
    inversion: Inversion | None
    """Null-text inversion, whose replay's attention is averaged; null: noise is added instead, at a hundredth of the cost."""
    cross_side: Positive
    """Side of the token grid whose cross-attention is read; the nearest one that the U-Net has."""
    self_side: Positive
    """Likewise of self-attention."""
    anchor: Fraction
    """A token whose min-max scaled phrase map is over this is an anchor."""


class DiffSeg(Section):
    timestep: Timestep
    """Of the one pass; no noise is added to the image."""
    anchors: Positive
    """Side of the grid of anchors, clipped to the finest token grid."""
    tau: PositiveFloat
    """Divergence under which attention maps are merged."""
    iterations: Positive


class Baselines(Section):
    backbone: str | None
    """Diffusers directory or hub id of a Stable Diffusion to attend with; null: the study's own backbone."""
    revision: str | None
    size: ImageSize
    """Side that images are resized to."""
    precision: Literal["fp32", "bf16", "fp16"]
    batch: Positive
    """Most phrases of an image in one pass; masks do not depend on it beyond float rounding."""
    prompt: str
    """How a phrase becomes a prompt, e.g. `a photo of {phrase}`."""
    visible: bool
    """What an in-painting backbone is told: the whole image and nothing to paint, or (false) nothing but the noisy latent."""
    val_images: Positive
    """Images of val, chosen by hash, that thresholds are chosen on."""
    thresholds: Annotated[list[Fraction], Field(min_length=1)]
    """What is tried as a threshold of min-max scaled maps."""
    cross_attention: CrossAttention
    diffpng: DiffPng
    diffseg: DiffSeg
    inexact: dict[Inexact, Annotated[float, Field(gt=0, lt=1)]]
    """Mean IoU with the ground truth that each kind of inexact masks is made to have."""

    @field_validator("prompt")
    @classmethod
    def prompt_has_a_phrase(cls, value: str) -> str:
        if not _has_one(value, "{phrase}"):
            raise ValueError("write {phrase} where the phrase goes, once")
        return value


# ------------------------------------------------------------------------------------------------------- sample
def step_is_guided(position: int, steps: int, guidance: float, interval: Interval | None) -> bool:
    """Whether step `position` of `steps` (0: from pure noise) is taken with classifier-free guidance.

    Args:
        interval: from and to, inclusive, as parts of the schedule: the step starts at (steps - position) / steps, which on
            the trailing grid is t / 1000. None: always.
    """
    start = (steps - position) / steps
    return guidance != 1 and (interval is None or interval[0] <= start <= interval[1])


class Point(Section):
    """How a mask is sampled. An *evaluation* is one U-Net pass for one phrase; a guided step costs two."""

    steps: Steps
    guidance: Guidance
    rule: Rule = "ddim"
    """Update rule: section 4.2 of the paper says DDIM, Eq. 11 DDPM; dpmpp is DPM-Solver++(2M)."""
    guidance_interval: Interval | None = None
    """Part of the schedule that is guided (1: pure noise, 0: the clean label); outside it w = 1. null: all of it."""
    ensemble: Annotated[int, Field(gt=0, lt=100)] = 1
    """Samples of different seeds whose soft maps are averaged."""

    @model_validator(mode="after")
    def interval_ascends(self) -> Point:
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {list(self.guidance_interval)} must ascend")
        return self

    def __str__(self) -> str:
        """As tables and messages call it; what is the plain sampler's is left out."""
        names = {"ddim": "", "ddpm": ", DDPM", "dpmpp": ", DPM-Solver++"}
        interval = f" in [{self.guidance_interval[0]:g}, {self.guidance_interval[1]:g}]" if self.guidance_interval else ""
        several = f", mean of {self.ensemble}" if self.ensemble > 1 else ""
        return f"{self.steps} step{'s' * (self.steps > 1)}, w = {self.guidance:g}{interval}{names[self.rule]}{several}"

    @property
    def evaluations(self) -> int:
        """Per mask."""
        guided = sum(step_is_guided(i, self.steps, self.guidance, self.guidance_interval) for i in range(self.steps))
        return self.ensemble * (self.steps + guided)


class Cell(Point):
    """A point at an image size, as in the sampling grid."""

    size: ImageSize

    def __str__(self) -> str:
        """As tables and messages call it."""
        return f"size {self.size}, {super().__str__()}"

    @staticmethod
    def of(run: Mapping[str, Any]) -> Cell:
        """The cell of a run as a manifest or a scores file tells it."""
        return Cell.model_validate({name: run[name] for name in Cell.model_fields if run.get(name) is not None})


class Grid(Section):
    sizes: list[ImageSize]
    steps: list[Steps]
    guidance: list[Guidance]


class Sample(Section):
    runs: Annotated[list[Part], Field(min_length=1)]
    """Which runs are sampled: the main row; its controls (permuted text, class phrases, colours, the discriminative model,
    which is trained for them alone); the grid on its part of test; the operating points on val. Tables need all four."""
    main: Cell
    """The operating point of the main row, on all of test."""
    base: Cell
    """The row that Tables 3-5 share; one coordinate at a time is replaced by the entries of `grid`."""
    grid: Grid
    grid_fraction: Annotated[float, Field(gt=0, le=1)]
    """Part of the test phrases (a fixed, hash-chosen set of images) the grid runs on; the paper's 4.4 took 7 %."""
    points: list[Point]
    """Operating points, at the main size, for the table of AR against evaluations: on the grid's phrases and, with the main
    point, on a part of val, which is where the main point and its threshold are chosen."""
    select_fraction: Annotated[float, Field(gt=0, le=1)]
    """That part of the val phrases: a fixed, hash-chosen set of images."""
    spacing: Literal["trailing", "leading"]
    clip_x_0: bool
    """Bound the estimate of x_0 by the label scale in every step."""
    readout: Readout
    threshold: Fraction
    batch: Positive
    """Phrases of one block; masks do not depend on it beyond float rounding."""
    shards: Positive
    """Jobs one size is cut into; the bytes of the result do not depend on it."""
    precision: Literal["fp32", "bf16", "fp16"]

    def cells(self) -> list[Cell]:
        """The grid: base with one coordinate replaced at a time, and base without guidance (Fig. 4), each once."""
        base = self.base
        found = [base]
        found += [base.model_copy(update={"size": size}) for size in self.grid.sizes]
        found += [base.model_copy(update={"steps": steps}) for steps in self.grid.steps]
        found += [base.model_copy(update={"guidance": guidance}) for guidance in self.grid.guidance]
        found += [base.model_copy(update={"guidance": 1.0})]
        return list(dict.fromkeys(found))

    def operating_points(self) -> list[Cell]:
        """The main point and `points`, each once."""
        points = [Cell(size=self.main.size, **point.model_dump()) for point in self.points]
        return list(dict.fromkeys([self.main, *points]))

    def grid_cells(self) -> list[Cell]:
        """All cells that are sampled on the grid's phrases, base first."""
        return list(dict.fromkeys([*self.cells(), *self.operating_points()]))

    def sizes(self) -> list[int]:
        """Sizes that images are encoded at."""
        return sorted({self.main.size, *(cell.size for cell in self.cells())})

    def run_sizes(self) -> list[int]:
        """Sizes of the runs that are sampled."""
        return self.sizes() if "grid" in self.runs else [self.main.size]

    def is_whole(self) -> bool:
        """Whether the runs are all that tables need."""
        return set(self.runs) == set(get_args(Part))


# ------------------------------------------------------------------------------------------------------- refine
class Upsampling(Section):
    """Guided filter (He, Sun and Tang, 2013) with the picture as guide."""

    radius: PositiveFloat
    """Of its windows, as a part of the picture's longer side."""
    epsilon: PositiveFloat
    """Ridge of its regressions: colour variance (intensities in [0, 1]) under which a window counts as flat."""
    rounds: Positive


Control = Literal[
    "alpha_zero",
    "gate",
    "no_gate",
    "no_choice",
    "no_generation",
    "upsampling_only",
    "unconditioned",
    "random",
    "crf",
    "g4seg_crf",
    "trained",
]


class Sensitivity(Section):
    """Values that one constant of G4Seg takes instead of its own, one at a time, on some of the baselines."""

    baselines: list[str]
    controls: list[Control]
    """Controls that these baselines have beside those of all. Of `gate` and `no_gate` the one that changes something counts."""
    alpha: list[Fraction]
    beta: list[Fraction]
    timestep: list[Timestep]
    """Alone, instead of all of `timesteps`."""
    iterations: list[NonNegative]
    layer: list[NonNegative]
    """Alone, instead of all of `layers`."""


class Crf(Section):
    """Constants of the dense-CRF control (Krähenbühl & Koltun 2011)."""

    iterations: Positive
    gaussian_sxy: PositiveFloat
    """Standard deviation of k_1 in pixels."""
    gaussian_weight: Annotated[float, Field(ge=0)]
    bilateral_sxy: PositiveFloat
    """Standard deviation of k_2 in pixels."""
    bilateral_srgb: PositiveFloat
    """Standard deviation of k_2 in grey levels, of 0 to 255."""
    bilateral_weight: Annotated[float, Field(ge=0)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    """Probability that a hard coarse mask gives every pixel to have its label."""


class TrainedRefiner(Section):
    """The control that is trained: a small network, on the training phrases' ground truth made inexact."""

    steps: Positive
    batch: Positive
    lr: PositiveFloat
    size: Annotated[int, Field(gt=0, multiple_of=16)]
    """Side that pictures and masks are resized to."""


class Levels(Section):
    timesteps: Annotated[list[Annotated[int, Field(ge=0, lt=1000)]], Field(min_length=1)]
    noises: Positive


class Refine(Section):
    """G4Seg (ours). No value of the paper is known; these were chosen on val."""

    backbone: str | None
    """Diffusers directory or hub id of a Stable Diffusion to refine with; null: the study's own backbone."""
    revision: str | None
    precision: Literal["fp32", "bf16", "fp16"]
    size: ImageSize
    """Side that images are resized to."""
    grid: Positive
    """Side of the grid on which features are compared and P lives."""
    batch: Positive
    """Phrases of one block; masks do not depend on it beyond float rounding."""
    prompt: str
    """How a phrase becomes a prompt, e.g. `a photograph of a {phrase}`."""
    timesteps: Annotated[list[Annotated[int, Field(ge=0, lt=1000)]], Field(min_length=1)]
    """Noise levels t; distances are averaged over them."""
    noises: Positive
    """Noises a level."""
    layers: Annotated[list[NonNegative], Field(min_length=1)]
    """Up-blocks whose outputs are the features, counted from 0."""
    generation: Fraction
    """Share of the mask-conditioned image in the distances: D = (1 - share) D(F_o, F_o) + share D(F_o, F_g); 0 is feature
    matching alone, F_g := F_o."""
    levels: list[Annotated[float, Field(gt=0, lt=1)]]
    """Quantiles of the evidence in the confusion area at which it may be cut, besides 0; the mask under which the generated
    image is nearest to the original decides, and P stays where that is P itself. []: cut at 0, always."""
    choice: Levels
    """Noise levels at which that is seen."""
    reference: Literal["original", "unconditioned"]
    """What it is compared with: the original image, or one generated without the mask."""
    inject: Annotated[list[Literal["cross", "self"]], Field(min_length=1)]
    """Kinds of attention that the mask is injected into."""
    alpha: Fraction
    """Strength of the injection; 0 is the stock network."""
    beta: Fraction
    """How much of P stays in an update; 1 changes nothing."""
    iterations: NonNegative
    neighbours: Positive
    """k: nearest cells of a region that its distance is the mean over."""
    temperature: PositiveFloat
    """T of Q = sigmoid((d_b - d_f) / T)."""
    spatial: Annotated[float, Field(ge=0)]
    """Added to a distance for cells one side of the picture apart (it grows with the square): near cells match first."""
    confident: tuple[Fraction, Fraction]
    """Under the first P is background for sure, over the second foreground; between them it is undecided."""
    band: Fraction
    """Half-width of the confusion area about the mask's boundary, as a part of the picture's side."""
    blur: Annotated[float, Field(ge=0)]
    """Standard deviation in cells of the Gaussian that softens the coarse mask."""
    clip: Annotated[float, Field(ge=0, lt=0.5)]
    """The softened coarse mask stays this far from 0 and 1."""
    gate: bool
    """Weigh updates by the discrepancy g."""
    upsampling: Upsampling | None
    """How the refined map becomes a native mask; null: bilinearly."""
    maps: NonNegative
    """Side of the refined soft maps that are stored where the coarse ones have some; 0: none."""
    test_fraction: Annotated[float, Field(gt=0, le=1)]
    """Part of test (a fixed, hash-chosen set of images) whose masks are refined: phrases and class phrases of all baselines."""
    controls: list[Control]
    """What stands beside G4Seg in the table of controls, on all baselines."""
    sensitivity: Sensitivity
    crf: Crf
    trained: TrainedRefiner
    pictures: NonNegative
    """Phrases of each baseline whose maps are kept for the figure."""
    shards: Positive
    """Jobs that the baselines are dealt to; the bytes of the result do not depend on it."""

    @field_validator("prompt")
    @classmethod
    def prompt_has_a_phrase(cls, value: str) -> str:
        if not _has_one(value, "{phrase}"):
            raise ValueError("write {phrase} where the phrase goes, once")
        return value

    @field_validator("confident")
    @classmethod
    def confident_is_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < 0.5 < value[1]:
            raise ValueError("the first must lie under 0.5 and the second over it")
        return value


# ------------------------------------------------------------------------------------------------ score, tables
class Score(Section):
    protocol: Protocol
    """Of the main number; the other protocols are reported beside it."""
    also: list[Protocol]
    bootstrap: NonNegative
    boundary_ratio: PositiveFloat
    """Width of the boundary band of boundary IoU as a part of the image diagonal (0.02 in its paper)."""
    background_threshold: Fraction
    """Score under which a pixel is background in the mIoU of data sets that have a background class."""


class Tables(Section):
    examples: Positive
    """Pictures in the figure, at equidistant quantiles of the main row's IoU."""
    dpi: Positive


class Resources(Section):
    """What one job of a phase asks of the scheduler."""

    gpu: NonNegative
    mem_mb: Positive
    runtime: Positive
    """Minutes."""
    threads: Positive


PHASES = ("data", "backbone", "latents", "train", "baselines", "sample", "refine", "score", "tables")


class Params(Section):
    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    device: DevicePreference
    seed: int
    data: Data
    backbone: Backbone
    latents: Latents
    train: Train
    baselines: Baselines
    sample: Sample
    refine: Refine
    score: Score
    tables: Tables
    resources: dict[
        Literal["data", "backbone", "latents", "train", "baselines", "sample", "refine", "score", "tables"], Resources
    ]

    @field_validator("resources")
    @classmethod
    def every_phase_has_resources(cls, value: dict[str, Resources]) -> dict[str, Resources]:
        missing = [phase for phase in PHASES if phase not in value]
        if missing:
            raise ValueError(f"resources lacks {', '.join(missing)}")
        return value

    @model_validator(mode="after")
    def spacing_fits_the_schedule(self) -> Params:
        if self.sample.spacing == "leading" and self.train.zero_terminal_snr:
            raise ValueError(
                "sample.spacing leading never asks at the last timestep, where train.zero_terminal_snr starts from pure noise; "
                "use trailing"
            )
        cells = [self.sample.main, *self.sample.cells(), *self.sample.operating_points()]
        if self.sample.spacing == "leading" and any(cell.steps == 1000 for cell in cells):
            raise ValueError("sample.spacing leading has no grid of 1000 steps; use trailing or at most 999")
        return self

    @model_validator(mode="after")
    def sampling_fits_the_label(self) -> Params:
        if self.train.label == "vae" and (self.sample.clip_x_0 or self.sample.readout == "vae"):
            raise ValueError(
                "with train.label vae, sample.clip_x_0 must be false (a VAE's latents have no bound) and sample.readout "
                "bilinear or nearest (maps are decoded as they are sampled)"
            )
        return self

    def other_readouts(self) -> list[Readout]:
        """What the study's read-out is compared with. The maps of VAE labels are decoded as they are sampled."""
        every: tuple[Readout, ...] = ("bilinear", "nearest", "vae") if self.train.label == "mask" else ("bilinear", "nearest")
        return [other for other in every if other != self.sample.readout]

    # Where things lie. One place, so that no two rooms can disagree.
    @property
    def data_dir(self) -> Path:
        return Path("data") / self.study

    @property
    def imported_dir(self) -> Path:
        """Predictions of other people's methods (`genseg import`): an input, like the pictures."""
        return Path("data/imported") / self.study

    @property
    def results_dir(self) -> Path:
        return Path("results") / self.study

    @property
    def work_dir(self) -> Path:
        return Path("work") / self.study

    def subtree(self, *keys: str) -> dict[str, Any]:
        """The named parts (dotted keys) as plain JSON values, e.g. `subtree("seed", "sample.main")`."""
        document = self.model_dump(mode="json")
        return {key: _at(document, key) for key in keys}


def _at(document: Any, key: str) -> Any:
    for part in key.split("."):
        document = document[part]
    return document


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 16) -> str:
    """Short content hash of any JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def load_params(path: str | Path) -> Params:
    """Read and validate a params file (YAML or JSON).

    Raises:
        UserError: the file is missing or no mapping, or a key is unknown, missing or out of range; the message names
            the key and, for an unknown one, the nearest valid name.
    """
    return validate_params(read_document(path, "params"), origin=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML as DVC takes it: a key that stands twice is a mistake, not the last one's victory."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def read_document(path: str | Path, kind: str) -> Any:
    """Parse a YAML file; raises UserError naming it and the option `--<kind>` that gives another."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {kind} file ({error.strerror}); give one with --{kind} FILE") from None
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def validate_params(document: Any, origin: str = "params") -> Params:
    """Validate a params document that was already parsed, e.g. Snakemake's config."""
    return validate(Params, document, origin)


def validate(schema: type[Document], document: Any, origin: str) -> Document:
    """Validate a parsed document of any schema. Raises UserError that names key and remedy."""
    if not isinstance(document, dict):
        raise UserError(f"{origin}: expected a mapping at the top level, got {type(document).__name__}")
    try:
        valid = schema.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(item, schema) for item in error.errors())) from None
    if key := _truth_as_number(document, valid.model_dump(mode="json")):
        raise UserError(f"{origin}: {key}: true and false are no numbers")
    return valid


def _truth_as_number(given: Any, taken: Any, key: str = "") -> str | None:
    """The first key where `true` or `false` was given and 1 or 0 was taken, as pydantic does."""
    if isinstance(given, bool):
        return key if not isinstance(taken, bool) else None
    if isinstance(given, dict) and isinstance(taken, dict):
        children = [(str(name), value, taken.get(str(name))) for name, value in given.items()]
    elif isinstance(given, list) and isinstance(taken, list):
        children = [(str(index), *both) for index, both in enumerate(zip(given, taken, strict=True))]
    else:
        return None
    return next(filter(None, (_truth_as_number(a, b, f"{key}.{name}".lstrip(".")) for name, a, b in children)), None)


def _explain(item: Any, schema: type[Section]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        names = _names_beside(location, schema)
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"valid here: {', '.join(names)}"
        return f"unknown key {key}; {hint}"
    if item["type"] == "missing":
        return f"key {key} is missing; every knob stands in the params file"
    message = item["msg"].removeprefix("Value error, ")
    given = f" (given: {item['input']!r})" if not isinstance(item["input"], dict) else ""
    return f"{key or 'document'}: {message}{given}"


def _names_beside(location: list[str], model: type[Section]) -> list[str]:
    """Valid names at the place of an unknown key, found by walking the schema."""
    schema: dict[str, Any] = model.model_json_schema()
    definitions = schema["$defs"]

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while True:
            if "$ref" in node:
                node = definitions[node["$ref"].rsplit("/", 1)[1]]
            elif "anyOf" in node:
                node = next((option for option in node["anyOf"] if "$ref" in option), node["anyOf"][0])
            else:
                return node

    node = schema
    for part in location[:-1]:
        parent = resolve(node)
        node = parent.get("properties", {}).get(part) or parent.get("additionalProperties") or parent.get("items") or {}
        node = node or next(iter(parent.get("patternProperties", {}).values()), {})
    return list(resolve(node).get("properties", {}))
