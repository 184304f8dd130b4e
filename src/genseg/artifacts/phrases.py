"""The phrase table: one row per (narrative, noun phrase), with the union of the phrase's segments as a native-size mask."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask, decode
from genseg.artifacts.parquet import KEY, KEY_FIELDS, read_table, write_table
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.params import Params

VERSION = 1
SPLITS = ("train", "val", "test")
BACKGROUND = "background"
"""Tag of the background's class phrase, which is never predicted: mIoU has a separate rule for the background."""
SCHEMA = pa.schema(
    [
        *KEY_FIELDS,
        pa.field("split", pa.string(), nullable=False),
        pa.field("file_name", pa.string()),
        pa.field("height", pa.int64(), nullable=False),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("phrase", pa.string(), nullable=False),
        pa.field("is_thing", pa.bool_(), nullable=False),
        pa.field("is_plural", pa.bool_(), nullable=False),
        pa.field("class_id", pa.int64()),
        pa.field("segment_ids", pa.list_(pa.int64())),
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("tags", pa.list_(pa.string())),
    ]
)
"""`file_name` is the path of the image as given by the params (relative to the project), `class_id` is null if the phrase's
segments belong to several classes, and `tags` are arbitrary labels of a row, e.g. `compositional`."""


def read_phrases(path: str | Path) -> pd.DataFrame:
    """Read a phrase table in file order. Raises UserError as `parquet.read_table` does, or if a split is unknown."""
    optional = ("file_name", "caption", "class_id", "segment_ids", "tags")
    frame = read_table(path, SCHEMA, "phrase table", VERSION, optional)
    unknown_split = ~frame["split"].isin(SPLITS)
    if unknown_split.any():
        row = int(unknown_split.to_numpy().argmax())
        raise UserError(f"{path}: row {row}: expected split {', '.join(SPLITS)}, got {frame.at[row, 'split']!r}")
    frame["class_id"] = frame["class_id"].astype("Int64")
    return frame


def write_phrases(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a phrase table, sorted by key."""
    frame = frame.sort_values(KEY, kind="stable", ignore_index=True)
    write_table(frame, SCHEMA, path, {"kind": "phrases", "version": str(VERSION)})


def row_mask(row: pd.Series) -> Mask:
    """Return the ground-truth mask [height, width] of one row."""
    return decode(row["mask"], int(row["height"]), int(row["width"]))


def is_background(phrases: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which rows [N] of a phrase table have the tag `BACKGROUND`."""
    return np.array([tags is not None and BACKGROUND in tags for tags in phrases["tags"]], bool)


REFINED = "refine"
"""Purpose in `choose_images` of the images that are refined and on which mIoU is scored."""


def hash_unit(seed: int, *ids: object) -> float:
    """Return a number in [0, 1) that depends only on the seed and the ids; it selects images for val and for subsets."""
    return derive_seed(seed, *ids) / 2**63


def choose_images(image_ids: np.ndarray, fraction: float, seed: int, purpose: str) -> set[int]:
    """Return a fixed fraction of the images, at least one: those with the smallest `hash_unit`."""
    unique = sorted({int(image_id) for image_id in image_ids}, key=lambda image_id: hash_unit(seed, purpose, image_id))
    return set(unique[: max(1, round(fraction * len(unique)))])


def grid_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the phrases of the part of test on which the grid is sampled. A hash selects its images."""
    return _phrases_of_part(phrases, "test", params.sample.grid_fraction, params.seed, "grid")


def val_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the phrases of the part of val on which operating points are compared. A hash selects its images."""
    return _phrases_of_part(phrases, "val", params.sample.select_fraction, params.seed, "operating points")


def miou_phrases(params: Params, class_phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the class phrases of the part of test on which mIoU is scored; no rows if `score.miou` is 0.

    The images are chosen as those that are refined (`refine.test_fraction`), so the smaller part is within the larger one.
    """
    if not params.score.miou:
        return class_phrases.iloc[:0]
    return _phrases_of_part(class_phrases, "test", params.score.miou, params.seed, REFINED)


def _phrases_of_part(phrases: pd.DataFrame, split: str, fraction: float, seed: int, purpose: str) -> pd.DataFrame:
    rows = phrases[phrases["split"] == split]
    return rows[rows["image_id"].isin(choose_images(rows["image_id"].to_numpy(), fraction, seed, purpose))]
