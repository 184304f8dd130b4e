"""Calibration of soft maps, and the operating points on val: AR at every threshold, and the best point for each cost.

Maps are calibrated if a fraction p of the pixels with foreground probability p is foreground.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import Map, bilinear
from genseg.metrics.bootstrap import percentile_interval, resampled_sums
from genseg.metrics.recall import Floats
from genseg.sampling.runs import Run

BINS = 15
THRESHOLDS = np.round(np.linspace(0.05, 0.95, 19), 2)


def upsampled_maps(rows: pd.DataFrame, maps: Iterable[Map]) -> Iterator[tuple[Mask, Map]]:
    """Yield ground truth and soft map [H * W] of each of N rows, from N maps [h, w], bilinearly up-sampled to native size."""
    for (_, row), soft in zip(rows.iterrows(), maps, strict=True):
        yield row_mask(row).ravel(), bilinear(soft[None], int(row["height"]), int(row["width"])).ravel()


def calibration_counts(rows: pd.DataFrame, maps: Iterable[Map]) -> Floats:
    """Return sums over the pixels of each image, in 15 probability bins of equal width: [images, 3, 15].

    Images are in the order of their ids. The second axis holds the number of pixels, the sum of their probabilities, and the
    number of foreground pixels in the ground truth.

    Args:
        rows: N phrases with their ground-truth `mask`.
        maps: N soft maps [h, w] in [0, 1] of these rows; at native size they are the pixels' probabilities.
    """
    image_ids, image_indices = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    counts = np.zeros((len(image_ids), 3, BINS))
    for (truth, soft), image in zip(upsampled_maps(rows, maps), image_indices, strict=True):
        probability = soft.astype(np.float64)
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        for kind, weights in enumerate((None, probability, truth)):
            counts[image, kind] += np.bincount(bins, weights, BINS)
    return counts


def calibration_error(counts: Floats) -> Floats:
    """Return the expected calibration error [...], in [0, 1], of counts [..., 3, bins] (Guo et al. 2017, Eq. 3).

    It is the mean distance between a bin's mean probability and its fraction of foreground, weighted by the bin's pixels.
    """
    pixels, probability, foreground = np.moveaxis(counts, -2, 0)
    return np.asarray(np.abs(probability - foreground).sum(-1) / pixels.sum(-1))


def calibration_summary(counts: Floats, replicates: int, seed: int) -> dict[str, Any]:
    """Return the `calibration` of a scores file from counts [images, 3, bins].

    It contains `ece` with its 95 % `interval` over images and, for a reliability plot, each bin's number of pixels, mean
    probability and foreground frequency (null for an empty bin).
    """
    pixels, probability, foreground = counts.sum(0)

    def per_pixel(sums: Floats) -> list[float | None]:
        return [float(value / count) if count else None for value, count in zip(sums, pixels, strict=True)]

    return {
        "ece": float(calibration_error(counts.sum(0))),
        "interval": percentile_interval(calibration_error(resampled_sums(counts, replicates, seed))),
        "pixels": [int(count) for count in pixels],
        "probability": per_pixel(probability),
        "frequency": per_pixel(foreground),
    }


def threshold_ious(rows: pd.DataFrame, maps: Iterable[Map], thresholds: Floats = THRESHOLDS) -> Floats:
    """Return the native IoU [N, K] of soft maps, up-sampled bilinearly and cut at each of K thresholds; 0 for an empty union.

    For `rows` and `maps` see `calibration_counts`; `thresholds` [K] are in [0, 1], ascending.
    """
    levels = thresholds.astype(np.float32)
    ious = np.zeros((len(rows), len(levels)))

    def count_pixels_by_level(values: NDArray[np.float32]) -> NDArray[np.int64]:
        reached = np.searchsorted(levels, values, side="right")  # number of levels that a pixel reaches
        return np.bincount(reached, minlength=len(levels) + 1)[::-1].cumsum()[::-1][1:]

    for (truth, soft), iou in zip(upsampled_maps(rows, maps), ious, strict=True):
        predicted, intersection = count_pixels_by_level(soft), count_pixels_by_level(soft[truth])
        union = predicted + truth.sum() - intersection
        np.divide(intersection, union, out=iou, where=union > 0)
    return ious


def operating_point(run: Run, summary: dict[str, Any], ious: Floats | None, threshold: float, path: Path) -> dict[str, Any]:
    """Return the operating point of a run on val: its AR as scored, and its native AR at the best threshold.

    Args:
        summary: the run's scores on val (written to `path`), including `calibration`.
        ious: [N, K] from `threshold_ious`; None for a run without bilinear soft maps, which keeps its own `threshold`.
    """
    best_ar, best_threshold = summary["ar"]["overall"], threshold
    if ious is not None:
        recall = ious.mean(0)
        best_ar, best_threshold = float(recall.max()), float(THRESHOLDS[recall.argmax()])
    low, high = summary["interval"]["overall"] or (None, None)
    return {
        "name": run.name,
        "point": None if run.point is None else run.point.model_dump(mode="json"),
        "evaluations": run.evaluations,
        "phrases": summary["counts"]["phrases"],
        "images": summary["counts"]["images"],
        "threshold": threshold,
        "ar": summary["ar"]["overall"],
        "ci_low": low,
        "ci_high": high,
        "best_threshold": best_threshold,
        "best_ar": best_ar,
        "ece": (summary["calibration"] or {}).get("ece"),
        "scores": str(path),
    }


def choose_point(points: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Return the point with the highest AR on val, at its best threshold, among those with at most `budget` evaluations.

    Of equally good points the cheapest is chosen. At least one point must fit the budget.
    """
    affordable = [point for point in points if point["evaluations"] <= budget]
    return min(affordable, key=lambda point: (-point["best_ar"], point["evaluations"], point["name"]))


def operating_points(points: list[dict[str, Any]], main: str) -> dict[str, Any]:
    """Return the contents of `operating_points.json`: the points ordered by evaluations, and the best one at each cost.

    The points have at least `name`, `evaluations` and `best_ar`; `main` is the name of the main point.
    """
    best = []
    for budget in sorted({point["evaluations"] for point in points}):
        chosen = choose_point(points, budget)
        best.append({"evaluations_at_most": budget, **{key: chosen[key] for key in ("name", "evaluations", "best_ar")}})
    main_cost = next(point["evaluations"] for point in points if point["name"] == main)
    return {
        "split": "val",
        "thresholds": THRESHOLDS.tolist(),
        "main": main,
        "main_is_best_for_its_cost": choose_point(points, main_cost)["name"] == main,
        "best": best,
        "points": sorted(points, key=lambda point: (point["evaluations"], point["name"])),
    }
