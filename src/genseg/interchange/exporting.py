"""Predictions in formats that other tools read: COCO results and index masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from genseg.artifacts.files import atomic_directory, write_text
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_maps
from genseg.artifacts.resample import bilinear
from genseg.errors import UserError
from genseg.interchange.labels import IGNORE, NOTHING, Background, ClassList, Numbering, images, paint

FORMATS = {
    "coco": "JSON list of results for pycocotools' loadRes, with narrative_id and phrase_id beside",
    "index_png": "folder of palette PNGs {name}.png of class numbers, for class phrases",
}
SEVERAL_CLASSES = -1
"""`category_id` of a phrase whose segments are of several classes."""


def predicted(phrases: pd.DataFrame, predictions: pd.DataFrame, split: str, origin: str) -> pd.DataFrame:
    """Predictions of a split beside their phrases, by key; `mask` is the prediction's, `predicted_row` its place.

    Raises:
        UserError: there is none, one is for an unknown phrase, or a score is none.
    """
    keys = pd.MultiIndex.from_frame(predictions[KEY])
    unknown = ~keys.isin(pd.MultiIndex.from_frame(phrases[KEY]))
    if unknown.any():
        raise UserError(
            f"{origin}: {keys[unknown][0]} (image_id, narrative_id, phrase_id) is no phrase of the table; give the one that"
            " they were made for"
        )
    strange = ~predictions["score"].between(0, 1)
    if strange.any():
        row = int(np.flatnonzero(strange)[0])
        raise UserError(
            f"{origin}: row {row}: score {predictions['score'].iloc[row]} is no number in [0, 1]; give a confidence"
        )
    chosen = phrases[phrases["split"] == split].drop(columns="mask")
    numbered = predictions.assign(predicted_row=np.arange(len(predictions)))
    joined = chosen.merge(numbered, on=KEY).sort_values(KEY, ignore_index=True)
    if joined.empty:
        raise UserError(f"{origin}: no prediction for a phrase of split {split}; give the table they were made for, or --split")
    return joined


def export_coco(rows: pd.DataFrame, out: Path) -> None:
    """Write COCO results, one a prediction, in order of their keys; `category_id` is `class_id`."""
    results = []
    for row in rows.itertuples():
        height, width = int(row.height), int(row.width)  # type: ignore[arg-type]
        decode(row.mask, height, width)  # type: ignore[arg-type]
        result = {
            "image_id": int(row.image_id),  # type: ignore[arg-type]
            "category_id": SEVERAL_CLASSES if pd.isna(row.class_id) else int(row.class_id),  # type: ignore[arg-type]
            "segmentation": {"size": [height, width], "counts": row.mask.decode("ascii")},  # type: ignore[union-attr]
            "score": float(row.score),  # type: ignore[arg-type]
            "narrative_id": row.narrative_id,
            "phrase_id": int(row.phrase_id),  # type: ignore[arg-type]
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
    """Write one palette PNG an image and return their number: the labels whose mIoU is scored.

    With soft maps the highest wins, and the background by its rule; else, where masks overlap, the higher score. A pixel of no
    class is the background's number if the study has such a class, else 0, or 255 where a class is called 0.

    Args:
        soft: predictions file of `rows` that has soft maps beside it.
        rule: whether a pixel of the soft maps is background; only data with a background class have one.

    Raises:
        UserError: a rule too few or too many, a class number over 254, two pictures of one name, or `out`
            exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give --out a new folder")
    if rule is None and soft is not None and classes.background is not None:
        raise UserError(
            f"{soft}: its soft maps need --background threshold:V, where mIoU is scored with score.background_threshold"
        )
    if rule is not None and (soft is None or classes.background is None):
        raise UserError("--background: a rule for soft maps of data with a background class, which these are not; leave it out")
    numbers = [classes.number(place, numbering) for place in range(len(classes.ids))]
    if max(numbers) >= IGNORE or min(numbers) < 0:
        raise UserError(f"{origin}: class number {max(numbers)} does not fit a PNG's 0 to 254; give --numbering position")
    rest = IGNORE if 0 in numbers else 0
    if classes.background is not None:
        rest = numbers[classes.background]
    written: set[str] = set()
    with atomic_directory(out) as folder:
        for _, name, height, width, group in images(rows):
            if name in written:
                raise UserError(f"{origin}: two pictures are called {name}; rename one of them")
            written.add(name)
            group = group[group["phrase_id"] != (NOTHING if classes.background is None else classes.background)]
            if soft is None:
                front = paint([decode(mask, height, width) for mask in group["mask"]], group["score"].tolist(), height, width)
            else:
                maps = [read_maps(soft, slice(row, row + 1))[0] for row in group["predicted_row"]]
                front = (rule or Background("none")).winner(bilinear(np.stack(maps), height, width))
            values = np.array([*(numbers[place] for place in group["phrase_id"]), rest], np.uint8)[front]
            picture = Image.fromarray(values).convert("P")
            picture.putpalette(palette().ravel().tolist())
            picture.save(folder / f"{name}.png")
    return len(written)


def palette() -> np.ndarray:
    """The PASCAL VOC colour map [256, 3]: bit k of channel c, from the top, is bit 3 k + c of the index."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * k + c)) & 1) << (7 - k) for k in range(8)) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)
