"""Bootstrap over images: 95 % percentile intervals of AR and mIoU, and of paired differences.

Phrases of one image are not independent, so images are what is drawn. Every statistic here is a function of sums over
images; a replicate therefore needs only how often each image was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.parquet import KEY
from genseg.artifacts.seeds import derive_seed
from genseg.metrics.recall import Flags
from genseg.metrics.semantic import mean_iou

Floats = NDArray[np.float64]
Interval = list[float] | None


def resampled_sums(per_image: NDArray[np.generic], replicates: int, seed: int) -> Floats:
    """Sums over images drawn with replacement: [images, ...] -> [replicates, ...].

    The draws depend on `seed` and the number of images alone, so that two statistics of the same images are paired.
    """
    images = len(per_image)
    flat = np.asarray(per_image, np.float64).reshape(images, -1)
    random = np.random.default_rng(derive_seed(seed, "bootstrap", images))
    sums = np.empty((replicates, flat.shape[1]))
    for replicate in sums:
        replicate[:] = flat[random.integers(images, size=images)].sum(0)
    return sums.reshape(replicates, *per_image.shape[1:])


def percentile_interval(statistic: Floats) -> Interval:
    """2.5 % and 97.5 % percentile of a statistic's replicates; null without replicates. NaN (an empty one) is left out."""
    found = statistic[np.isfinite(statistic)]
    return [float(bound) for bound in np.percentile(found, [2.5, 97.5])] if len(found) else None


def recall_intervals(
    image_ids: NDArray[np.int64], values: Floats, members: dict[str, Flags], replicates: int, seed: int
) -> dict[str, Interval]:
    """Interval of the mean value of each group of phrases; `values` [N] are `recall.recall_values`."""
    chosen = np.stack(list(members.values()), 1).astype(np.float64)
    sums = resampled_sums(_by_image(image_ids, np.stack([chosen * values[:, None], chosen], 1)), replicates, seed)
    return {name: percentile_interval(ratio) for name, ratio in zip(members, _ratio(sums[:, 0], sums[:, 1]).T, strict=True)}


def paired_difference(a: pd.DataFrame, b: pd.DataFrame, replicates: int, seed: int) -> dict[str, Any] | None:
    """Difference of AR, a - b, on the phrases that both per-phrase tables hold; null when they share none.

    Args:
        a, b: the key columns and `iou`.

    Returns:
        `n` (shared phrases), `difference`, `ci_low`, `ci_high` (null when `replicates` is 0).
    """
    both = a[[*KEY, "iou"]].merge(b[[*KEY, "iou"]], on=KEY, suffixes=("_a", "_b"))
    if both.empty:
        return None
    difference = (both["iou_a"] - both["iou_b"]).to_numpy(np.float64)
    per_image = _by_image(both["image_id"].to_numpy(np.int64), np.stack([difference, np.ones(len(difference))], 1))
    sums = resampled_sums(per_image, replicates, seed)
    return _difference(len(both), float(difference.mean()), percentile_interval(_ratio(sums[:, 0], sums[:, 1])))


def paired_miou_difference(a: NDArray[np.int64], b: NDArray[np.int64], replicates: int, seed: int) -> dict[str, Any]:
    """Difference of mIoU, a - b, of two `Semantic.counts` [images, 3, classes] over the same images; `n` counts images."""
    return paired_statistic_difference(mean_iou, a, b, replicates, seed)


def paired_statistic_difference(
    statistic: Callable[[Any], Floats], a: NDArray[Any], b: NDArray[Any], replicates: int, seed: int
) -> dict[str, Any]:
    """Difference statistic(a) - statistic(b) of a function of sums over images, of the same images [images, ...]."""
    whole = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    replicated = statistic(resampled_sums(a, replicates, seed)) - statistic(resampled_sums(b, replicates, seed))
    return _difference(len(a), whole, percentile_interval(replicated))


def _by_image(image_ids: NDArray[np.int64], columns: Floats) -> Floats:
    """Sums by image, images in the order of their ids: [N, ...] -> [images, ...]."""
    order = np.argsort(image_ids, kind="stable")
    _, starts = np.unique(image_ids[order], return_index=True)
    return np.asarray(np.add.reduceat(columns[order], starts, axis=0), np.float64)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=np.asarray(denominator) > 0)


def _difference(n: int, difference: float, interval: Interval) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"n": n, "difference": difference, "ci_low": low, "ci_high": high}
