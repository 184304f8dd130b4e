"""mIoU from class phrases: every class is predicted in every image, and a pixel takes the class with the highest value.

There is one confusion matrix over the whole data set at native size. IoU = TP / (T + P - TP), with T and P the pixels of a
class in ground truth and prediction; mIoU is the mean over classes with ground truth. Counts are by image for the bootstrap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import read_json
from genseg.artifacts.masks import decode_checked
from genseg.artifacts.phrases import miou_phrases, read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.resample import bilinear
from genseg.errors import UserError
from genseg.metrics.bootstrap import percentile_interval, resampled_sums
from genseg.metrics.recall import Floats, Integers
from genseg.metrics.scoring import mask_pairs, match
from genseg.params import Params

IGNORED = -1  # label of pixels without ground truth


@dataclass(frozen=True)
class PixelCounts:
    """Pixel counts of one set of predictions for class phrases, whose classes have `names`."""

    image_ids: Integers  # [images], ascending
    counts: Integers  # [images, 3, classes]: labelled pixels: TP, T (ground truth) and P (predicted)
    names: list[str]
    missing: int  # number of class phrases without a prediction, except the background's; they get no pixels


def class_ious(counts: NDArray[np.generic]) -> Floats:
    """Return IoU = TP / (T + P - TP) [..., classes] of counts [..., 3, classes]; NaN for a class without ground truth."""
    true_positives, truth, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = truth + predicted - true_positives
    return np.divide(true_positives, union, out=np.full(union.shape, np.nan), where=truth > 0)


def mean_iou(counts: NDArray[np.generic]) -> Floats:
    """Return the mean IoU [...] over the classes with ground truth, of counts [..., 3, classes]; NaN without any."""
    ious = class_ious(counts)
    present = np.isfinite(ious).sum(-1)
    return np.divide(np.nansum(ious, -1), present, out=np.full(np.shape(present), np.nan), where=present > 0)


def miou_summary(params: Params, pixels: PixelCounts) -> dict[str, Any]:
    """Return the `miou` of a scores file.

    It contains `mean` and `per_class` in [0, 1] (null without ground truth), the 95 % `interval` of the mean, and the numbers
    of images, labelled pixels and missing predictions.
    """
    total = pixels.counts.sum(0)
    mean = float(mean_iou(total))
    ious = zip(pixels.names, class_ious(total), strict=True)
    return {
        "mean": None if np.isnan(mean) else mean,
        "per_class": {name: None if np.isnan(iou) else float(iou) for name, iou in ious},
        "interval": percentile_interval(mean_iou(resampled_sums(pixels.counts, params.score.bootstrap, params.seed))),
        "background_threshold": params.score.background_threshold,
        "images": len(pixels.image_ids),
        "pixels": int(total[1].sum()),
        "missing": pixels.missing,
    }


class ClassPhrases:
    """A study's class list and class-phrase table, for the test images on which mIoU is scored, and of these `images`."""

    def __init__(self, params: Params, images: Sequence[int] | None = None) -> None:
        self.path = params.data_dir / "class_phrases.parquet"
        self.threshold = params.score.background_threshold
        self.table = read_phrases(self.path)
        scored = set(miou_phrases(params, self.table)["image_id"])
        self.images = scored if images is None else scored & set(images)
        self.classes = read_json(params.data_dir / "classes.json")
        self.has_background = any(item.get("background") for item in self.classes)

    def count(self, path: Path, threshold: float | None = None) -> PixelCounts:
        """Count the pixels of a predictions file, from its soft maps if it has them, otherwise from its masks.

        `threshold`, in [0, 1], is that of the background rule, by default that of the params. Raises UserError if the file is
        missing or broken, or does not match the class-phrase table.
        """
        origins = (str(self.path), str(path))
        predictions = read_predictions(path)
        shape = maps_shape(path)
        if shape is not None and shape[0] != len(predictions):
            raise UserError(
                f"{maps_path(path)}: expected {len(predictions)} soft maps, one for each prediction, got {shape[0]}; "
                f"make it and {path.name} again"
            )
        rows, _ = match(self.table, predictions, "test", False, origins)
        rows = rows[rows["image_id"].isin(self.images)].reset_index(drop=True)
        pairs = mask_pairs(rows, origins)
        rows = rows.assign(mask=pairs.truths, predicted_mask=pairs.predictions, area=pairs.truth_area)

        def maps(predicted_rows: Integers) -> NDArray[np.float32]:
            """Read the range of rows that contains `predicted_rows`; the rows of an image are adjacent."""
            start, stop = (int(predicted_rows.min()), int(predicted_rows.max()) + 1) if len(predicted_rows) else (0, 0)
            return read_maps(path, slice(start, stop))[predicted_rows - start]

        threshold = self.threshold if threshold is None else threshold
        return count_pixels(rows, None if shape is None else maps, self.classes, threshold, origins[0])


