"""COCO instances as COCO-Object: the thing categories and a background, with one phrase for every thing class in an image.

Where instances overlap, the smallest is on top, so every pixel has exactly one class. Pixels without an instance are
background. Crowds count as instances. A phrase is plural if its class has several instances or a crowd in the image.
"""

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
from genseg.data.coco_panoptic import COCO_SPLITS, read_document
from genseg.data.images import BadImage, check_image
from genseg.errors import UserError
from genseg.params.data import CocoObject

BACKGROUND = SemanticClass(0, "background", False, True)


@dataclass(frozen=True)
class Job:
    """An image file and its annotations."""

    image_id: int
    split: str
    image: str
    annotations: list[Any]
    annotation_file: str


def open_source(coco: CocoObject, val_fraction: float, templates: list[str]) -> Source:
    """Read the two annotation files. Raises UserError if a file or folder is missing or a file is malformed."""
    source = Source([], [], partial(read_image, [], templates), [])
    classes: dict[int, SemanticClass] = {0: BACKGROUND}
    test_images: set[int] = set()
    for split in ("test", "train"):
        path = Path(coco.annotations) / f"instances_{COCO_SPLITS[split]}.json"
        images, annotations = _read_annotations(path, classes, source)
        folder = f"{coco.images}/{COCO_SPLITS[split]}"
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; set data.coco_object.images to its parent folder")
        val = choose_images(np.array(sorted(images)), val_fraction, 0, "val") if split == "train" else set()
        for image_id, name in sorted(images.items()):
            if image_id in test_images:
                skip = Skip("image", "image in both splits", f"{path}: image {image_id} is also a test image", 1)
                source.skips.append(skip)
                continue
            study_split = "val" if image_id in val else split
            source.jobs.append(Job(image_id, study_split, f"{folder}/{name}", annotations.get(image_id, []), str(path)))
        if split == "test":
            test_images = set(images)
        source.inputs.append(path)
    source.jobs.sort(key=lambda job: job.image_id)
    source.classes = [classes[key] for key in sorted(classes)]
    source.read = partial(read_image, source.classes, templates)
    return source


def _read_annotations(
    path: Path, classes: dict[int, SemanticClass], source: Source
) -> tuple[dict[int, str], dict[int, list[Any]]]:
    """Return the file names of the images and the annotations by image id, and add the categories to `classes`."""
    document = read_document(path, "data.coco_object.annotations")
    try:
        for record in document["categories"]:
            item = SemanticClass(int(record["id"]), str(record["name"]), True)
            other = classes.setdefault(item.id, item)
            if other != item:
                names = f"{item.name!r} in this file but {other.name!r} elsewhere"
                raise UserError(f"{path}: category {item.id} is {names}; 0 is the background")
        images = {int(record["id"]): str(record["file_name"]) for record in document["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: malformed image or category ({error!r}); fetch the file again") from None
    annotations: dict[int, list[Any]] = defaultdict(list)
    for row, record in enumerate(document["annotations"]):
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if image_id in images:
            annotations[image_id].append(record)
        else:
            message = f"{path}: annotations[{row}]: image {image_id} is not in images"
            source.skips.append(Skip("annotation", "unknown image id", message))
    return images, annotations


def read_image(classes: list[SemanticClass], templates: list[str], job: Job) -> ImageRows:
    """Draw the instances of an image into a class map, and create a phrase for every visible class."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        height, width = check_image(job.image)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), 1))
        return rows
    rows.height, rows.width = height, width
    categories = {item.id for item in classes if not item.background}
    instances = []
    for record in job.annotations:
        try:
            category, number = int(record["category_id"]), int(record["id"])
            if category not in categories:
                raise ValueError(f"category {category} is not in categories")
            rle = _encode(record["segmentation"], height, width)
            instances.append((masks.area(rle, height, width), number, category, bool(record.get("iscrowd")), rle))
        except (KeyError, TypeError, ValueError, UserError) as error:
            message = f"{job.annotation_file}: image {job.image_id}, annotation {record.get('id')}: {error}"
            rows.skips.append(Skip("annotation", "malformed annotation", message))
    labels = np.zeros((height, width), np.int64)
    members: dict[int, list[int]] = defaultdict(list)
    plural: set[int] = set()
    for _, number, category, is_crowd, rle in sorted(instances, key=lambda item: (-item[0], item[1])):
        labels[masks.decode(rle, height, width)] = category
        if members[category] or is_crowd:
            plural.add(category)
        members[category].append(number)
    rows.class_masks = masks_by_class(labels, classes)
    rows.phrases = class_rows(rows, classes, templates, members, plural)
    rows.counts.update(images=1, narratives=1, segments=len(instances))
    rows.counts["classes fully covered by smaller instances"] += len(members) - len(rows.phrases)
    return rows


def _encode(segmentation: Any, height: int, width: int) -> bytes:
    """Return the RLE of a segmentation, which is a list of polygons or an uncompressed or compressed RLE.

    Raises KeyError, TypeError, ValueError or UserError if it is malformed or does not fit the image.
    """
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not polygons or len(polygons) != len(segmentation):
            raise ValueError("a polygon has fewer than three points")
        return bytes(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"])
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"the mask has size {segmentation['size']}, but the image has {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError("the run lengths do not add up to the size of the image")
        return bytes(coco_mask.frPyObjects(segmentation, height, width)["counts"])
    rle = counts.encode() if isinstance(counts, str) else bytes(counts)
    masks.check(rle, height, width)
    return rle
