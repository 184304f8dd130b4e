"""COCO panoptic segmentation + Panoptic Narrative Grounding (Gonzalez et al., ICCV 2021) -> phrases.

Rules, where the formats leave a choice:

* Narratives join panoptic segments on (image_id, int(segment_id)); segment ids repeat across images.
* A phrase's mask is the union (logical or) of its segments, crowds included.
* `is_thing` of a phrase over several segments is that of its last one, as in the official evaluation; `class_id` is null
  when they are of several categories.
* A phrase is *grounded* when it is marked as a noun and names segments; a noun without is counted, never evaluated.
* `phrase_id` is the position in the narrative's `segments`; `narrative_id` is `<image_id>-<k>` with k the position among the
  image's narratives (annotator ids are not unique).
* An image of both splits stays in test only.
* Optional `tags` (a list of strings) of a narrative or of one of its segments go into the phrase table.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts import masks
from genseg.artifacts.files import read_json
from genseg.artifacts.phrases import choose_images
from genseg.data import ImageRows, SemanticClass, Skip, Source
from genseg.data.images import BadImage, check_image, open_picture
from genseg.errors import UserError
from genseg.params import Png

SPLITS = {"train": "train2017", "test": "val2017"}
LONG_PHRASE = 70
"""Words from which a phrase surely exceeds CLIP's 77 tokens, of which two are marks."""
_LOST_BY_UNZIP = 65_536


@dataclass(frozen=True)
class Job:
    """One image: its two files, its segments and its narratives with their rows in `narrative_file`."""

    image_id: int
    split: str
    image: str
    png: str
    segments: list[Any]
    narratives: list[tuple[int, Any]]
    narrative_file: str
    annotation_file: str


def open_source(png: Png, val_fraction: float) -> Source:
    """Read the four JSON files and pair narratives with annotations; no PNG is decoded yet.

    Raises:
        UserError: a JSON file or a folder is missing or is not of the published form, or PNGs were lost by the unzip tool.
    """
    source = Source([], [], partial(read_image, {}), [])
    categories: dict[int, SemanticClass] = {}
    test_images: set[int] = set()
    for split in ("test", "train"):
        annotation_file = Path(png.annotations) / f"panoptic_{SPLITS[split]}.json"
        narrative_file = Path(png.narratives) / f"png_coco_{SPLITS[split]}.json"
        document = read_document(annotation_file, "data.png.annotations")
        _merge_categories(categories, document["categories"], annotation_file)
        folder = annotation_file.with_suffix("")
        _check_folders(folder, Path(png.images) / SPLITS[split], len(document["annotations"]))
        narratives = _group_narratives(_read_narratives(narrative_file), narrative_file, source)
        val = choose_images(np.array(sorted(narratives)), val_fraction, 0, "val") if split == "train" else set()
        files, annotations = _index(document, annotation_file)
        # Test images without a narrative still have class phrases (mIoU); train images without one serve nothing.
        wanted = narratives.keys() | annotations.keys() if split == "test" else narratives.keys()
        for image_id in sorted(wanted):
            rows = narratives.get(image_id, [])
            where = f"{narrative_file}: row {rows[0][0]}: image {image_id}" if rows else f"{annotation_file}: image {image_id}"
            loss = _loss(rows)
            if image_id not in annotations or image_id not in files:
                source.skips.append(Skip("image", "unknown image id", f"{where} is not listed in {annotation_file}", *loss))
            elif len(annotations[image_id]) > 1:
                source.skips.append(
                    Skip("image", "annotated twice", f"{where} has two annotations in {annotation_file}", *loss)
                )
            elif image_id in test_images:
                source.skips.append(Skip("image", "image of both splits", f"{where} is a test image too", *loss))
            else:
                name, segments = annotations[image_id][0]
                image = f"{png.images}/{SPLITS[split]}/{files[image_id]}"
                part = "val" if image_id in val else split
                source.jobs.append(
                    Job(image_id, part, image, str(folder / name), segments, rows, str(narrative_file), str(annotation_file))
                )
        source.counts["images without a narrative"] += len(annotations.keys() - narratives.keys())
        if split == "test":
            test_images = set(wanted)
        source.inputs += [annotation_file, narrative_file]
    source.jobs.sort(key=lambda job: job.image_id)
    source.classes = [categories[key] for key in sorted(categories)]
    source.read = partial(read_image, categories)
    return source


def read_document(path: Path, key: str) -> dict[str, list[Any]]:
    """A COCO file: a mapping with the lists `images`, `annotations` and `categories`; `key` of the params names its folder."""
    if not path.exists():
        raise UserError(f"{path}: no such file; set {key} to the folder that has it")
    document = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(part), list):
            raise UserError(f"{path}: no list `{part}` at the top level, so this is no COCO file; fetch it again")
    return document


def _read_narratives(path: Path) -> list[Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; set data.png.narratives to the folder that has it (or data.png.download: true)")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of narratives at the top level, got {type(rows).__name__}; fetch it again")
    return rows


