"""Bootstrap over images: 95 % percentile intervals of AR and mIoU, and of paired differences.

Phrases of one image are not independent, so images are drawn instead of phrases. Every statistic here is a function of
sums over images; a replicate therefore only needs the sums over the drawn images.
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
    """Return sums over images drawn with replacement: [images, ...] -> [replicates, ...].

    The draws depend only on `seed` and the number of images, so that two statistics of the same images are paired.
    """
    images = len(per_image)
    flat = np.asarray(per_image, np.float64).reshape(images, -1)
    random = np.random.default_rng(derive_seed(seed, "bootstrap", images))
    sums = np.empty((replicates, flat.shape[1]))
    for replicate in sums:
        replicate[:] = flat[random.integers(images, size=images)].sum(0)
    return sums.reshape(replicates, *per_image.shape[1:])


def percentile_interval(statistic: Floats) -> Interval:
    """Return the 2.5 % and 97.5 % percentiles of a statistic's replicates [replicates].

    NaN replicates are left out. Returns None if no replicate remains.
    """
    finite = statistic[np.isfinite(statistic)]
    return [float(bound) for bound in np.percentile(finite, [2.5, 97.5])] if len(finite) else None


def recall_intervals(
    image_ids: NDArray[np.int64], values: Floats, members: dict[str, Flags], replicates: int, seed: int
) -> dict[str, Interval]:
    """Return the 95 % interval of each group's AR.

    Args:
        image_ids: [N], one for each phrase.
        values: [N], from `recall.recall_values`.
        members: group -> its phrases [N].
    """
    included = np.stack(list(members.values()), 1).astype(np.float64)
    sums = resampled_sums(_by_image(image_ids, np.stack([included * values[:, None], included], 1)), replicates, seed)
    ratios = _ratio(sums[:, 0], sums[:, 1])  # [replicates, groups]
    return {name: percentile_interval(ratio) for name, ratio in zip(members, ratios.T, strict=True)}


def paired_difference(a: pd.DataFrame, b: pd.DataFrame, replicates: int, seed: int) -> dict[str, Any] | None:
    """Return the difference of AR, a - b, on the phrases that both per-phrase tables contain.

    Args:
        a, b: tables with the key columns and `iou`.

    Returns:
        `n` (shared phrases), `difference`, `ci_low`, `ci_high` (None if `replicates` is 0); None if no phrase is shared.
    """
    both = a[[*KEY, "iou"]].merge(b[[*KEY, "iou"]], on=KEY, suffixes=("_a", "_b"))
    if both.empty:
        return None
    difference = (both["iou_a"] - both["iou_b"]).to_numpy(np.float64)
    per_image = _by_image(both["image_id"].to_numpy(np.int64), np.stack([difference, np.ones(len(difference))], 1))
    sums = resampled_sums(per_image, replicates, seed)
    return _difference(len(both), float(difference.mean()), percentile_interval(_ratio(sums[:, 0], sums[:, 1])))


def paired_miou_difference(a: NDArray[np.int64], b: NDArray[np.int64], replicates: int, seed: int) -> dict[str, Any]:
    """`paired_statistic_difference` of mIoU, of two `PixelCounts.counts` [images, 3, classes] of the same images."""
    return paired_statistic_difference(mean_iou, a, b, replicates, seed)


def paired_statistic_difference(
    statistic: Callable[[Any], Floats], a: NDArray[Any], b: NDArray[Any], replicates: int, seed: int
) -> dict[str, Any]:
    """Return statistic(a) - statistic(b) as `paired_difference` does; `n` is the number of images.

    Args:
        statistic: function of sums over images, [..., *rest] -> [...].
        a, b: [images, *rest], of the same images.
    """
    difference = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    replicated = statistic(resampled_sums(a, replicates, seed)) - statistic(resampled_sums(b, replicates, seed))
    return _difference(len(a), difference, percentile_interval(replicated))


def _by_image(image_ids: NDArray[np.int64], columns: Floats) -> Floats:
    """Sums by image: [N, ...] -> [images, ...], in the order of the image ids."""
    order = np.argsort(image_ids, kind="stable")
    _, starts = np.unique(image_ids[order], return_index=True)
    return np.asarray(np.add.reduceat(columns[order], starts, axis=0), np.float64)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise ratio; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=np.asarray(denominator) > 0)


def _difference(n: int, difference: float, interval: Interval) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"n": n, "difference": difference, "ci_low": low, "ci_high": high}
