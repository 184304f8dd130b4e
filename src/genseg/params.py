"""Every knob of a study: one typed, validated document, one class per phase.

A params file is *complete*: no key has a default here, because Snakemake and DVC only see what stands in the
file. Unknown keys are errors that name the nearest valid one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

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
Readout = Literal["bilinear", "nearest", "vae"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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
            if "{name}" not in template:
                raise ValueError(f"template {template!r} has no {{name}}")
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


class Train(Section):
    size: ImageSize
    """Side of the square image; the label latent has side size / VAE factor."""
    prediction: Prediction
    """What the network predicts: the paper's noise (Eq. 7), v, or x_0 / b."""
    zero_terminal_snr: bool
    label_scale: PositiveFloat
    """b: the mask is x_0 in [-b, b]."""
    task_weight: Annotated[float, Field(ge=0)]
    """Weight of BCE + Dice on the estimate of x_0, added to the diffusion loss; 0 in the paper."""
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
    steps: Positive | None
    epochs: Positive | None
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
        return self


# ------------------------------------------------------------------------------------------------------- sample
class Cell(Section):
    """One point of the sampling grid. An *evaluation* is one U-Net pass for one phrase; guidance > 1 costs two."""

    size: ImageSize
    steps: Steps
    guidance: Guidance

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)


class Grid(Section):
    sizes: list[ImageSize]
    steps: list[Steps]
    guidance: list[Guidance]


class Sample(Section):
    main: Cell
    """The operating point of the main row, on all of test."""
    base: Cell
    """The row that Tables 3-5 share; one coordinate at a time is replaced by the entries of `grid`."""
    grid: Grid
    grid_fraction: Annotated[float, Field(gt=0, le=1)]
    """Part of the test phrases (a fixed, hash-chosen set of images) the grid runs on; the paper's 4.4 took 7 %."""
    rule: Literal["ddim", "ddpm"]
    """Update rule: section 4.2 of the paper says DDIM, Eq. 11 DDPM."""
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

    def sizes(self) -> list[int]:
        return sorted({self.main.size, *(cell.size for cell in self.cells())})


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


PHASES = ("data", "backbone", "latents", "train", "sample", "score", "tables")


class Params(Section):
    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    device: DevicePreference
    seed: int
    data: Data
    backbone: Backbone
    latents: Latents
    train: Train
    sample: Sample
    score: Score
    tables: Tables
    resources: dict[Literal["data", "backbone", "latents", "train", "sample", "score", "tables"], Resources]

    @field_validator("resources")
    @classmethod
    def every_phase_has_resources(cls, value: dict[str, Resources]) -> dict[str, Resources]:
        missing = [phase for phase in PHASES if phase not in value]
        if missing:
            raise ValueError(f"resources lacks {', '.join(missing)}")
        return value

    # Where things lie. One place, so that no two rooms can disagree.
    @property
    def data_dir(self) -> Path:
        return Path("data") / self.study

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
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot read the params file ({error.strerror}); give one with --params FILE") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return validate_params(document, origin=str(path))


def validate_params(document: Any, origin: str = "params") -> Params:
    """Validate a params document that was already parsed, e.g. Snakemake's config."""
    if not isinstance(document, dict):
        raise UserError(f"{origin}: expected a mapping of params at the top level, got {type(document).__name__}")
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        names = _names_beside(location)
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"valid here: {', '.join(names)}"
        return f"unknown key {key}; {hint}"
    if item["type"] == "missing":
        return f"key {key} is missing; every knob stands in the params file"
    message = item["msg"].removeprefix("Value error, ")
    given = f" (given: {item['input']!r})" if not isinstance(item["input"], dict) else ""
    return f"{key or 'document'}: {message}{given}"


def _names_beside(location: list[str]) -> list[str]:
    """Valid names at the place of an unknown key, found by walking the schema."""
    schema: dict[str, Any] = Params.model_json_schema()
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
        node = resolve(node)
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    return list(resolve(node).get("properties", {}))
