"""mIoU from class phrases: every class is predicted in every image, and a pixel takes the class with the highest value.

There is one confusion matrix over the whole data set at native size. IoU = TP / (T + P - TP); mIoU is the mean over the
classes with ground truth. TP, T and P are stored per image and class, so that the bootstrap can draw images.
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
"""Function from row numbers [n] of the predictions to their soft maps [n, h, w] in [0, 1]."""

IGNORED = -1
"""Label of pixels without ground truth."""


@dataclass(frozen=True)
class PixelCounts:
    """Pixel counts of one set of predictions for class phrases."""

    image_ids: Labels
    """[images], ascending."""
    counts: Labels
    """[images, 3, classes]: labelled pixels that are true positives, of the ground truth, predicted."""
    names: list[str]
    """[classes]."""
    missing: int
    """Number of class phrases without a prediction, except the background's; their classes get no pixel."""


def count_pixels(
    rows: pd.DataFrame,
    maps: Maps | None,
    classes: Sequence[dict[str, Any]],
    background_threshold: float,
    origin: str = "class phrases",
) -> PixelCounts:
    """Count pixels by class over the images of a class-phrase table.

    Ground truth: the masks of the classes; where they overlap, the class with fewer pixels in this image is in front. A class
    marked `background` in `classes` either has rows in the table like the others or, without a row, consists of every pixel
    that no class covers. Pixels that still have no class are unlabelled and not counted.

    Prediction: the class whose soft map, up-sampled bilinearly to native size, is highest. If `maps` is None, the class
    whose mask covers the pixel; of several the one with the highest `score`. Ties go to the lower class index.

    Background rule, for data sets with a background class only: a pixel is background if its highest value is below
    `background_threshold`, or if no mask covers it. A prediction for the background itself is ignored. Without a background
    class, a pixel that no mask covers has no predicted class: a miss for its true class, a false positive for none.

    Args:
        rows: class phrases with their predictions (`scoring.match`) and masks that fit their images; `phrase_id` is the
            index into `classes`, `area` the number of pixels in `mask`, `predicted_row` the row of the soft map.
        classes: dictionaries with `name` and, for at most one class, `background`.
        background_threshold: in [0, 1].
        origin: name of the class-phrase table in error messages.

    Raises:
        UserError: a `phrase_id` is not the index of a class.
    """
    count = len(classes)
    background = next((index for index, item in enumerate(classes) if item.get("background")), None)
    unknown = ~rows["phrase_id"].between(0, count - 1)
    if unknown.any():
        phrase_id = rows.loc[unknown, "phrase_id"].iloc[0]
        raise UserError(f"{origin}: phrase_id {phrase_id} is not the index of one of {count} classes; run `genseg data` again")
    counts, missing = [], 0
    images = rows.sort_values(["image_id", "phrase_id"]).groupby("image_id", sort=True)
    for _, image in images:
        height, width = int(image["height"].iloc[0]), int(image["width"].iloc[0])
        foreground = image[image["phrase_id"] != (-1 if background is None else background)]
        predicted = foreground[foreground["predicted_row"] >= 0]
        missing += len(foreground) - len(predicted)
        if maps is None:
            values = _mask_scores(predicted, height, width)
        else:
            values = bilinear(maps(predicted["predicted_row"].to_numpy(np.int64)), height, width)
        labels = _highest(values, predicted["phrase_id"].to_numpy(np.int64), count, background)
        if background is not None and maps is not None and len(values):
            labels[values.max(0) < background_threshold] = background
        counts.append(_count(_truth(image, height, width, background), labels, count))
    image_ids = np.array(list(images.groups), np.int64)
    return PixelCounts(image_ids, np.stack(counts), [str(item["name"]) for item in classes], missing)


def _truth(rows: pd.DataFrame, height: int, width: int, background: int | None) -> Labels:
    """Class indices [H, W] of the ground truth of one image."""
    has_row = background is not None and bool((rows["phrase_id"] == background).any())
    truth = np.full((height, width), IGNORED if background is None or has_row else background, np.int64)
    back_to_front = rows[rows["area"] > 0].sort_values("area", ascending=False, kind="stable")
    for index, mask in zip(back_to_front["phrase_id"], back_to_front["mask"], strict=True):
        truth[decode_checked(mask, height, width)] = index
    return truth


def _mask_scores(rows: pd.DataFrame, height: int, width: int) -> NDArray[np.float32]:
    """Scores [n, H, W]: the prediction's score inside its mask, -inf outside."""
    values = np.full((len(rows), height, width), -np.inf, np.float32)
    for layer, mask, score in zip(values, rows["predicted_mask"], rows["score"], strict=True):
        layer[decode_checked(mask, height, width)] = score
    return values


def _highest(values: NDArray[np.float32], indices: Labels, count: int, background: int | None) -> Labels:
    """Class indices [H, W] of the highest `values` [n, H, W], whose classes are `indices` [n].

    Where no value is finite, the label is the background or, without a background class, `count`.
    """
    default = count if background is None else background
    if not len(values):
        return np.full(values.shape[1:], default, np.int64)
    return np.where(np.isfinite(values.max(0)), indices[values.argmax(0)], default)


def _count(truth: Labels, predicted: Labels, count: int) -> Labels:
    """TP, T and P [3, classes] of one image, from class indices [H, W]."""
    labelled = truth != IGNORED
    pairs = np.bincount(truth[labelled] * (count + 1) + predicted[labelled], minlength=count * (count + 1))
    confusion = pairs.reshape(count, count + 1)
    return np.stack([np.diagonal(confusion), confusion.sum(1), confusion[:, :count].sum(0)]).astype(np.int64)


def class_ious(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return IoU = TP / (T + P - TP) [..., classes] of counts [..., 3, classes]; NaN for a class without ground truth."""
    true_positives, truth, predicted = (counts[..., index, :].astype(np.float64) for index in range(3))
    union = truth + predicted - true_positives
    return np.divide(true_positives, union, out=np.full(union.shape, np.nan), where=truth > 0)


def mean_iou(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the mean IoU [...] over the classes with ground truth, of counts [..., 3, classes]; NaN without any."""
    ious = class_ious(counts)
    present = np.isfinite(ious)
    total = np.where(present, ious, 0).sum(-1)
    return np.divide(total, present.sum(-1), out=np.full(np.shape(total), np.nan), where=present.any(-1))
