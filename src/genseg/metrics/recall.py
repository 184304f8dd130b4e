"""Average recall (AR) in closed form, on any grid of thresholds, and the groups of phrases it is reported for."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

PHRASE_GROUPS = ("overall", "things", "stuff", "singulars", "plurals")
SIZES = ("small", "medium", "large")
GRIDS = ("exact", "official", "drmn", "gs_eq12")


class ThresholdGrid(NamedTuple):
    """AR = sum over k of weights[k] * (fraction of the phrases with IoU >= thresholds[k]); thresholds [K] are ascending."""

    thresholds: Floats
    weights: Floats


def threshold_grid(name: str) -> ThresholdGrid | None:
    """Return the threshold grid with a name in `GRIDS`; None for `exact`. Raises ValueError for another name.

    * `exact`: AR is the integral over the threshold of the fraction of phrases above it, which is the mean IoU. Scores files
      contain this number unless another grid is requested.
    * `official`: thresholds 0, 1e-5, ..., left Riemann sum (`average_accuracy` of the PNG benchmark). Within 1e-5 of `exact`.
    * `drmn`: the same with steps of 1e-4.
    * `gs_eq12`: Eq. 12 of GS, literally: 0.0001, ..., 0.9999, each with weight 1 / 10,000.
    """
    match name:
        case "exact":
            return None
        case "official" | "drmn":
            edges = np.arange(0, 1, 1e-5 if name == "official" else 1e-4)
            return ThresholdGrid(edges[:-1], np.diff(edges))
        case "gs_eq12":
            return ThresholdGrid(np.arange(1, 10_000) / 10_000, np.full(9_999, 1 / 10_000))
    raise ValueError(f"unknown threshold grid {name!r}; expected one of {', '.join(GRIDS)}")


def recall_values(iou: Floats, grid: ThresholdGrid | None) -> Floats:
    """Return the contribution [N] of each phrase to AR: the sum of the weights of the thresholds that its IoU reaches.

    The AR of any set of phrases is the mean of their contributions. `iou` [N] is in [0, 1]; grid None stands for `exact`.
    """
    if grid is None:
        return iou
    reached = np.concatenate([[0.0], np.cumsum(grid.weights)])
    return reached[np.searchsorted(grid.thresholds, iou, side="right")]


def average_recall(iou: Floats, grid: ThresholdGrid | None = None) -> float:
    """Return the AR, in [0, 1], of phrases with IoU [N]; NaN (an empty union) counts as 0."""
    return float(recall_values(np.nan_to_num(iou), grid).mean())


def group_members(per_phrase: pd.DataFrame) -> dict[str, Flags]:
    """Return which rows [N] belong to each of `PHRASE_GROUPS`, from the columns `is_thing` and `is_plural`."""
    things, plurals = per_phrase["is_thing"].to_numpy(bool), per_phrase["is_plural"].to_numpy(bool)
    return dict(zip(PHRASE_GROUPS, (np.ones(len(things), bool), things, ~things, ~plurals, plurals), strict=True))


def size_members(area: Integers, image_area: Integers) -> dict[str, Flags]:
    """Return which phrases [N] are small, medium or large, from the pixels [N] of their masks and images.

    The bounds are COCO's areas 32^2 and 96^2, scaled by the image's area over 640 * 480.
    """
    scaled = area * (640 * 480) / image_area
    return dict(zip(SIZES, (scaled < 32**2, (scaled >= 32**2) & (scaled < 96**2), scaled >= 96**2), strict=True))


def group_means(values: Floats, members: dict[str, Flags]) -> dict[str, float | None]:
    """Return the mean of `values` [N] over each group's members [N]; None for an empty group."""
    return {name: float(values[chosen].mean()) if chosen.any() else None for name, chosen in members.items()}
