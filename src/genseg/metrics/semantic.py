"""mIoU from class phrases: every class of the list is asked for in every image, and a pixel takes the best answer.

One confusion matrix over the whole data set at native size; IoU = TP / (T + P - TP); mean over the classes with ground
truth. Kept per image as TP, T and P by class, so that the bootstrap can draw images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import decode_checked
from genseg.artifacts.resample import bilinear
from genseg.errors import UserError

Labels = NDArray[np.int64]
Maps = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Rows of the predictions -> their soft maps [n, h, w] in [0, 1]."""

IGNORED = -1


@dataclass(frozen=True)
class Semantic:
    """Pixel counts of one set of class predictions."""

    image_ids: Labels
    """[images], ascending."""
    counts: Labels
    """[images, 3, classes]: true positives, ground truth, predicted; labelled pixels only."""
    names: list[str]
    missing: int
    """Class phrases (but the background's) without a prediction; such a class cannot win a pixel."""


def count_pixels(
    rows: pd.DataFrame,
    maps: Maps | None,
    classes: Sequence[dict[str, Any]],
    background_threshold: float,
    origin: str = "class phrases",
) -> Semantic:
    """Count pixels by class over the images of a class-phrase table.

    Ground truth: the classes' masks; where they overlap, the one with fewer pixels in this image is in front. A class
    marked `background` in `classes` is either a row of the table like the others, or, without a row, every pixel that no
    class covers. A pixel that then has no class is unlabelled and not counted at all.

    Prediction: the class whose soft map, read bilinearly at native size, is highest; where `maps` is None, the class
    whose mask covers the pixel, the higher `score` first; equal ones: the lower index. Background rule (data sets with a
    background class only): a pixel whose highest value is under `background_threshold`, or that no mask covers, is
    background; a prediction for the background itself is not read. Without a background class, a pixel that no mask covers
    is predicted as nothing: a miss for its class, a false positive for none.

    Args:
        rows: class phrases beside their predictions (`scoring.match`) with masks that fit their images; `phrase_id` is the
            index into `classes`, `area` the pixels of `mask`, `predicted_row` the row of the soft map.
        origin: what messages call the class-phrase table.
    """
    count = len(classes)
    background = next((index for index, item in enumerate(classes) if item.get("background")), None)
    strange = ~rows["phrase_id"].between(0, count - 1)
    if strange.any():
        raise UserError(
            f"{origin}: phrase_id {rows.loc[strange, 'phrase_id'].iloc[0]} is no index of the {count} classes; assemble again"
        )
    rows = rows.sort_values(["image_id", "phrase_id"])
    counts, missing = [], 0
    images = rows.groupby("image_id", sort=True)
    for _, image in images:
        height, width = int(image["height"].iloc[0]), int(image["width"].iloc[0])
        asked = image[image["phrase_id"] != (-1 if background is None else background)]
        answered = asked[asked["predicted_row"] >= 0]
        missing += len(asked) - len(answered)
        if maps is None:
            values = _mask_scores(answered, height, width)
        else:
            values = bilinear(maps(answered["predicted_row"].to_numpy(np.int64)), height, width)
        predicted = _winner(values, answered["phrase_id"].to_numpy(np.int64), count, background)
        if background is not None and maps is not None and len(values):
            predicted[values.max(0) < background_threshold] = background
        counts.append(_count(_truth(image, height, width, background), predicted, count))
    return Semantic(np.array(list(images.groups), np.int64), np.stack(counts), [str(item["name"]) for item in classes], missing)


def _truth(rows: pd.DataFrame, height: int, width: int, background: int | None) -> Labels:
    """Label map [H, W] of class indices."""
    has_row = background is not None and bool((rows["phrase_id"] == background).any())
    truth = np.full((height, width), IGNORED if background is None or has_row else background, np.int64)
    behind_first = rows[rows["area"] > 0].sort_values("area", ascending=False, kind="stable")
    for index, mask in zip(behind_first["phrase_id"], behind_first["mask"], strict=True):
        truth[decode_checked(mask, height, width)] = index
    return truth


def _mask_scores(answered: pd.DataFrame, height: int, width: int) -> NDArray[np.float32]:
    """Score inside of each mask, -inf outside: [n, H, W]."""
    values = np.full((len(answered), height, width), -np.inf, np.float32)
    for layer, mask, score in zip(values, answered["predicted_mask"], answered["score"], strict=True):
        layer[decode_checked(mask, height, width)] = score
    return values


def _winner(values: NDArray[np.float32], indices: Labels, count: int, background: int | None) -> Labels:
    """Class index [H, W] of the highest of `values` [n, H, W]; background, or `count` for nothing, where none is finite."""
    nothing = count if background is None else background
    if not len(values):
        return np.full(values.shape[1:], nothing, np.int64)
    return np.where(np.isfinite(values.max(0)), indices[values.argmax(0)], nothing)


def _count(truth: Labels, predicted: Labels, count: int) -> Labels:
    """TP, T and P by class [3, classes] of one image."""
    labelled = truth != IGNORED
    pairs = np.bincount(truth[labelled] * (count + 1) + predicted[labelled], minlength=count * (count + 1))
    confusion = pairs.reshape(count, count + 1)
    return np.stack([np.diagonal(confusion), confusion.sum(1), confusion[:, :count].sum(0)]).astype(np.int64)


def class_ious(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """IoU = TP / (T + P - TP) of counts [..., 3, classes] (TP, T, P); NaN for a class without ground truth."""
    hit, truth, predicted = (counts[..., part, :].astype(np.float64) for part in range(3))
    return np.divide(hit, truth + predicted - hit, out=np.full(hit.shape, np.nan), where=truth > 0)


def mean_iou(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """Mean over the classes with ground truth: [..., 3, classes] -> [...]; NaN where there is none."""
    ious = class_ious(counts)
    present = np.isfinite(ious)
    total = np.where(present, ious, 0).sum(-1)
    return np.divide(total, present.sum(-1), out=np.full(np.shape(total), np.nan), where=present.any(-1))
