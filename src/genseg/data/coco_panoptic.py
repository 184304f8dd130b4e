"""COCO panoptic segmentation + Panoptic Narrative Grounding (Gonzalez et al., ICCV 2021) -> phrases.

Conventions that the formats leave open:

* Narratives and panoptic segments are joined on (image_id, int(segment_id)); segment ids repeat across images.
* The mask of a phrase is the union (logical or) of its segments, including crowds.
* `is_thing` of a phrase with several segments is that of its last segment, as in the official evaluation; `class_id` is null
  if the segments have several categories.
* A phrase is *grounded* if it is marked as a noun and has segments. A noun without segments is counted but not evaluated.
* `phrase_id` is the position in the narrative's `segments`. `narrative_id` is `<image_id>-<k>`, where k is the position among
  the narratives of the image (annotator ids are not unique).
* An image in both splits is used for test only. Of several sources with the same image, the first one is used.
* Optional `tags` (a list of strings) of a narrative or of one of its segments are copied to the phrase table.

In the code, a *part* is an element of a narrative's `segments`, and a *segment* is a segment of the panoptic PNG.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import read_json
from genseg.artifacts.phrases import choose_images
from genseg.data import ImageRows, SemanticClass, Skip, Source
from genseg.data.images import BadImage, open_image, read_labels
from genseg.errors import UserError
from genseg.params.data import PngFolders

COCO_SPLITS = {"train": "train2017", "test": "val2017"}
"""COCO's split name in file and folder names, by the study's split. The study's val is a part of COCO's train."""
LONG_PHRASE = 70
"""Phrases with more words than this may exceed CLIP's 77 tokens, two of which are start and end tokens."""


@dataclass(frozen=True)
class Job:
    """An image: its two files, its segments, and its narratives with their row numbers in `narrative_file`."""

    image_id: int
    split: str
    image: str
    png: str
    segments: list[Any]
    narratives: list[tuple[int, Any]]
    narrative_file: str
    annotation_file: str


# ---------------------------------------------------------------------------------------------------- top-level files
def open_source(sources: Sequence[PngFolders], val_fraction: float, class_file: str | None = None) -> Source:
    """Read the four JSON files of each source and pair narratives with annotations. PNGs are not decoded yet.

    `class_file` is a CSV with the names of all categories (`data.png.classes`). Raises UserError if a JSON file or folder is
    missing or malformed, an unzip tool has lost PNGs, a category id has several meanings, or a category has no name.
    """
    source = Source([], [], partial(read_image, {}), [])
    categories: dict[int, SemanticClass] = {}
    splits: dict[int, str] = {}  # the split of every image that was read; all test images are read before those of train
    for split in ("test", "train"):
        for png in sources:
            splits |= _add_split(source, png, split, categories, splits, val_fraction)
    if class_file is not None:
        names = _read_class_names(class_file, {item.name for item in categories.values()})
        categories = {key: replace(item, name=names[item.name]) for key, item in categories.items()}
        source.inputs.append(Path(class_file))
    source.jobs.sort(key=lambda job: job.image_id)
    source.classes = [categories[key] for key in sorted(categories)]
    source.read = partial(read_image, categories)
    return source