def _merge_categories(known: dict[int, SemanticClass], records: list[Any], path: Path) -> None:
    """Add the categories of one file; both splits must agree about them."""
    for row, record in enumerate(records):
        try:
            found = SemanticClass(int(record["id"]), str(record["name"]), bool(record["isthing"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: categories[{row}] lacks id, name or isthing; fetch the file again") from None
        if known.setdefault(found.id, found) != found:
            raise UserError(
                f"{path}: category {found.id} is {found.name!r} here and {known[found.id].name!r} in the other split"
            )


def _check_folders(folder: Path, images: Path, expected: int) -> None:
    for path, key in ((folder, "annotations"), (images, "images")):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; set data.png.{key} to its parent, or unpack it there")
    check_png_count(folder, sum(1 for item in folder.iterdir() if item.suffix == ".png"), expected)


def check_png_count(folder: Path, found: int, expected: int) -> None:
    """Raise UserError when the count betrays an unzip tool that counts entries modulo 65,536.

    The published `panoptic_train2017.zip` holds 118,287 PNGs; such tools yield 52,751. A few missing PNGs are no
    reason to stop: their images are skipped and reported.
    """
    if found < expected and (expected - found) % _LOST_BY_UNZIP == 0:
        raise UserError(
            f"{folder}: {found:,} PNGs where {folder.name}.json has {expected:,}: the unzip tool lost {expected - found:,}; "
            f"unpack {folder.name}.zip again with `python -m zipfile -e {folder.name}.zip {folder.parent}` or 7z"
        )


def _group_narratives(rows: list[Any], path: Path, source: Source) -> dict[int, list[tuple[int, Any]]]:
    grouped: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for number, row in enumerate(rows):
        try:
            image_id = int(row["image_id"])
            if not isinstance(row["segments"], list):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            where = f"{path}: row {number}: no image_id that is a number, or no list of segments"
            source.skips.append(Skip("narrative", "malformed narrative", where, *_loss([(number, row)])))
            continue
        grouped[image_id].append((number, row))
    return grouped


def _index(document: dict[str, list[Any]], path: Path) -> tuple[dict[int, str], dict[int, list[tuple[str, list[Any]]]]]:
    """File name by image id, and (PNG name, segments) of every annotation by image id; malformed records are left out."""
    files: dict[int, str] = {}
    annotations: dict[int, list[tuple[str, list[Any]]]] = defaultdict(list)
    for record in document["images"]:
        try:
            files[int(record["id"])] = str(record["file_name"])
        except (KeyError, TypeError, ValueError):
            continue
    for record in document["annotations"]:
        try:
            annotations[int(record["image_id"])].append((str(record["file_name"]), list(record["segments_info"])))
        except (KeyError, TypeError, ValueError):
            continue
    if not annotations:
        raise UserError(f"{path}: none of the annotations has image_id, file_name and segments_info; fetch the file again")
    return files, annotations


def _loss(rows: list[tuple[int, Any]]) -> tuple[int, int]:
    """Narratives and grounded phrases among rows that are left out."""
    parts = [row["segments"] for _, row in rows if isinstance(row, dict) and isinstance(row.get("segments"), list)]
    return len(rows), sum(bool(is_noun(part) and part.get("segment_ids")) for part in chain(*parts) if isinstance(part, dict))


def is_noun(part: dict[str, Any]) -> bool:
    """Whether a part of a narrative is a noun phrase; a file without the flag has nouns where it has segments."""
    return bool(part.get("noun", part.get("segment_ids")))


def panoptic_ids(path: str | Path) -> NDArray[np.uint32]:
    """Segment ids [H, W] of a panoptic PNG: R + 256 G + 65536 B, 0 = void.

    Raises:
        BadImage: the file is missing, corrupt, or not a colour picture.
    """
    picture, _ = open_picture(path, "panoptic PNG")
    if picture.mode not in ("RGB", "RGBA", "P"):
        message = f"{path}: a panoptic PNG is RGB, this one has mode {picture.mode}; fetch it again"
        raise BadImage("panoptic PNG without colours", message)
    # uint8 * 256 would overflow: cast first.
    colours = np.asarray(picture.convert("RGB")).astype(np.uint32)
    return colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]


class _Segments:
    """Segments of one image: category by id, and run-length codes made once on demand."""

    def __init__(self, ids: NDArray[np.uint32], records: list[Any]) -> None:
        self._ids = ids
        self._codes: dict[int, bytes] = {}
        self.categories: dict[int, int] = {}
        self.twice: set[int] = set()
        for record in records:
            try:
                segment, category = int(record["id"]), int(record["category_id"])
            except (KeyError, TypeError, ValueError):
                continue
            if segment in self.categories:
                self.twice.add(segment)
            self.categories[segment] = category

    def code(self, segment: int) -> bytes:
        if segment not in self._codes:
            self._codes[segment] = masks.encode(self._ids == segment)
        return self._codes[segment]


def read_image(categories: dict[int, SemanticClass], job: Job) -> ImageRows:
    """Decode one image's PNG once and make the rows of all its narratives (and its class masks, unless of train)."""
    rows = ImageRows(job.image_id, job.split, job.image)
    try:
        height, width = check_image(job.image)
        ids = panoptic_ids(job.png)
        if ids.shape != (height, width):
            message = f"{job.png}: {ids.shape[0]} x {ids.shape[1]} pixels, its image {job.image} has {height} x {width}"
            raise BadImage("image and panoptic PNG differ in size", message)
    except BadImage as error:
        rows.skips.append(Skip("image", error.reason, str(error), *_loss(job.narratives)))
        return rows
    rows.height, rows.width = height, width
    rows.counts["images"] += 1
    segments = _Segments(ids, job.segments)
    for order, (number, narrative) in enumerate(job.narratives):
        _read_narrative(rows, job, segments, categories, order, number, narrative)
    if job.split != "train":
        members: dict[int, list[bytes]] = defaultdict(list)
        for segment, category in segments.categories.items():
            if segment not in segments.twice:
                members[category].append(segments.code(segment))
        rows.class_masks = {category: masks.union(codes, height, width) for category, codes in members.items()}
    return rows


def _read_narrative(
    rows: ImageRows,
    job: Job,
    segments: _Segments,
    categories: dict[int, SemanticClass],
    order: int,
    number: int,
    narrative: dict[str, Any],
) -> None:
    rows.counts["narratives"] += 1
    parts = narrative["segments"]
    caption = narrative.get("caption") or " ".join(str(part.get("utterance", "")) for part in parts if isinstance(part, dict))
    for phrase_id, part in enumerate(parts):
        where = f"{job.narrative_file}: row {number} (image {job.image_id}), segment {phrase_id}"
        if not isinstance(part, dict):
            rows.skips.append(Skip("phrase", "malformed segment", f"{where} is no mapping"))
            continue
        if not is_noun(part) or not part.get("segment_ids"):
            rows.counts["ungrounded"] += is_noun(part)
            rows.counts["segments of parts that are no noun"] += bool(part.get("segment_ids"))
            continue
        try:
            phrase, named = _checked(part, segments, categories, job)
            codes = [segments.code(segment) for segment in named]
            mask = masks.union(codes, rows.height, rows.width)
            if not masks.area(mask, rows.height, rows.width):
                raise _BadPhrase("empty mask", f"no pixel of {job.png} has one of the ids {named}")
        except _BadPhrase as error:
            rows.skips.append(Skip("phrase", error.reason, f"{where}: {error}", 0, 1))
            continue
        found = [categories[segments.categories[segment]] for segment in named]
        rows.counts["segments"] += len(named)
        rows.counts["segment ids repeated in a phrase, counted once"] += len(part["segment_ids"]) - len(named)
        rows.counts["segments without a pixel in phrases that have others"] += sum(
            not masks.area(code, rows.height, rows.width) for code in codes
        )
        rows.counts[f"phrases over {LONG_PHRASE} words, shortened by the text encoder"] += len(phrase.split()) > LONG_PHRASE
        rows.phrases.append(
            {
                "narrative_id": f"{job.image_id}-{order}",
                "phrase_id": phrase_id,
                "caption": str(caption),
                "phrase": phrase,
                "is_thing": found[-1].is_thing,
                "is_plural": bool(part.get("plural", False)),
                "class_id": found[0].id if len({item.id for item in found}) == 1 else None,
                "segment_ids": named,
                "mask": mask,
                "tags": [str(tag) for tag in [*(narrative.get("tags") or []), *(part.get("tags") or [])]],
            }
        )


class _BadPhrase(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _checked(
    part: dict[str, Any], segments: _Segments, categories: dict[int, SemanticClass], job: Job
) -> tuple[str, list[int]]:
    """Text and segment ids (each once, in order) of a grounded phrase; raises _BadPhrase."""
    phrase = " ".join(str(part.get("utterance") or "").split())
    if not phrase:
        raise _BadPhrase("empty phrase", "the utterance has no word")
    try:
        named = list(dict.fromkeys(int(segment) for segment in part["segment_ids"]))
    except (TypeError, ValueError):
        raise _BadPhrase("malformed segment id", f"segment_ids {part['segment_ids']!r} are not numbers") from None
    for segment in named:
        if segment not in segments.categories:
            raise _BadPhrase("unknown segment id", f"{phrase!r} names segment {segment}, which {job.annotation_file} lacks")
        if segment in segments.twice:
            raise _BadPhrase("duplicate segment id", f"{phrase!r} names segment {segment}, twice in {job.annotation_file}")
        if segments.categories[segment] not in categories:
            category = segments.categories[segment]
            raise _BadPhrase("unknown category id", f"segment {segment} has category {category}, not in {job.annotation_file}")
    return phrase, named
