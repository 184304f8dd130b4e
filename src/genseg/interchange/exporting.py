"""Predictions in formats that other tools read: COCO results and index masks."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from genseg.artifacts import masks as rle
from genseg.artifacts.files import atomic_directory, write_text
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_maps
from genseg.artifacts.resample import bilinear
from genseg.errors import UserError
from genseg.interchange.labels import IGNORE, Background, ClassList, Numbering, iterate_images, paint

FORMATS = {
    "coco": "JSON list of results for pycocotools' loadRes, with narrative_id and phrase_id added",
    "index_png": "folder of palette PNGs {name}.png of class numbers, for class phrases",
}
SEVERAL_CLASSES = -1
"""`category_id` of a phrase whose segments belong to several classes."""


def join_predictions(phrases: pd.DataFrame, predictions: pd.DataFrame, split: str, origin: str) -> pd.DataFrame:
    """Join predictions with the phrases of a split, in key order; `origin` names the predictions in error messages.

    Returns:
        The columns of both tables. `mask` is the predicted mask; `predicted_row` is the row in `predictions`.

    Raises:
        UserError: the split has no predictions, a prediction is for an unknown phrase, or a score is not in [0, 1].
    """
    keys = pd.MultiIndex.from_frame(predictions[KEY])
    unknown = ~keys.isin(pd.MultiIndex.from_frame(phrases[KEY]))
    remedy = "give the table that the predictions were made for"
    if unknown.any():
        example = f"{keys[unknown][0]} (image_id, narrative_id, phrase_id)"
        raise UserError(f"{origin}: {example} is not a phrase of the table; {remedy}")
    invalid = np.flatnonzero(~predictions["score"].between(0, 1))
    if len(invalid):
        score = predictions["score"].iloc[invalid[0]]
        raise UserError(f"{origin}: row {invalid[0]}: score {score} is not a number in [0, 1]; give a confidence")
    numbered = predictions.assign(predicted_row=np.arange(len(predictions)))
    chosen = phrases[phrases["split"] == split].drop(columns="mask")
    joined = chosen.merge(numbered, on=KEY).sort_values(KEY, ignore_index=True)
    if joined.empty:
        raise UserError(f"{origin}: no predictions for split {split}; {remedy}, or choose another --split")
    return joined


def export_coco(rows: pd.DataFrame, out: Path) -> None:
    """Write one COCO result per row of `join_predictions`, in its order; `category_id` is `class_id`.

    Raises UserError if a mask does not have the size of its image.
    """
    results = []
    for row in rows.to_dict("records"):
        size = [row["height"], row["width"]]
        rle.check(row["mask"], *size)
        result = {
            "image_id": row["image_id"],
            "category_id": SEVERAL_CLASSES if pd.isna(row["class_id"]) else row["class_id"],
            "segmentation": {"size": size, "counts": row["mask"].decode("ascii")},
            "score": row["score"],
            "narrative_id": row["narrative_id"],
            "phrase_id": row["phrase_id"],
        }
        results.append(json.dumps(result, ensure_ascii=False))
    write_text(out, "[" + ",\n".join(results) + "]\n")


def export_index_png(
    rows: pd.DataFrame,
    classes: ClassList,
    out: Path,
    numbering: Numbering,
    origin: str,
    soft: Path | None = None,
    rule: Background | None = None,
) -> int:
    """Write the labels whose mIoU is scored as one palette PNG per image, and return the number of images.

    With soft maps, a pixel belongs to the class with the highest map, or to background by `rule`; without, to the mask with the
    highest score. A pixel without a class gets the number of the background class. If the study has none, it gets 0, or 255 if
    a class has the number 0.

    Args:
        rows: class phrases with predictions, from `join_predictions`.
        origin: name of the class-phrase table in error messages.
        soft: predictions file of `rows` that has soft maps; None: export the masks.
        rule: rule for background pixels of soft maps; required for data with a background class, and only allowed there.

    Raises:
        UserError: `rule` is missing or forbidden, a class number is not in 0 to 254, two images share a name, or `out` exists.
    """
    # 1. Check the arguments.
    if out.exists():
        raise UserError(f"{out}: already exists; give --out a new folder")
    if rule is None and soft is not None and classes.background is not None:
        remedy = "give --background threshold:V, where V is score.background_threshold"
        raise UserError(f"{soft}: soft maps of data with a background class; {remedy}")
    if rule is not None and (soft is None or classes.background is None):
        raise UserError("--background: only for soft maps of data with a background class; leave it out")
    numbers = [classes.number(index, numbering) for index in range(len(classes.ids))]
    if max(numbers) >= IGNORE or min(numbers) < 0:
        raise UserError(f"{origin}: class number {max(numbers)} does not fit a PNG's 0 to 254; give --numbering position")
    rest = IGNORE if 0 in numbers else 0
    if classes.background is not None:
        rest = numbers[classes.background]

    # 2. Write the images.
    names: set[str] = set()
    with atomic_directory(out) as folder:
        for _, name, height, width, group in iterate_images(rows):
            if name in names:
                raise UserError(f"{origin}: two images are called {name}; rename one of them")
            names.add(name)
            if classes.background is not None:
                group = group[group["phrase_id"] != classes.background]
            if soft is None:
                owner = paint([rle.decode(mask, height, width) for mask in group["mask"]], list(group["score"]), height, width)
            else:
                maps = np.stack([read_maps(soft, slice(row, row + 1))[0] for row in group["predicted_row"]])
                owner = (rule or Background("none")).winner(bilinear(maps, height, width))
            values = np.array([*(numbers[index] for index in group["phrase_id"]), rest], np.uint8)  # NO_CLASS selects the last
            picture = Image.fromarray(values[owner]).convert("P")
            picture.putpalette(palette().ravel().tolist())
            picture.save(folder / f"{name}.png")
    return len(names)


def palette() -> np.ndarray:
    """Return the PASCAL VOC colour map [256, 3]: bit k of channel c, from the top, is bit 3 k + c of the index."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * k + c)) & 1) << (7 - k) for k in range(8)) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)