def _add_split(
    source: Source,
    png: PngFolders,
    split: str,
    categories: dict[int, SemanticClass],
    splits: dict[int, str],
    val_fraction: float,
) -> dict[int, str]:
    """Add the jobs of one split of one source, except for images in `splits`. Return its other images with their split."""
    # 1. Read the annotations and narratives.
    annotation_file = Path(png.annotations) / f"panoptic_{COCO_SPLITS[split]}.json"
    narrative_file = Path(png.narratives) / f"png_coco_{COCO_SPLITS[split]}.json"
    document = read_document(annotation_file, "data.png.annotations")
    _merge_categories(categories, document["categories"], annotation_file)
    folder = annotation_file.with_suffix("")
    _check_folders(folder, Path(png.images) / COCO_SPLITS[split], len(document["annotations"]))
    narratives = _read_narratives(narrative_file, source)
    files, annotations = _index_by_image(document, annotation_file)

    # 2. Select the images. Test images without a narrative have class phrases (mIoU); such train images are not used.
    new_images = np.array(sorted(narratives.keys() - splits.keys()))
    val = choose_images(new_images, val_fraction, 0, "val") if split == "train" else set()
    image_ids = narratives.keys() | annotations.keys() if split == "test" else narratives.keys()

    # 3. Create one job per image.
    for image_id in sorted(image_ids):
        rows = narratives.get(image_id, [])
        place = f"{narrative_file}: row {rows[0][0]}: image {image_id}" if rows else f"{annotation_file}: image {image_id}"
        counts = _count_grounded(rows)
        if image_id not in annotations or image_id not in files:
            source.skips.append(Skip("image", "unknown image id", f"{place} is not listed in {annotation_file}", *counts))
        elif len(annotations[image_id]) > 1:
            message = f"{place} has several annotations in {annotation_file}"
            source.skips.append(Skip("image", "duplicate annotation", message, *counts))
        elif splits.get(image_id) == split:
            message = f"{place} is also in an earlier source"
            source.skips.append(Skip("image", "image in several sources", message, *counts))
        elif image_id in splits:
            source.skips.append(Skip("image", "image in both splits", f"{place} is also a test image", *counts))
        else:
            name, segments = annotations[image_id][0]
            study_split = "val" if image_id in val else split
            image, mask = f"{png.images}/{COCO_SPLITS[split]}/{files[image_id]}", str(folder / name)
            job = Job(image_id, study_split, image, mask, segments, rows, str(narrative_file), str(annotation_file))
            source.jobs.append(job)
    source.counts["images without a narrative"] += len(annotations.keys() - narratives.keys())
    source.inputs += [annotation_file, narrative_file]
    return dict.fromkeys(image_ids - splits.keys(), split)


def read_document(path: Path, param: str) -> dict[str, list[Any]]:
    """Read a COCO file: a mapping with the lists `images`, `annotations` and `categories`.

    Raises UserError if the file is missing or malformed; `param` is the params key of its folder, for error messages.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; set {param} to its folder")
    document = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(f"{path}: expected a COCO file, got no list `{key}` at the top level; fetch it again")
    return document


def _merge_categories(categories: dict[int, SemanticClass], records: list[Any], path: Path) -> None:
    """Add the categories of one file. A category that occurs in several files must be the same in all of them."""
    for row, record in enumerate(records):
        try:
            item = SemanticClass(int(record["id"]), str(record["name"]), bool(record["isthing"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: categories[{row}] lacks id, name or isthing; fetch the file again") from None
        other = categories.setdefault(item.id, item)
        if other != item:
            raise UserError(f"{path}: category {item.id} is {item.name!r} in this file but {other.name!r} elsewhere")


def _read_class_names(path: str, categories: set[str]) -> dict[str, str]:
    """Return the name of each category from a CSV with the columns category and name. Raises UserError if one is missing."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        names = dict(zip(frame["category"], frame["name"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: not a CSV with the columns category and name ({problem}); set data.png.classes") from None
    for category in sorted(categories):
        if not names.get(category):
            raise UserError(f"{path}: category {category!r} of the annotations has no name; add a row, or set data.png.classes")
    return names


def _check_folders(folder: Path, images: Path, expected: int) -> None:
    for path, key in ((folder, "annotations"), (images, "images")):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; set data.png.{key} to its parent folder, or unpack it there")
    check_png_count(folder, sum(1 for item in folder.iterdir() if item.suffix == ".png"), expected)


def check_png_count(folder: Path, count: int, expected: int) -> None:
    """Raise UserError if a multiple of 65,536 PNGs is missing, because the unzip tool used a 16-bit file count.

    Of the 118,287 PNGs of `panoptic_train2017.zip`, such tools unpack 52,751. A few missing PNGs are not an error, because
    their images are skipped and reported.
    """
    if count < expected and (expected - count) % 65_536 == 0:
        raise UserError(
            f"{folder}: expected {expected:,} PNGs, got {count:,}: the unzip tool lost {expected - count:,}; "
            f"unpack {folder.name}.zip again with `python -m zipfile -e {folder.name}.zip {folder.parent}` or 7z"
        )


