"""Operating points on val: AR at every threshold of the soft maps, and which point is best for what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import bilinear

THRESHOLDS = np.round(np.linspace(0.05, 0.95, 19), 2)
Floats = NDArray[np.float64]


def threshold_ious(rows: pd.DataFrame, maps: NDArray[np.float32], thresholds: Floats = THRESHOLDS) -> Floats:
    """Native IoU [N, K] of the masks that bilinear read-out of maps [N, h, w] gives at each of K ascending thresholds; 0
    where the union is empty."""
    found = np.zeros((len(rows), len(thresholds)))
    levels = thresholds.astype(np.float32)
    for (_, row), soft, iou in zip(rows.iterrows(), maps, found, strict=True):
        truth = row_mask(row).ravel()
        reached = np.searchsorted(levels, bilinear(soft[None], int(row["height"]), int(row["width"])).ravel(), side="right")
        pixels, inside = (
            np.bincount(part, minlength=len(levels) + 1)[::-1].cumsum()[::-1][1:] for part in (reached, reached[truth])
        )
        union = pixels + truth.sum() - inside
        np.divide(inside, union, out=iou, where=union > 0)
    return found


def choose_point(points: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """The point with the highest AR on val, at its best threshold, among those of at most `budget` evaluations (one must be);
    of equals the cheapest."""
    affordable = [point for point in points if point["evaluations"] <= budget]
    return min(affordable, key=lambda point: (-point["best_ar"], point["evaluations"], point["name"]))


def operating_points(points: list[dict[str, Any]], main: str) -> dict[str, Any]:
    """What the scores tell about the points: the points themselves by evaluations, for each number of evaluations the best
    that costs no more, and whether the main point is the best for its cost.

    Args:
        points: `name`, `evaluations`, `best_ar` and whatever else is known of each.
        main: name of the main point.
    """
    ordered = sorted(points, key=lambda point: (point["evaluations"], point["name"]))
    best = []
    for budget in sorted({point["evaluations"] for point in points}):
        chosen = choose_point(points, budget)
        best.append({"evaluations_at_most": budget, **{key: chosen[key] for key in ("name", "evaluations", "best_ar")}})
    cost = next(point["evaluations"] for point in ordered if point["name"] == main)
    chosen_name = next(entry["name"] for entry in best if entry["evaluations_at_most"] == cost)
    return {
        "split": "val",
        "thresholds": THRESHOLDS.tolist(),
        "main": main,
        "main_is_best_for_its_cost": chosen_name == main,
        "best": best,
        "points": ordered,
    }
