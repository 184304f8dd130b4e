"""Inputs of all refiners: predictions joined with their phrases, images, and soft maps."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask, decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.resample import Map
from genseg.data.images import load_image
from genseg.errors import UserError


def join_phrases(phrases: pd.DataFrame, predictions: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return predictions in key order with `file_name`, `height`, `width` and `column` of their phrases, which must exist."""
    table = phrases[[*KEY, "file_name", "height", "width", column]]
    rows = predictions.merge(table, on=KEY, how="left", validate="many_to_one")
    rows = rows.sort_values(KEY, kind="stable", ignore_index=True)
    unknown = rows["height"].isna()
    if unknown.any():
        key = next(rows.loc[unknown, KEY].itertuples(index=False, name=None))
        raise UserError(
            f"predictions: (image_id, narrative_id, phrase_id) = {key} is not in the phrase table; give the table that the "
            "predictions were made for"
        )
    return rows


def load_picture(file_name: str, height: int, width: int) -> NDArray[np.uint8]:
    """Load an image [height, width, 3]. Raises UserError if it is missing or differs in size from the phrase table."""
    picture = np.asarray(load_image(file_name))
    if picture.shape[:2] != (height, width):
        raise UserError(
            f"{file_name}: expected {height} x {width} pixels as in the phrase table, got {picture.shape[0]} x "
            f"{picture.shape[1]}; give the images that the table was made for"
        )
    return picture


def iterate_images(phrases: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[tuple[NDArray[np.uint8], pd.DataFrame, Mask]]:
    """Yield (image [H, W, 3], its predictions with the ground truth as `truth`, their masks [K, H, W]) in order of image ids.

    Raises UserError as `join_phrases` and `load_picture` do.
    """
    joined = join_phrases(phrases.rename(columns={"mask": "truth"}), predictions, "truth")
    for _, rows in joined.groupby("image_id", sort=True):
        height, width = int(rows["height"].iloc[0]), int(rows["width"].iloc[0])
        image = load_picture(rows["file_name"].iloc[0], height, width)
        yield image, rows, np.stack([decode(mask, height, width) for mask in rows["mask"]])


def read_coarse(path: str | Path) -> tuple[pd.DataFrame, tuple[int, int, int] | None]:
    """Read predictions and the shape (N, h, w) of their soft maps, None if there are none.

    Raises UserError if a file is unreadable, or if the numbers of predictions and soft maps differ.
    """
    predictions, shape = read_predictions(path), maps_shape(path)
    if shape is not None and shape[0] != len(predictions):
        raise UserError(f"{maps_path(path)}: expected {len(predictions)} soft maps, got {shape[0]}; make both files again")
    return predictions, shape


def read_maps_rows(predictions: str | Path, rows: NDArray[np.int64]) -> Map:
    """Read the soft maps [n, h, w] in [0, 1] of n rows of a predictions file."""
    return np.concatenate([read_maps(predictions, slice(row, row + 1)) for row in rows])