def _read_narratives(path: Path, source: Source) -> dict[int, list[tuple[int, Any]]]:
    """Return (row number, narrative) by image id. Malformed narratives are skipped."""
    if not path.exists():
        raise UserError(f"{path}: no such file; set data.png.narratives to its folder (or data.png.download: true)")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of narratives at the top level, got {type(rows).__name__}; fetch it again")
    grouped: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for number, row in enumerate(rows):
        try:
            image_id = int(row["image_id"])
            if not isinstance(row["segments"], list):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            message = f"{path}: row {number}: expected a number as image_id and a list as segments"
            source.skips.append(Skip("narrative", "malformed narrative", message, *_count_grounded([(number, row)])))
            continue
        grouped[image_id].append((number, row))
    return grouped


def _index_by_image(
    document: dict[str, list[Any]], path: Path
) -> tuple[dict[int, str], dict[int, list[tuple[str, list[Any]]]]]:
    """Return the image file name, and (PNG name, segments) of all annotations, by image id. Malformed records are ignored."""
    files: dict[int, str] = {}
    annotations: dict[int, list[tuple[str, list[Any]]]] = defaultdict(list)
    malformed = contextlib.suppress(KeyError, TypeError, ValueError)
    for record in document["images"]:
        with malformed:
            files[int(record["id"])] = str(record["file_name"])
    for record in document["annotations"]:
        with malformed:
            annotation = (str(record["file_name"]), list(record["segments_info"]))
            annotations[int(record["image_id"])].append(annotation)
    if not annotations:
        raise UserError(f"{path}: expected annotations with image_id, file_name and segments_info; fetch the file again")
    return files, annotations


def _count_grounded(rows: list[tuple[int, Any]]) -> tuple[int, int]:
    """Return the numbers of narratives and of grounded phrases in a list of (row number, narrative)."""
    parts = [row["segments"] for _, row in rows if isinstance(row, dict) and isinstance(row.get("segments"), list)]
    return len(rows), sum(bool(is_noun(part) and part.get("segment_ids")) for part in chain(*parts) if isinstance(part, dict))


def is_noun(part: dict[str, Any]) -> bool:
    """Return whether a part of a narrative is a noun phrase. In files without the flag, parts with segments are nouns."""
    return bool(part.get("noun", part.get("segment_ids")))


# ----------------------------------------------------------------------------------------------------------- segments
def panoptic_ids(path: str | Path) -> NDArray[np.uint32]:
    """Read the segment ids [H, W] of a panoptic PNG: R + 256 G + 65536 B, where 0 is void.

    Raises BadImage if the file is missing, corrupt or not a colour image.
    """
    image, _ = open_image(path, "panoptic PNG")
    if image.mode not in ("RGB", "RGBA", "P"):
        message = f"{path}: expected a panoptic PNG in RGB, got mode {image.mode}; fetch it again"
        raise BadImage("panoptic PNG not in RGB", message)
    colours = np.asarray(image.convert("RGB")).astype(np.uint32)  # uint8 * 256 would overflow
    return colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]


class _Segments:
    """Segments of one image: categories by segment id, and RLEs, which are computed on first use."""

    def __init__(self, ids: NDArray[np.integer], records: list[Any]) -> None:
        self.rle = cache(lambda segment: masks.encode(ids == segment))
        self.categories: dict[int, int] = {}
        self.duplicates: set[int] = set()
        for record in records:
            try:
                segment, category = int(record["id"]), int(record["category_id"])
            except (KeyError, TypeError, ValueError):
                continue
            if segment in self.categories:
                self.duplicates.add(segment)
            self.categories[segment] = category


