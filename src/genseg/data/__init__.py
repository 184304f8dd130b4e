"""Data assembly: published formats and the embedded scenes -> phrase table, class phrases and a report.

A reader (`coco_panoptic`, `index_masks`, `coco_object`) scans the files once and returns a `Source`: the classes, one job per
image, and a pure function that reads the image of a job. `assemble` runs the jobs in order and writes the results. An invalid
row or image becomes a `Skip`, which the report counts; only an invalid top-level file stops the assembly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.seeds import derive_seed

PROGRESS_SECONDS = 10.0
"""Seconds between two progress lines when the output is not a terminal."""


@dataclass(frozen=True)
class SemanticClass:
    """A class of the data set; `id` is its number in the annotation files."""

    id: int
    name: str
    is_thing: bool
    background: bool = False
    """The background is scored (mIoU) but never becomes a phrase."""


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
    """`images`, `narratives`, `ungrounded`, `segments` and notes of the report."""


@dataclass
class Source:
    """A data set whose files were scanned but whose images were not read yet."""

    classes: list[SemanticClass]
    jobs: list[Any]
    """One job per image, in order; each has `image_id` and `split`."""
    read: Callable[[Any], ImageRows]
    """Pure and picklable, so that jobs can run in other processes."""
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
    class_masks = rows.class_masks or {}
    present = [(index, item) for index, item in enumerate(classes) if item.id in class_masks and not item.background]
    texts = [templates[derive_seed(0, "template", rows.image_id, item.id) % len(templates)] for _, item in present]
    texts = [text.replace("{name}", item.name) for text, (_, item) in zip(texts, present, strict=True)]
    return [
        {
            "narrative_id": "classes",
            "phrase_id": index,
            "caption": ", ".join(texts),
            "phrase": text,
            "is_thing": item.is_thing,
            "is_plural": item.id in plural,
            "class_id": item.id,
            "segment_ids": members.get(item.id, []),
            "mask": class_masks[item.id],
            "tags": [],
        }
        for text, (index, item) in zip(texts, present, strict=True)
    ]


def masks_by_class(labels: NDArray[np.integer], classes: list[SemanticClass]) -> dict[int, bytes]:
    """Return the RLE of every class that occurs in a map [H, W] of class ids; other values in the map are ignored."""
    present = set(np.unique(labels).tolist())
    return {item.id: masks.encode(labels == item.id) for item in classes if item.id in present}