def count_pixels(
    rows: pd.DataFrame,
    maps: Callable[[Integers], NDArray[np.float32]] | None,
    classes: Sequence[dict[str, Any]],
    background_threshold: float,
    origin: str = "class phrases",
) -> PixelCounts:
    """Count pixels by class over the images of a class-phrase table. Raises UserError for an unknown class index.

    Ground truth: the masks of the classes; where they overlap, the class with fewer pixels in this image is in front. A class
    marked `background` in `classes` either has rows in the table like the others or, without a row, consists of every pixel
    that no class covers. Pixels that still have no class are unlabelled and not counted.

    Prediction: the class whose soft map, up-sampled bilinearly to native size, is highest. If `maps` is None, the class
    whose mask covers the pixel; of several, the one with the highest `score`. Ties go to the lower class index.

    Background rule, for data sets with a background class only: a pixel is background if its highest value is below
    `background_threshold` in [0, 1], or if no mask covers it. A prediction for the background itself is ignored. Without a
    background class, a pixel that no mask covers has no predicted class: a miss for its true class, a false positive for none.

    Args:
        rows: class phrases with their predictions (`scoring.match`) and masks that fit their images; `phrase_id` is the
            index into `classes`, `area` the number of pixels in `mask`, `predicted_row` the row of the soft map.
        maps: function from row numbers [n] of the predictions to their soft maps [n, h, w] in [0, 1].
        classes: dictionaries with `name` and, for at most one class, `background`.
        origin: name of the class-phrase table in error messages.
    """
    # 1. Check the class indices.
    count = len(classes)
    background = next((index for index, item in enumerate(classes) if item.get("background")), None)
    unknown = ~rows["phrase_id"].between(0, count - 1)
    if unknown.any():
        phrase_id = rows.loc[unknown, "phrase_id"].iloc[0]
        raise UserError(f"{origin}: phrase_id {phrase_id} is not the index of one of {count} classes; run `genseg data` again")

    # 2. Label and count the pixels of each image. Pixels whose highest value is below `floor` get the label `default`.
    default = count if background is None else background
    floor = np.finfo(np.float32).min if maps is None or background is None else background_threshold
    counts, missing = [], 0
    images = rows.sort_values(["image_id", "phrase_id"]).groupby("image_id", sort=True)
    for _, image in images:
        height, width = int(image["height"].iloc[0]), int(image["width"].iloc[0])
        foreground = image[image["phrase_id"] != (-1 if background is None else background)]
        predicted = foreground[foreground["predicted_row"] >= 0]
        missing += len(foreground) - len(predicted)
        labels = np.full((height, width), default, np.int64)
        highest = np.full((height, width), -np.inf, np.float32)
        soft = None if maps is None else maps(predicted["predicted_row"].to_numpy(np.int64))
        for number, (index, mask, score) in enumerate(predicted[["phrase_id", "predicted_mask", "score"]].to_numpy()):
            if soft is None:
                values = np.where(decode_checked(mask, height, width), np.float32(score), np.float32(-np.inf))
            else:
                values = bilinear(soft[number : number + 1], height, width)[0]
            wins = (values > highest) & (values >= floor)
            labels[wins], highest[wins] = index, values[wins]
        counts.append(_count(_truth(image, height, width, background), labels, count))
    image_ids = np.array(list(images.groups), np.int64)
    return PixelCounts(image_ids, np.stack(counts), [str(item["name"]) for item in classes], missing)


def _truth(rows: pd.DataFrame, height: int, width: int, background: int | None) -> Integers:
    """Class indices [H, W] of the ground truth of one image."""
    has_row = background is not None and bool((rows["phrase_id"] == background).any())
    truth = np.full((height, width), IGNORED if background is None or has_row else background, np.int64)
    back_to_front = rows[rows["area"] > 0].sort_values("area", ascending=False, kind="stable")
    for index, mask in zip(back_to_front["phrase_id"], back_to_front["mask"], strict=True):
        truth[decode_checked(mask, height, width)] = index
    return truth


def _count(truth: Integers, predicted: Integers, count: int) -> Integers:
    """TP, T and P [3, classes] of one image, from class indices [H, W]."""
    labelled = truth != IGNORED
    pairs = np.bincount(truth[labelled] * (count + 1) + predicted[labelled], minlength=count * (count + 1))
    confusion = pairs.reshape(count, count + 1)
    return np.stack([np.diagonal(confusion), confusion.sum(1), confusion[:, :count].sum(0)]).astype(np.int64)