# -------------------------------------------------------------------------------------------------- images and phrases
def read_image(categories: dict[int, SemanticClass], job: Job) -> ImageRows:
    """Decode the PNG of an image and return the rows of all its narratives, and its class masks unless it is in train."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        ids = read_labels(job.image, job.png, "panoptic PNG", panoptic_ids)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), *_count_grounded(job.narratives)))
        return rows
    rows.height, rows.width = ids.shape
    rows.counts["images"] += 1
    segments = _Segments(ids, job.segments)
    for order in range(len(job.narratives)):
        _read_narrative(rows, job, segments, categories, order)
    if job.split != "train":
        members: dict[int, list[bytes]] = defaultdict(list)
        for segment, category in segments.categories.items():
            if segment not in segments.duplicates:
                members[category].append(segments.rle(segment))
        rows.class_masks = {category: masks.union(rles, *ids.shape) for category, rles in members.items()}
    return rows


def _read_narrative(rows: ImageRows, job: Job, segments: _Segments, categories: dict[int, SemanticClass], order: int) -> None:
    """Add the grounded phrases of a narrative to `rows`; `order` is its position among the narratives of the image."""
    rows.counts["narratives"] += 1
    number, narrative = job.narratives[order]
    parts = narrative["segments"]
    caption = narrative.get("caption") or " ".join(str(part.get("utterance", "")) for part in parts if isinstance(part, dict))
    for phrase_id, part in enumerate(parts):
        place = f"{job.narrative_file}: row {number} (image {job.image_id}), segment {phrase_id}"

        # 1. Skip parts that are not grounded phrases.
        if not isinstance(part, dict):
            rows.skips.append(Skip("phrase", "malformed segment", f"{place}: expected a mapping, got {type(part).__name__}"))
            continue
        if not is_noun(part) or not part.get("segment_ids"):
            rows.counts["ungrounded"] += is_noun(part)
            rows.counts["parts with segments that are not nouns"] += bool(part.get("segment_ids"))
            continue

        # 2. Join the phrase with its segments.
        try:
            phrase, segment_ids = _parse_phrase(part, segments, categories, job)
            rles = [segments.rle(segment) for segment in segment_ids]
            mask = masks.union(rles, rows.height, rows.width)
            if not masks.area(mask, rows.height, rows.width):
                raise _BadPhrase("empty mask", f"no pixel of {job.png} has one of the ids {segment_ids}")
        except _BadPhrase as error:
            rows.skips.append(Skip("phrase", error.reason, f"{place}: {error}", 0, 1))
            continue

        # 3. Count, and add the row.
        empty_segments = sum(not masks.area(rle, rows.height, rows.width) for rle in rles)
        rows.counts["segments"] += len(segment_ids)
        rows.counts["duplicate segment ids within a phrase, counted once"] += len(part["segment_ids"]) - len(segment_ids)
        rows.counts["empty segments of phrases with other segments"] += empty_segments
        rows.counts[f"phrases over {LONG_PHRASE} words, truncated by the text encoder"] += len(phrase.split()) > LONG_PHRASE
        classes = [categories[segments.categories[segment]] for segment in segment_ids]
        rows.phrases.append(
            {
                "narrative_id": f"{job.image_id}-{order}",
                "phrase_id": phrase_id,
                "caption": str(caption),
                "phrase": phrase,
                "is_thing": classes[-1].is_thing,
                "is_plural": bool(part.get("plural", False)),
                "class_id": classes[0].id if len({item.id for item in classes}) == 1 else None,
                "segment_ids": segment_ids,
                "mask": mask,
                "tags": [str(tag) for tag in [*(narrative.get("tags") or []), *(part.get("tags") or [])]],
            }
        )


class _BadPhrase(Exception):
    """A grounded phrase that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _parse_phrase(
    part: dict[str, Any], segments: _Segments, categories: dict[int, SemanticClass], job: Job
) -> tuple[str, list[int]]:
    """Return the text and the segment ids (in order, without duplicates) of a grounded phrase. Raises _BadPhrase."""
    phrase = " ".join(str(part.get("utterance") or "").split())
    if not phrase:
        raise _BadPhrase("empty phrase", "the utterance is empty")
    try:
        segment_ids = list(dict.fromkeys(int(segment) for segment in part["segment_ids"]))
    except (TypeError, ValueError):
        raise _BadPhrase("malformed segment id", f"expected numbers in segment_ids, got {part['segment_ids']!r}") from None
    for segment in segment_ids:
        if segment not in segments.categories:
            raise _BadPhrase("unknown segment id", f"segment {segment} of {phrase!r} is missing in {job.annotation_file}")
        if segment in segments.duplicates:
            message = f"segment {segment} of {phrase!r} is listed twice in {job.annotation_file}"
            raise _BadPhrase("duplicate segment id", message)
        category = segments.categories[segment]
        if category not in categories:
            message = f"category {category} of segment {segment} is missing in {job.annotation_file}"
            raise _BadPhrase("unknown category id", message)
    return phrase, segment_ids
