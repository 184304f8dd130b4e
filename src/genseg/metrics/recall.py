"""Average recall (AR) in closed form, over any grid of thresholds, and the splits it is reported for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SPLITS = ("overall", "things", "stuff", "singulars", "plurals")


class Grid(NamedTuple):
    """AR = sum over k of weights[k] * (part of the phrases with IoU >= thresholds[k])."""

    thresholds: Floats
    """Ascending, [K]."""
    weights: Floats
    """[K]."""


def _left_sum(step: float) -> Grid:
    edges = np.arange(0, 1, step)
    return Grid(edges[:-1], np.diff(edges))


def threshold_grid(name: str) -> Grid | None:
    """Grid of a name in `GRIDS`; None stands for the limit of ever finer grids.

    * `exact`: AR is the integral over the threshold of the part of phrases above it, which is the mean IoU. This is the
      number in every scores file unless another grid is asked for.
    * `official`: thresholds 0, 1e-5, ..., left sum (`average_accuracy` of the PNG benchmark). At most 1e-5 off.
    * `drmn`: the same with steps of 1e-4.
    * `gs_eq12`: Eq. 12 of GS to the letter: 0.0001, ..., 0.9999, each with weight 1 / 10,000.
    """
    match name:
        case "exact":
            return None
        case "official":
            return _left_sum(1e-5)
        case "drmn":
            return _left_sum(1e-4)
        case "gs_eq12":
            return Grid(np.arange(1, 10_000) / 10_000, np.full(9_999, 1 / 10_000))
    raise ValueError(f"no threshold grid {name!r}")


GRIDS = ("exact", "official", "drmn", "gs_eq12")


def recall_values(iou: Floats, grid: Grid | None) -> Floats:
    """What each phrase adds to AR: the summed weights of the thresholds it reaches. AR of any set is their mean.

    Args:
        iou: [N] in [0, 1].
    """
    if grid is None:
        return iou
    reached = np.concatenate([[0.0], np.cumsum(grid.weights)])
    return reached[np.searchsorted(grid.thresholds, iou, side="right")]


def average_recall(iou: Floats, grid: Grid | None = None) -> float:
    """AR of phrases' IoU [N], a fraction; NaN (an empty union) is a miss."""
    return float(recall_values(np.nan_to_num(iou), grid).mean())


def split_members(per_phrase: pd.DataFrame) -> dict[str, Flags]:
    """Which rows belong to each of `SPLITS`, from the columns `is_thing` and `is_plural`."""
    things, plurals = per_phrase["is_thing"].to_numpy(bool), per_phrase["is_plural"].to_numpy(bool)
    return dict(zip(SPLITS, (np.ones(len(things), bool), things, ~things, ~plurals, plurals), strict=True))


SIZES = ("small", "medium", "large")


def size_members(area: NDArray[np.int64], image_area: NDArray[np.int64]) -> dict[str, Flags]:
    """Which phrases are small, medium, large: COCO's areas 32^2 and 96^2, scaled by the image's area over 640 * 480."""
    scaled = area * (640 * 480) / image_area
    return dict(zip(SIZES, (scaled < 32**2, (scaled >= 32**2) & (scaled < 96**2), scaled >= 96**2), strict=True))


def means(values: Floats, members: dict[str, Flags]) -> dict[str, float | None]:
    """Mean of each group, null for an empty one."""
    return {name: float(values[chosen].mean()) if chosen.any() else None for name, chosen in members.items()}
