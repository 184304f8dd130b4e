"""Params of the phase `data`: where images, masks and phrases come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from genseg.params.base import Fraction, Section, has_placeholder

Shape = Literal["circle", "square", "triangle", "star", "cross", "ring"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "white"]
Surface = Literal["plain", "striped", "dotted"]


class Scenes(Section):
    """Embedded data set, generated from a seed and written as COCO panoptic annotations and PNG narratives."""

    seed: int = 0
    """Seed from which the scenes are generated."""
    size: PositiveInt = 128
    """Side of the square images in pixels."""
    train_images: PositiveInt = 2000
    """Number of images in train and val together."""
    test_images: PositiveInt = 56
    """Number of images in test."""
    shapes: Annotated[list[Shape], Field(min_length=2)] = ["circle", "square", "star"]
    """Shapes of the things."""
    colours: Annotated[list[Colour], Field(min_length=2)] = ["red", "green", "blue", "yellow"]
    """Colours of the things."""
    surfaces: Annotated[list[Surface], Field(min_length=2)] = ["plain", "striped"]
    """Textures of the things. Shapes, colours and surfaces need two values each, so that distractors can differ in one."""
    radii: dict[Literal["small", "large"], tuple[Fraction, Fraction]] = {"small": (0.12, 0.15), "large": (0.20, 0.26)}
    """Minimum and maximum radius of small and large things, as a fraction of the image side."""
    most_things: PositiveInt = 3
    """Maximum number of things in an image."""
    hold_back: bool = True
    """Whether some (colour, shape) pairs, the compositional subset, occur in test only."""

    @field_validator("shapes", "colours", "surfaces")
    @classmethod
    def _are_distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("duplicate value")
        return value

    @field_validator("radii")
    @classmethod
    def _are_ascending(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        bounds = [0.0, *value.get("small", ()), *value.get("large", ()), 0.5]
        if len(bounds) < 6 or bounds != sorted(bounds) or bounds[1] == 0 or bounds[2] == bounds[3]:
            raise ValueError(
                "expected small: [min, max] and large: [min, max], ascending, above 0, at most 0.5, with a gap between them"
            )
        return value


class PngFolders(Section):
    """Folders of COCO panoptic annotations and Panoptic Narrative Grounding."""

    images: str
    """Folder with train2017/ and val2017/."""
    annotations: str
    """Folder of panoptic_{train,val}2017.json and of the PNG folders with the same names."""
    narratives: str
    """Folder of png_coco_{train,val}2017.json."""


class Png(PngFolders):
    """COCO panoptic annotations and Panoptic Narrative Grounding in their published layout."""

    download: bool = False
    """Whether missing files are downloaded from the sources in data/sources.csv."""
    classes: str | None = None
    """CSV of readable names of the categories (columns category, name), such as wall for wall-other-merged; null: their own."""
    more: list[PngFolders] = []
    """Further folders in the same layout, which belong to the same data set; an image in several of them is used once."""


class IndexMasks(Section):
    """Folder of images and folder of index masks (PNG, one class index per pixel)."""

    images: dict[Literal["train", "test"], str]
    """Image folders of train and test."""
    masks: dict[Literal["train", "test"], str]
    """Mask folders of train and test."""
    lists: dict[Literal["train", "test"], str] | None = None
    """Text files with one image stem per line, like VOC's ImageSets/Segmentation/train.txt; null: all images."""
    mask_suffix: str = ".png"
    """Suffix of a mask's file name after the image's stem, such as _labelTrainIds.png."""
    classes: str
    """Text file of class names in index order, one per line; `# thing` or `# stuff` and pixel values may follow a name."""
    ignore: list[int] = [255]
    """Pixel values that belong to no class, such as 255 (VOC) or 11 (CamVid)."""
    background: int | None = None
    """Index of the background class, which is scored but has no phrase; null: there is none."""


class CocoObject(Section):
    """COCO instances read as COCO-Object: 80 thing classes and a background."""

    images: str
    """Folder with train2017/ and val2017/."""
    annotations: str
    """Folder of instances_{train,val}2017.json."""


class Data(Section):
    """Data: where images, masks and phrases come from."""

    source: Literal["scenes", "png", "index_masks", "coco_object"] = "scenes"
    """Reader of the data."""
    scenes: Scenes | None = Field(default_factory=lambda fields: Scenes() if fields.get("source") == "scenes" else None)
    """Settings of `source: scenes`."""
    png: Png | None = None
    """Settings of `source: png`."""
    index_masks: IndexMasks | None = None
    """Settings of `source: index_masks`."""
    coco_object: CocoObject | None = None
    """Settings of `source: coco_object`."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Fraction of the train images, chosen by a hash of the image id, that are moved to val."""
    phrase_templates: list[str] = ["the {name}"]
    """Templates of the phrases of data without narratives."""
    class_template: str = "the {name}"
    """Template of the class phrases, from which mIoU is computed."""

    @model_validator(mode="after")
    def _source_has_settings(self) -> Self:
        if getattr(self, self.source) is None:
            raise ValueError(f"data.{self.source} must not be null when data.source is {self.source}")
        for template in [*self.phrase_templates, self.class_template]:
            if not has_placeholder(template, "{name}"):
                raise ValueError(f"template {template!r} must contain {{name}} once and no other braces")
        return self
