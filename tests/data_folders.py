"""Tiny data sets in the published formats for the tests of `genseg.data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from genseg.params import Params, validate_params

REPOSITORY = Path(__file__).resolve().parents[1]
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 17, "name": "cat", "isthing": 1},
    {"id": 184, "name": "tree", "isthing": 0},
]


def study_params(**data: Any) -> Params:
    """Return the default params with these keys in `data`, half of the train images in val, and one data thread."""
    document = {"study": "t", "data": {"val_fraction": 0.5} | data, "resources": {"data": {"threads": 1}}}
    return validate_params(document)


def write_params(path: Path, params: Params) -> Path:
    path.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return path


def part(utterance: str, *segments: object, noun: bool = True, plural: bool = False, **fields: Any) -> dict[str, Any]:
    """Return a part of a narrative."""
    return {"utterance": utterance, "segment_ids": [str(item) for item in segments], "noun": noun, "plural": plural, **fields}


def narrative(image_id: int, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a narrative with these parts."""
    caption = " ".join(item["utterance"] for item in parts)
    return {"image_id": str(image_id), "annotator_id": 7, "caption": caption, "segments": list(parts), **fields}


def save_ids(path: Path, ids: np.ndarray) -> None:
    """Write segment ids as a panoptic PNG, with arithmetic that is independent of the reader's."""
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(path)


def save_photo(path: Path, height: int, width: int) -> None:
    """Write an image of random pixels."""
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_png(
    root: Path, split: str, images: dict[int, tuple[np.ndarray, list[tuple[int, int]]]], narratives: list[Any]
) -> None:
    """Write one split (`train2017` or `val2017`) of a COCO panoptic + PNG folder.

    Args:
        images: segment ids [H, W] and list of (segment id, category id), by image id.
    """
    annotations = root / "annotations"
    (root / split).mkdir(parents=True, exist_ok=True)
    (annotations / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
    document: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id, (ids, segments) in images.items():
        name = f"{image_id:012d}"
        save_ids(annotations / f"panoptic_{split}" / f"{name}.png", ids)
        save_photo(root / split / f"{name}.jpg", *ids.shape)
        document["images"].append({"id": image_id, "file_name": f"{name}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
        infos = [{"id": segment, "category_id": category, "iscrowd": 0} for segment, category in segments]
        document["annotations"].append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": infos})
    (annotations / f"panoptic_{split}.json").write_text(json.dumps(document))
    (annotations / f"png_coco_{split}.json").write_text(json.dumps(narratives))


def edit_json(path: Path, change: Any) -> None:
    """Read a JSON file, change the document in place, and write it."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def png_params(root: Path) -> dict[str, Any]:
    """Return the params of `data` for a folder of `write_png`."""
    annotations = str(root / "annotations")
    return {
        "source": "png",
        "png": {"images": str(root), "annotations": annotations, "narratives": annotations, "download": False},
    }


def small_png(root: Path) -> None:
    """Write four train and two test images, each with a person (segment 5), a cat, a tree and one narrative."""
    for split, numbers in (("train2017", [1, 2, 3, 4]), ("val2017", [11, 12])):
        images = {}
        for number in numbers:
            ids = np.zeros((12, 16), np.int64)
            ids[:4, :8], ids[5:9, 2:6], ids[10:, :] = 5, 300 + number, 70000 + number
            images[number] = (ids, [(5, 1), (300 + number, 17), (70000 + number, 184)])
        rows = [
            narrative(
                n,
                part("near", noun=False),
                part("a person", 5),
                part("a cat", 300 + n),
                part("on trees", 70000 + n, plural=True),
                part("the air"),
            )
            for n in numbers
        ]
        write_png(root, split, images, rows)
