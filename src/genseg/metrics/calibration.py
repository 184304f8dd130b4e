"""Calibration of soft maps: whether a fraction p of the pixels with foreground probability p is foreground."""

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
    """Return sums over the pixels of each image, in 15 probability bins of equal width: [images, 3, 15].

    Images are in the order of their ids. The second axis holds the number of pixels, the sum of their probabilities, and the
    number of foreground pixels in the ground truth.

    Args:
        rows: N phrases with their ground-truth `mask`.
        maps: [N, h, w] soft maps in [0, 1] of these rows; up-sampled bilinearly to native size for the pixels' probabilities.
    """
    image_ids, image_indices = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    counts = np.zeros((len(image_ids), 3, BINS))
    for (_, row), soft, image in zip(rows.iterrows(), maps, image_indices, strict=True):
        truth = row_mask(row).ravel()
        probability = bilinear(soft[None], int(row["height"]), int(row["width"])).ravel().astype(np.float64)
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        for kind, weights in enumerate((None, probability, truth)):
            counts[image, kind] += np.bincount(bins, weights, BINS)
    return counts


def calibration_error(counts: Counts) -> Counts:
    """Return the expected calibration error [...], in [0, 1], of counts [..., 3, bins] (Guo et al. 2017, Eq. 3).

    It is the mean distance between a bin's mean probability and its fraction of foreground, weighted by the bin's pixels.
    """
    pixels, probability, foreground = np.moveaxis(counts, -2, 0)
    return np.asarray(np.abs(probability - foreground).sum(-1) / pixels.sum(-1))


def calibration_summary(counts: Counts, replicates: int, seed: int) -> dict[str, Any]:
    """Return the `calibration` of a scores file from counts [images, 3, bins].

    It contains `ece` with its 95 % `interval` over images and, for a reliability plot, each bin's number of pixels, mean
    probability and foreground frequency (null for an empty bin).
    """
    pixels, probability, foreground = counts.sum(0)

    def per_pixel(sums: Counts) -> list[float | None]:
        """Ratios of sums [bins] to the numbers of pixels; None for an empty bin."""
        return [float(value / count) if count else None for value, count in zip(sums, pixels, strict=True)]

    return {
        "ece": float(calibration_error(counts.sum(0))),
        "interval": percentile_interval(calibration_error(resampled_sums(counts, replicates, seed))),
        "pixels": [int(count) for count in pixels],
        "probability": per_pixel(probability),
        "frequency": per_pixel(foreground),
    }
