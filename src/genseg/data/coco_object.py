"""COCO instances read as COCO-Object: the thing categories and a background, one phrase for every class in an image.

Where instances overlap, the smaller one lies on top, so that the classes part the image; what no instance covers is
background. Crowds are instances like others. A phrase is plural when its class has several instances or a crowd there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from genseg.artifacts import masks
from genseg.artifacts.phrases import choose_images
from genseg.data import ImageRows, SemanticClass, Skip, Source, class_rows, masks_by_class
from genseg.data.coco_panoptic import SPLITS, read_document
from genseg.data.images import BadImage, check_image
from genseg.errors import UserError
from genseg.params import CocoObject

BACKGROUND = SemanticClass(0, "background", False, True)


@dataclass(frozen=True)
class Job:
    image_id: int
    split: str
    image: str
    annotations: list[Any]
    annotation_file: str


def open_source(coco: CocoObject, val_fraction: float, templates: list[str]) -> Source:
    """Read the two annotation files; no mask is decoded yet.

    Raises:
        UserError: a file or folder is missing or is no COCO instances file.
    """
    source = Source([], [], partial(read_image, [], templates), [])
    known: dict[int, SemanticClass] = {0: BACKGROUND}
    test_images: set[int] = set()
    for split in ("test", "train"):
        path = Path(coco.annotations) / f"instances_{SPLITS[split]}.json"
        images, annotations = _read(path, known, source)
        folder = f"{coco.images}/{SPLITS[split]}"
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; set data.coco_object.images to its parent")
        val = choose_images(np.array(sorted(images)), val_fraction, 0, "val") if split == "train" else set()
        for image_id, name in sorted(images.items()):
            if image_id in test_images:
                where = f"{path}: image {image_id} is a test image too"
                source.skips.append(Skip("image", "image of both splits", where, 1))
                continue
            part = "val" if image_id in val else split
            source.jobs.append(Job(image_id, part, f"{folder}/{name}", annotations.get(image_id, []), str(path)))
        if split == "test":
            test_images = set(images)
        source.inputs.append(path)
    source.jobs.sort(key=lambda job: job.image_id)
    source.classes = [known[key] for key in sorted(known)]
    source.read = partial(read_image, source.classes, templates)
    return source


def _read(path: Path, known: dict[int, SemanticClass], source: Source) -> tuple[dict[int, str], dict[int, list[Any]]]:
    """File name and annotations by image id; categories go into `known`."""
    document = read_document(path, "data.coco_object.annotations")
    try:
        for record in document["categories"]:
            found = SemanticClass(int(record["id"]), str(record["name"]), True)
            if known.setdefault(found.id, found) != found:
                other = known[found.id].name
                raise UserError(
                    f"{path}: category {found.id} is {found.name!r} here and {other!r} elsewhere; 0 is the background"
                )
        images = {int(record["id"]): str(record["file_name"]) for record in document["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: an image or category is malformed ({error!r}); fetch the file again") from None
    annotations: dict[int, list[Any]] = defaultdict(list)
    for row, record in enumerate(document["annotations"]):
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if image_id in images:
            annotations[image_id].append(record)
        else:
            source.skips.append(
                Skip("annotation", "unknown image id", f"{path}: annotations[{row}]: image {image_id} is not listed")
            )
    return images, annotations


def read_image(classes: list[SemanticClass], templates: list[str], job: Job) -> ImageRows:
    """Paint one image's instances and make a phrase for every class that shows."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        height, width = check_image(job.image)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), 1))
        return rows
    rows.height, rows.width = height, width
    known = {item.id for item in classes if not item.background}
    instances = []
    for record in job.annotations:
        try:
            category, number = int(record["category_id"]), int(record["id"])
            if category not in known:
                raise ValueError(f"category {category} is not listed")
            code = _code(record["segmentation"], height, width)
            instances.append((masks.area(code, height, width), number, category, bool(record.get("iscrowd")), code))
        except (KeyError, TypeError, ValueError, UserError) as error:
            where = f"{job.annotation_file}: image {job.image_id}, annotation {record.get('id')}: {error}"
            rows.skips.append(Skip("annotation", "malformed annotation", where))
    labels = np.zeros((height, width), np.int64)
    members: dict[int, list[int]] = defaultdict(list)
    plural: set[int] = set()
    for _, number, category, crowd, code in sorted(instances, key=lambda item: (-item[0], item[1])):
        labels[masks.decode(code, height, width)] = category
        if members[category] or crowd:
            plural.add(category)
        members[category].append(number)
    rows.class_masks = masks_by_class(labels, classes)
    rows.phrases = class_rows(rows, classes, templates, members, plural)
    rows.counts.update(images=1, narratives=1, segments=len(instances))
    rows.counts["classes wholly covered by smaller instances"] += len(members) - len(rows.phrases)
    return rows


def _code(segmentation: Any, height: int, width: int) -> bytes:
    """Run-length code of polygons, uncompressed or compressed counts; ValueError or UserError if they fit no such image."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not polygons or len(polygons) != len(segmentation):
            raise ValueError("a polygon has fewer than three points")
        return bytes(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"])
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its mask is of size {segmentation['size']}, the image of {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError("its run lengths do not fill the image")
        return bytes(coco_mask.frPyObjects(segmentation, height, width)["counts"])
    code = counts.encode() if isinstance(counts, str) else bytes(counts)
    masks.check(code, height, width)
    return code
