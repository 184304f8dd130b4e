"""Calibration of soft maps: whether of the pixels that are called foreground with probability p, a part p is foreground."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import bilinear
from genseg.metrics.bootstrap import percentile_interval, resampled_sums

BINS = 15
Counts = NDArray[np.float64]


def calibration_counts(rows: pd.DataFrame, maps: NDArray[np.float32]) -> Counts:
    """Sums over the pixels of each image, by probability in 15 bins of equal width: [images, 3, 15], images in the order of
    their ids; along the second axis pixels, sum of the probabilities, foreground pixels of the ground truth.

    Args:
        rows: phrases, with their ground truth `mask`.
        maps: [N, h, w] soft maps in [0, 1] of these rows; a pixel's probability is their bilinear up-sampling to native size.
    """
    ids, place = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    counts = np.zeros((len(ids), 3, BINS))
    for (_, row), soft, image in zip(rows.iterrows(), maps, place, strict=True):
        truth = row_mask(row).ravel()
        probability = bilinear(soft[None], int(row["height"]), int(row["width"])).ravel().astype(np.float64)
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        for kind, weights in enumerate((None, probability, truth)):
            counts[image, kind] += np.bincount(bins, weights, BINS)
    return counts


def calibration_error(counts: Counts) -> Counts:
    """Expected calibration error (Guo et al. 2017, Eq. 3) of counts [..., 3, bins]: the bins' distances between mean
    probability and frequency of the foreground, weighted by their pixels; a fraction."""
    pixels, probability, foreground = np.moveaxis(counts, -2, 0)
    return np.asarray(np.abs(probability - foreground).sum(-1) / pixels.sum(-1))


def calibration_summary(counts: Counts, replicates: int, seed: int) -> dict[str, Any]:
    """`ece` with its 95 % interval over images, and per bin (null where it is empty) what a reliability plot shows."""
    pixels, probability, foreground = counts.sum(0)

    def per_pixel(sums: Counts) -> list[float | None]:
        return [float(value / count) if count else None for value, count in zip(sums, pixels, strict=True)]

    return {
        "ece": float(calibration_error(counts.sum(0))),
        "interval": percentile_interval(calibration_error(resampled_sums(counts, replicates, seed))),
        "pixels": [int(count) for count in pixels],
        "probability": per_pixel(probability),
        "frequency": per_pixel(foreground),
    }
