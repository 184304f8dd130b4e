"""Data assembly: published formats and the embedded scenes -> phrase table, class phrases and a report.

A reader (`coco_panoptic`, `index_masks`, `coco_object`) looks at the files once and gives a `Source`: the classes, one job
an image, and a pure function that reads one job. `assemble` runs the jobs, in order, and writes. A bad row or image is a
`Skip`, which the report counts; only a broken top-level file stops the assembly.
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


@dataclass(frozen=True)
class SemanticClass:
    """A class of the data set; `id` is its number in the annotation files."""

    id: int
    name: str
    is_thing: bool
    background: bool = False
    """Scored (mIoU), never a phrase."""


@dataclass(frozen=True)
class Skip:
    """One thing that was left out."""

    unit: str
    """`image`, `narrative`, `phrase` or `annotation`."""
    reason: str
    where: str
    """File, row and what is wrong there, in one line."""
    narratives: int = 0
    phrases: int = 0
    """Narratives and grounded phrases that are lost with it."""


@dataclass
class ImageRows:
    """What one image gives to the phrase table."""

    image_id: int
    split: str
    file_name: str
    height: int = 0
    width: int = 0
    phrases: list[dict[str, Any]] = field(default_factory=list)
    """Columns of the phrase table that differ between the phrases of one image."""
    class_masks: dict[int, bytes] | None = None
    """Run-length code by class id for the classes that are there; None where nobody needs it (train)."""
    skips: list[Skip] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """`images`, `narratives`, `ungrounded`, `segments` and repairs."""


@dataclass
class Source:
    """A data set that was looked at but not yet read."""

    classes: list[SemanticClass]
    jobs: list[Any]
    """One an image, ordered; each with `image_id` and `split`."""
    read: Callable[[Any], ImageRows]
    """Pure and picklable, so that jobs may run in other processes."""
    inputs: list[Path]
    """Top-level files, which the manifest hashes."""
    skips: list[Skip] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def class_rows(
    rows: ImageRows, classes: list[SemanticClass], templates: list[str], members: dict[int, list[int]], plural: set[int]
) -> list[dict[str, Any]]:
    """Phrases of an image without narratives: one for each class in `rows.class_masks` but the background.

    The template is chosen by a hash of image and class; `phrase_id` is the class index; the caption joins the phrases.

    Args:
        members: segment ids by class id, empty where the data set has none.
        plural: ids of the classes with several instances here.
    """
    present = [
        (index, item) for index, item in enumerate(classes) if item.id in (rows.class_masks or {}) and not item.background
    ]
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
            "mask": (rows.class_masks or {})[item.id],
            "tags": [],
        }
        for text, (index, item) in zip(texts, present, strict=True)
    ]


def masks_by_class(labels: NDArray[np.integer], classes: list[SemanticClass]) -> dict[int, bytes]:
    """Run-length code of every class that occurs in a map [H, W] of class ids; other values are nobody's."""
    present = set(np.unique(labels).tolist())
    return {item.id: masks.encode(labels == item.id) for item in classes if item.id in present}
