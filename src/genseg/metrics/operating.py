"""Operating points on val: AR at every threshold of the soft maps, and the best point for each number of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import bilinear

THRESHOLDS = np.round(np.linspace(0.05, 0.95, 19), 2)
POINT_FIELDS = ("name", "size", "steps", "guidance", "rule", "guidance_interval", "ensemble", "evaluations")
"""Fields of a run that identify its operating point."""
Floats = NDArray[np.float64]


def threshold_ious(rows: pd.DataFrame, maps: NDArray[np.float32], thresholds: Floats = THRESHOLDS) -> Floats:
    """Return the native IoU [N, K] of soft maps, up-sampled bilinearly and cut at each of K thresholds.

    The IoU is 0 where the union is empty.

    Args:
        rows: N phrases with their ground-truth `mask`.
        maps: [N, h, w] soft maps in [0, 1] of these rows.
        thresholds: [K] in [0, 1], ascending.
    """
    ious = np.zeros((len(rows), len(thresholds)))
    levels = thresholds.astype(np.float32)
    for (_, row), soft, iou in zip(rows.iterrows(), maps, ious, strict=True):
        truth = row_mask(row).ravel()
        upsampled = bilinear(soft[None], int(row["height"]), int(row["width"])).ravel()
        reached = np.searchsorted(levels, upsampled, side="right")  # [H * W], number of thresholds that a pixel reaches
        predicted, intersection = _at_least(reached, len(levels)), _at_least(reached[truth], len(levels))
        union = predicted + truth.sum() - intersection
        np.divide(intersection, union, out=iou, where=union > 0)
    return ious


def _at_least(reached: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Number of pixels [count] that reach at least 1, ..., `count` thresholds."""
    return np.bincount(reached, minlength=count + 1)[::-1].cumsum()[::-1][1:]


def operating_point(
    run: Mapping[str, Any], summary: dict[str, Any], ious: Floats | None, threshold: float, path: Path
) -> dict[str, Any]:
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
        **{name: run[name] for name in POINT_FIELDS},
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
    """Return the point with the highest AR on val, at its best threshold, among those of at most `budget` evaluations.

    Of equally good points the cheapest is chosen. At least one point must fit the budget.
    """
    affordable = [point for point in points if point["evaluations"] <= budget]
    return min(affordable, key=lambda point: (-point["best_ar"], point["evaluations"], point["name"]))


def operating_points(points: list[dict[str, Any]], main: str) -> dict[str, Any]:
    """Return the contents of `operating_points.json`: the points ordered by evaluations, and the best one for each number.

    Args:
        points: operating points with at least `name`, `evaluations` and `best_ar`.
        main: name of the main point.
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
