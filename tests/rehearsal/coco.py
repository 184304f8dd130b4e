"""A small COCO + PNG in the published layout: archives, annotations and narratives, with synthetic photographs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ((72, 96), (96, 72), (64, 96), (96, 64))
"""Heights and widths of the images. Those of COCO are mostly 480 x 640, 640 x 480 and 427 x 640."""
THINGS = {
    1: "a person",
    2: "bicycle",
    17: "the cat",
    18: "dogs",
    44: "bottles",
    62: "a chair",
    67: "the dining table",
    85: "clock",
}
STUFF = {
    125: "gravel",
    149: "road",
    156: "the shelf",
    184: "trees",
    187: "the sky",
    190: "floor",
    193: "grass",
    199: "the wall",
}
"""Phrases by COCO's category id. Their classes are named `tree-merged`, `sky-other-merged`, `floor-other-merged`, ..."""


def categories() -> list[dict[str, Any]]:
    """Return the 133 categories of COCO's panoptic annotations, in the published form and order."""
    with (Path(__file__).parent / "categories.csv").open(newline="") as handle:
        return [row | {"id": int(row["id"]), "isthing": int(row["isthing"])} for row in csv.DictReader(handle)]


def published_files(train_images: int, test_images: int) -> dict[str, bytes]:
    """Return the files of `data/sources.csv` by name, for this number of images.

    Image 3 of each split is grey, image 2 has a crowd, image 1 has two narratives, and the last one of `val2017` has none.
    """
    files: dict[str, bytes] = {}
    panoptic: dict[str, bytes] = {}
    for split, count, first in (("train2017", train_images, 9), ("val2017", test_images, 139)):
        photographs, pngs = {f"{split}/": b""}, {f"panoptic_{split}/": b""}
        annotations: dict[str, Any] = {
            "info": {"description": "COCO 2018 Panoptic Dataset", "version": "1.0", "year": 2018, "contributor": "..."},
            "licenses": [{"id": 1, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
            "images": [],
            "annotations": [],
            "categories": categories(),
        }
        narratives: list[dict[str, Any]] = []
        for number in range(count):
            image_id = first + 7 * number
            scene = _Scene(image_id, number, split)
            photographs[f"{split}/{image_id:012d}.jpg"] = scene.jpeg
            pngs[f"panoptic_{split}/{image_id:012d}.png"] = scene.png
            pngs[f"__MACOSX/panoptic_{split}/._{image_id:012d}.png"] = b"\0" * 16
            annotations["images"].append(scene.image)
            annotations["annotations"].append(scene.annotation)
            if split == "train2017" or number < count - 1:
                narratives += [scene.narrative(turn) for turn in range(2 if number == 1 else 1)]
        files[f"{split}.zip"] = _archive(photographs)
        files[f"png_coco_{split}.json"] = json.dumps(narratives).encode()
        panoptic[f"annotations/panoptic_{split}.json"] = json.dumps(annotations).encode()
        panoptic[f"annotations/panoptic_{split}.zip"] = _archive(pngs)
    files["panoptic_annotations_trainval2017.zip"] = _archive(panoptic)
    return files


def mirror_sources(published: Path, files: dict[str, bytes], url: str, counts: dict[str, int]) -> str:
    """Return the text of `sources.csv` for a mirror at `url`: sizes and checksums are given where they are published.

    `counts` are the numbers of images by split (`train2017`, `val2017`).
    """
    with published.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        content = files[row["name"]]
        row["url"] = f"{url}/{row['name']}"
        if row["sha256"]:
            row |= {"bytes": str(len(content)), "sha256": hashlib.sha256(content).hexdigest()}
        names = [target.rpartition("/")[2] for target in row["unpacks_to"].split(";")]
        row["entries"] = ";".join(str(counts.get(name.removeprefix("panoptic_"), 1)) for name in names)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _archive(files: dict[str, bytes]) -> bytes:
    """Return a zip archive without compression; a name that ends with a slash is a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


class _Scene:
    """Synthetic photograph of two kinds of stuff and up to four things, with its annotation and narratives."""

    def __init__(self, image_id: int, number: int, split: str) -> None:
        # 1. Draw the segments.
        rng = np.random.default_rng(image_id)
        height, width = SHAPES[number % len(SHAPES)]
        colours, ids = Image.new("RGB", (width, height)), Image.new("I", (width, height))
        draw, draw_ids = ImageDraw.Draw(colours), ImageDraw.Draw(ids)
        horizon = height // 2 + int(rng.integers(-8, 8))
        categories = [int(item) for item in rng.choice(list(STUFF), 2, replace=False)]
        categories += [int(item) for item in rng.choice(list(THINGS), int(rng.integers(1, 4)))]
        categories += categories[-1:]  # two things of one category: a plural
        self.segments: list[tuple[int, int]] = []
        for order, category in enumerate(categories):
            segment = int(rng.integers(1, 2**24))
            x, y, side = (
                int(value) for value in (rng.integers(0, width - 20), rng.integers(0, height - 20), rng.integers(12, 36))
            )
            box = [(0, 0, width, horizon), (0, horizon, width, height)][order] if order < 2 else (x, y, x + side, y + side)
            colour = tuple(int(value) for value in np.random.default_rng(category).integers(30, 226, 3))
            shape = "rectangle" if order < 2 or category % 2 else "ellipse"
            getattr(draw, shape)(box, fill=colour)
            getattr(draw_ids, shape)(box, fill=segment)
            self.segments.append((segment, category))

        # 2. Encode the photograph and the panoptic PNG, whose pixels of id 0 are void.
        noisy = np.clip(np.asarray(colours) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
        values = np.array(ids).astype(np.int64)
        values[:2, :2] = 0
        self.segments = [(segment, category) for segment, category in self.segments if (values == segment).any()]
        planes = np.stack([values % 256, values // 256 % 256, values // 65536], axis=-1).astype(np.uint8)
        photograph = Image.fromarray(noisy)
        self.jpeg = _encode(photograph.convert("L") if number == 3 else photograph, "JPEG")
        self.png = _encode(Image.fromarray(planes), "PNG")

        # 3. Describe them as COCO does.
        self.image_id, name = image_id, f"{image_id:012d}"
        host = "http://images.cocodataset.org"
        self.image = {"license": 1, "file_name": f"{name}.jpg", "coco_url": f"{host}/{split}/{name}.jpg", "height": height}
        self.image |= {"width": width, "date_captured": "2013-11-14 11:18:45", "flickr_url": "", "id": image_id}
        records = []
        for order, (segment, category) in enumerate(self.segments):
            rows, columns = np.nonzero(values == segment)
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            record = {"id": segment, "category_id": category, "iscrowd": int(number == 2 and order == 2)}
            records.append(record | {"bbox": box, "area": len(rows)})
        self.annotation = {"segments_info": records, "file_name": f"{name}.png", "image_id": image_id}

    def narrative(self, turn: int) -> dict[str, Any]:
        """Return a narrative of the image, as PNG has it: segment ids are strings, and parts without segments join phrases."""
        by_category: dict[int, list[str]] = {}
        for segment, category in self.segments:
            by_category.setdefault(category, []).append(str(segment))
        parts = [_part("In this image" if turn == 0 else "There are", [], noun=turn == 0), _part("we can see", [])]
        for order, (category, segments) in enumerate(by_category.items()):
            words = THINGS.get(category) or STUFF[category]
            if order:
                parts.append(_part("and in the background there is" if order % 2 else ", beside it", []))
            parts.append(_part(words, segments, noun=True, plural=len(segments) > 1))
        parts.append(_part(" ".join(["which was taken outdoors in the afternoon"] * (9 if turn else 1)) + ".", []))
        caption = " ".join(str(part["utterance"]) for part in parts)
        return {"image_id": str(self.image_id), "annotator_id": 7 + turn, "caption": caption, "segments": parts}


def _part(utterance: str, segments: list[str], noun: bool = False, plural: bool = False) -> dict[str, Any]:
    return {"utterance": utterance, "segment_ids": segments, "plural": plural, "noun": noun}


def _encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()
