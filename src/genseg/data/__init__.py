"""Data assembly: published formats and the embedded scenes -> phrase table, class phrases and a report.

A reader (`coco_panoptic`, `index_masks`, `coco_object`) scans the files once and returns a `Source`: the classes, one job per
image, and a pure function that reads the image of a job. `assemble` runs the jobs in order and writes the results. An invalid
row or image becomes a `Skip`, which the report counts. Only an invalid top-level file stops the assembly.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.phrases import BACKGROUND
from genseg.artifacts.seeds import derive_seed
from genseg.artifacts.templates import fill_template

PROGRESS_SECONDS = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class SemanticClass:
    """A class of the data set; `id` is its category id or mask index in the source."""

    id: int
    name: str
    is_thing: bool
    background: bool = False
    """Whether the class is the background, which is scored in mIoU but is not a phrase of the data."""


@dataclass(frozen=True)
class Skip:
    """An item of the data set that was skipped."""

    unit: str
    """`image`, `narrative`, `phrase` or `annotation`."""
    reason: str
    message: str
    """One line with the file, the row and the problem."""
    narratives: int = 0
    phrases: int = 0
    """Numbers of narratives and grounded phrases that are skipped with the item."""


@dataclass
class ImageRows:
    """Rows of the phrase table for one image."""

    image_id: int
    split: str
    file_name: str
    height: int = 0
    width: int = 0
    phrases: list[dict[str, Any]] = field(default_factory=list)
    """Columns of the phrase table that differ between the phrases of an image."""
    class_masks: dict[int, bytes] | None = None
    """RLE by class id, for the classes in the image; None if they are not needed (train)."""
    skips: list[Skip] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of `images`, `narratives`, `ungrounded` phrases and `segments`, and counts for the notes of the report."""


@dataclass
class Source:
    """A data set whose files are scanned but whose images are not read yet."""

    classes: list[SemanticClass]
    jobs: list[Any]
    """One job per image, in order; each has `image_id` and `split`."""
    read: Callable[[Any], ImageRows]
    """Function that reads the image of a job. It is pure and picklable, so that jobs can run in other processes."""
    inputs: list[Path]
    """Top-level files, whose hashes go into the manifest."""
    skips: list[Skip] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def class_rows(
    rows: ImageRows, classes: list[SemanticClass], templates: list[str], members: dict[int, list[int]], plural: set[int]
) -> list[dict[str, Any]]:
    """Return the phrases of an image without narratives: one for each class in `rows.class_masks` except the background.

    A hash of the image and the class selects the template. `phrase_id` is the index of the class, and the caption is the
    list of all phrases.

    Args:
        members: segment ids by class id, empty if the data set has none.
        plural: ids of the classes with several instances in the image.
    """
    class_masks, phrases = rows.class_masks or {}, []
    for index, item in enumerate(classes):
        if item.id in class_masks and not item.background:
            template = templates[derive_seed(0, "template", rows.image_id, item.id) % len(templates)]
            phrase = class_phrase("classes", index, item, template, class_masks[item.id])
            phrases.append(phrase | {"is_plural": item.id in plural, "segment_ids": members.get(item.id, [])})
    caption = ", ".join(phrase["phrase"] for phrase in phrases)
    return [phrase | {"caption": caption} for phrase in phrases]


def class_phrase(narrative_id: str, phrase_id: int, item: SemanticClass, template: str, mask: bytes) -> dict[str, Any]:
    """Return the row of the phrase of a class; the text is the template with the name of the class."""
    return {
        "narrative_id": narrative_id,
        "phrase_id": phrase_id,
        "caption": None,
        "phrase": fill_template(template, item.name)[0],
        "is_thing": item.is_thing,
        "is_plural": False,
        "class_id": item.id,
        "segment_ids": [],
        "mask": mask,
        "tags": [BACKGROUND] if item.background else [],
    }


def masks_by_class(labels: NDArray[np.integer], classes: list[SemanticClass]) -> dict[int, bytes]:
    """Return the RLE of every class that occurs in a map [H, W] of class ids. Other values in the map are ignored."""
    present = set(np.unique(labels).tolist())
    return {item.id: masks.encode(labels == item.id) for item in classes if item.id in present}
