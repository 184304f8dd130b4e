"""Bootstrap over images: 95 % percentile intervals of AR and mIoU, and of paired differences.

Phrases of one image are not independent, so images are drawn instead of phrases. Every statistic here is a function of
sums over images; a replicate therefore only needs the sums over the drawn images.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.parquet import KEY
from genseg.artifacts.seeds import derive_seed
from genseg.metrics.recall import Flags, Floats, Integers

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


def resampled_ratio(per_image: Floats, replicates: int, seed: int) -> Floats:
    """Return ratios of `resampled_sums`: [images, 2, ...] (numerator, denominator) -> [replicates, ...]; NaN if undefined."""
    numerator, denominator = np.moveaxis(resampled_sums(per_image, replicates, seed), 1, 0)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def percentile_interval(statistic: Floats) -> Interval:
    """Return the 2.5 % and 97.5 % percentiles of a statistic's finite replicates; None if there are none."""
    finite = statistic[np.isfinite(statistic)]
    return [float(bound) for bound in np.percentile(finite, [2.5, 97.5])] if len(finite) else None


def recall_intervals(
    image_ids: Integers, values: Floats, members: dict[str, Flags], replicates: int, seed: int
) -> dict[str, Interval]:
    """Return the 95 % interval of each group's AR; image ids, values (`recall.recall_values`) and members are [N]."""
    included = np.stack(list(members.values()), 1).astype(np.float64)
    per_image = _by_image(image_ids, np.stack([included * values[:, None], included], 1))  # [images, 2, groups]
    ratios = resampled_ratio(per_image, replicates, seed)
    return {name: percentile_interval(ratio) for name, ratio in zip(members, ratios.T, strict=True)}


def paired_difference(a: pd.DataFrame, b: pd.DataFrame, replicates: int, seed: int) -> dict[str, Any] | None:
    """Return the difference of AR, a - b, on the phrases that both per-phrase tables contain; None if there are none.

    The tables have the key columns and `iou`. Returns `n` (shared phrases) and the entries of `describe_difference`.
    """
    both = a[[*KEY, "iou"]].merge(b[[*KEY, "iou"]], on=KEY, suffixes=("_a", "_b"))
    if both.empty:
        return None
    difference = (both["iou_a"] - both["iou_b"]).to_numpy(np.float64)
    per_image = _by_image(both["image_id"].to_numpy(np.int64), np.stack([difference, np.ones(len(difference))], 1))
    return {"n": len(both)} | describe_difference(float(difference.mean()), resampled_ratio(per_image, replicates, seed))


def paired_statistic_difference(
    statistic: Callable[[Any], Floats], a: NDArray[Any], b: NDArray[Any], replicates: int, seed: int
) -> dict[str, Any]:
    """Return statistic(a) - statistic(b) in the form of `paired_difference`; a, b [images, *rest] are of the same n images.

    `statistic` is a function of sums over images, [..., *rest] -> [...].
    """
    difference = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    replicated = statistic(resampled_sums(a, replicates, seed)) - statistic(resampled_sums(b, replicates, seed))
    return {"n": len(a)} | describe_difference(difference, replicated)


def trainings_difference(
    statistic: Callable[[Any], Floats], a: NDArray[Any], b: NDArray[Any], replicates: int, seed: int
) -> dict[str, Any]:
    """Return the mean over trainings of statistic(a) - statistic(b), in the form of `paired_difference`.

    a, b [trainings, images, *rest] are of the same n images and of trainings with the same seeds, in the same order. A
    replicate draws images and, if there are several, trainings, both with replacement, so the interval covers both.
    `statistic` is a function of sums over images, [..., *rest] -> [...].
    """
    trainings, images = a.shape[:2]
    difference = float((statistic(a.sum(1)) - statistic(b.sum(1))).mean())
    sums_a, sums_b = (resampled_sums(np.moveaxis(values, 0, 1), replicates, seed) for values in (a, b))
    drawn = np.random.default_rng(derive_seed(seed, "trainings", trainings)).integers(trainings, size=(replicates, trainings))
    replicated = np.take_along_axis(statistic(sums_a) - statistic(sums_b), drawn, axis=1).mean(1)
    return {"n": images} | describe_difference(difference, replicated)


def describe_difference(difference: float, replicated: Floats) -> dict[str, Any]:
    """Return a `difference` and the bounds `ci_low` and `ci_high` of its 95 % interval; None for NaN or without replicates."""
    low, high = percentile_interval(replicated) or (None, None)
    return {"difference": None if np.isnan(difference) else difference, "ci_low": low, "ci_high": high}


def _by_image(image_ids: Integers, columns: Floats) -> Floats:
    """Sums by image: [N, ...] -> [images, ...], in the order of the image ids."""
    order = np.argsort(image_ids, kind="stable")
    _, starts = np.unique(image_ids[order], return_index=True)
    return np.asarray(np.add.reduceat(columns[order], starts, axis=0), np.float64)
