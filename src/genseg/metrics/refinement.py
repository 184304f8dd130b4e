"""Compare coarse and refined masks: AR, boundary IoU and mIoU before and after refinement, on the same images.

Coarse class phrases are labelled by the baseline's own background rule. After refinement a pixel belongs to the class with the
highest probability; with a background class, only if that is at least 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import write_json
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import maps_path, read_predictions
from genseg.metrics.bootstrap import percentile_interval, resampled_sums
from genseg.metrics.class_phrases import ClassPhrases
from genseg.metrics.operating import THRESHOLDS
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import PixelCounts, mean_iou
from genseg.params import Params

Floats = NDArray[np.float64]
Statistics = dict[str, tuple[float, Floats]]
"""Quantity -> its value over all images, and its values [replicates] over images drawn with replacement."""

PROTOCOL = "native"
REFINED_THRESHOLD = 0.5
"""Probability from which a refined pixel is foreground, the same as in `refine`."""
QUANTITIES = ("ar", "boundary_iou", "miou")
COARSE_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COMPLEXITY_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def score_refinement(params: Params, phrases: pd.DataFrame, manifest: dict[str, Any]) -> Path:
    """Write `scores/refinement.json` and return its path.

    The file contains, for every baseline and refiner, each quantity before and after with the paired difference and its 95 %
    interval over images (`rows`); the mean difference over all and over the real baselines, with images drawn jointly
    (`means`); and G4Seg's gain by the IoU of the coarse mask and by the complexity of the boundary (`gain`).

    Args:
        phrases: the study's phrase table.
        manifest: manifest of the refined masks.
    """
    images = [int(image) for image in manifest["images"]]
    table = phrases[(phrases["split"] == "test") & phrases["image_id"].isin(images)]
    part = RefinedPart(params, table, ClassPhrases(params, images), images)
    replicates, seed = params.score.bootstrap, params.seed

    # 1. Measure every baseline once, and every refiner of it.
    coarse: dict[str, Measured] = {}
    before: dict[str, Statistics] = {}
    rows: list[dict[str, Any]] = []
    differences: dict[str, list[Statistics]] = {}
    gains: list[pd.DataFrame] = []
    for entry in manifest["refined"]:
        name, refiner = entry["baseline"], entry["refiner"]
        if name not in coarse:
            coarse[name] = part.measure(entry["coarse"], entry["coarse_classes"])
            before[name] = coarse[name].statistics(replicates, seed)
        refined = part.measure(entry["predictions"], entry["class_predictions"], REFINED_THRESHOLD)
        after = refined.statistics(replicates, seed)
        difference = {key: (after[key][0] - before[name][key][0], after[key][1] - before[name][key][1]) for key in QUANTITIES}
        differences.setdefault(refiner, []).append(difference)
        rows.append(_row(entry, before[name], after, difference))
        rows[-1]["miou"] |= part.best_coarse_miou(entry["coarse_classes"])
        a, b = coarse[name].per_phrase, refined.per_phrase
        if refiner == "g4seg" and a is not None and b is not None:
            gains.append(a.merge(b[[*KEY, "iou"]], on=KEY, suffixes=("", "_after")))

    # 2. Aggregate and write.
    out = params.results_dir / "scores" / "refinement.json"
    means = _means(rows, differences)
    summary = {
        "version": 1,
        "protocol": PROTOCOL,
        "split": "test",
        "counts": {"images": len(images), "phrases": len(table), "replicates": replicates},
        "background_threshold": params.score.background_threshold if part.classes.has_background else None,
        "rows": rows,
        "means": means,
        "gain": _gain(pd.concat(gains, ignore_index=True), table, replicates, seed),
    }
    write_json(out, summary)
    for mean in means:
        if mean["miou"]["difference"] is not None:
            points = 100 * mean["miou"]["difference"]
            print(f"{out}: {mean['refiner']}, {mean['over']} baselines: mIoU {points:+.2f} points", flush=True)
    return out


# ------------------------------------------------------------------------------------------------------ measurements
@dataclass(frozen=True)
class Measured:
    """Scores of one set of predictions on the refined images."""

    per_phrase: pd.DataFrame | None
    """Table of `score_run`; None without predictions for phrases."""
    sums: Floats | None
    """[images, 3]: sums of IoU and boundary IoU, number of phrases; None without predictions for phrases."""
    pixels: PixelCounts | None
    """None without predictions for class phrases."""

    def statistics(self, replicates: int, seed: int) -> Statistics:
        """Return each of `QUANTITIES`, NaN without predictions."""
        statistics = dict.fromkeys(QUANTITIES, (float("nan"), np.full(replicates, np.nan)))
        if self.sums is not None:
            resampled, total = resampled_sums(self.sums, replicates, seed), self.sums.sum(0)
            for column, name in enumerate(("ar", "boundary_iou")):
                statistics[name] = float(total[column] / total[2]), resampled[:, column] / resampled[:, 2]
        if self.pixels is not None:
            counts = self.pixels.counts
            statistics["miou"] = float(mean_iou(counts.sum(0))), mean_iou(resampled_sums(counts, replicates, seed))
        return statistics


@dataclass(frozen=True)
class RefinedPart:
    """The part of test on which coarse and refined masks are compared."""

    params: Params
    table: pd.DataFrame
    """Phrases of the images."""
    classes: ClassPhrases
    """Class phrases of the images."""
    images: list[int]

    def measure(self, path: str | None, class_path: str | None, threshold: float | None = None) -> Measured:
        """Score predictions for phrases and for class phrases; None if a method lacks one of them.

        Args:
            threshold: background threshold of class phrases; that of the params if None.
        """
        pixels = None if class_path is None else self.classes.count(Path(class_path), threshold)
        if path is None:
            return Measured(None, None, pixels)
        predictions = read_predictions(path)
        predictions = predictions[predictions["image_id"].isin(self.images)].reset_index(drop=True)
        ratio, origins = self.params.score.boundary_ratio, ("phrase table", path)
        per_phrase, _ = score_run(self.table, predictions, PROTOCOL, boundary_ratio=ratio, replicates=0, origins=origins)
        sums = per_phrase.assign(n=1.0).groupby("image_id", sort=True)[["iou", "boundary_iou", "n"]].sum()
        return Measured(per_phrase, sums.to_numpy(np.float64), pixels)

    def best_coarse_miou(self, class_path: str | None) -> dict[str, float]:
        """Return the mIoU of coarse soft maps at the background threshold that is best on test, and that threshold.

        Empty without a background class, without soft maps, or without a class that has ground truth.
        """
        if not self.classes.has_background or not class_path or not maps_path(class_path).exists():
            return {}
        counts = (self.classes.count(Path(class_path), float(threshold)).counts for threshold in THRESHOLDS)
        values = [float(mean_iou(pixels.sum(0))) for pixels in counts]
        if np.isnan(values).all():
            return {}
        best = int(np.nanargmax(values))
        return {"best_before": values[best], "best_threshold_before": float(THRESHOLDS[best])}


# -------------------------------------------------------------------------------------------------- rows and means
def _row(entry: dict[str, Any], before: Statistics, after: Statistics, difference: Statistics) -> dict[str, Any]:
    row = {key: entry[key] for key in ("refiner", "baseline", "label", "real", "passes")}
    for key in QUANTITIES:
        row[key] = {"before": _number(before[key][0]), "after": _number(after[key][0])} | _with_interval(*difference[key])
    return row


def _means(rows: Sequence[dict[str, Any]], differences: dict[str, list[Statistics]]) -> list[dict[str, Any]]:
    """Mean differences of each refiner over all of its baselines and over the real ones.

    Each quantity is averaged over the baselines that have it; imported ones may lack phrases or class phrases.

    Args:
        differences: by refiner, in the order of its baselines in `rows`.
    """
    means: list[dict[str, Any]] = []
    for refiner, refiner_differences in differences.items():
        refiner_rows = [row for row in rows if row["refiner"] == refiner]
        for over in ("all", "real"):
            indices = [index for index, row in enumerate(refiner_rows) if row["real"] or over == "all"]
            if not indices:
                continue
            baselines = [refiner_rows[index]["baseline"] for index in indices]
            mean: dict[str, Any] = {"refiner": refiner, "over": over, "baselines": baselines}
            for key in QUANTITIES:
                measured = [index for index in indices if refiner_rows[index][key]["difference"] is not None]
                mean[key] = _mean_quantity(
                    [refiner_rows[index][key] for index in measured],
                    [refiner_differences[index][key] for index in measured or indices],
                )
            means.append(mean)
    return means


def _mean_quantity(values: Sequence[dict[str, float]], differences: Sequence[tuple[float, Floats]]) -> dict[str, Any]:
    """Mean of a quantity over baselines; without `values`, NaN `differences` give null."""
    means = {side: float(np.mean([value[side] for value in values])) if values else None for side in ("before", "after")}
    difference = float(np.mean([difference for difference, _ in differences]))
    return means | _with_interval(difference, np.mean([replicates for _, replicates in differences], 0))


def _with_interval(difference: float, replicated: Floats) -> dict[str, Any]:
    low, high = percentile_interval(replicated) or (None, None)
    return {"difference": _number(difference), "ci_low": low, "ci_high": high}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


# ------------------------------------------------------------------------------------------------------------- gains
def complexity(mask: NDArray[np.bool_]) -> float:
    """Return the perimeter squared over the area of a mask [H, W]; 16 for a square, NaN for an empty mask.

    The perimeter counts the pixel sides between foreground and background.
    """
    sides = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    area = np.count_nonzero(mask)
    return sides**2 / area if area else float("nan")


def _gain(pairs: pd.DataFrame, table: pd.DataFrame, replicates: int, seed: int) -> list[dict[str, Any]]:
    """Mean gain of G4Seg in IoU over the phrases of all baselines, in bins of the coarse mask's IoU and of the ground truth's
    complexity; empty bins are left out."""
    masks = (decode(*row) for row in zip(table["mask"], table["height"], table["width"], strict=True))
    shapes = table.assign(complexity=[complexity(mask) for mask in masks])
    pairs = pairs.merge(shapes[[*KEY, "complexity"]], on=KEY)
    edges = {
        "iou": np.array(COARSE_BINS),
        "complexity": np.quantile(shapes["complexity"].dropna(), COMPLEXITY_QUANTILES) if len(shapes) else np.zeros(5),
    }
    bins: list[dict[str, Any]] = []
    for by, bounds in edges.items():
        indices = np.clip(np.searchsorted(bounds, pairs[by].to_numpy(), side="right") - 1, 0, len(bounds) - 2)
        for index, (low, high) in enumerate(pairwise(bounds)):
            in_bin = (indices == index) & pairs[by].notna().to_numpy()
            if not in_bin.any():
                continue
            weighted = pairs.assign(gain=(pairs["iou_after"] - pairs["iou"]) * in_bin, n=in_bin.astype(float))
            sums = weighted.groupby("image_id", sort=True)[["gain", "n"]].sum().to_numpy(np.float64)
            resampled, total = resampled_sums(sums, replicates, seed), sums.sum(0)
            ratio = np.divide(resampled[:, 0], resampled[:, 1], out=np.full(replicates, np.nan), where=resampled[:, 1] > 0)
            entry = {"by": by, "low": float(low), "high": float(high), "n": int(total[1])}
            bins.append(entry | _with_interval(float(total[0] / total[1]), ratio))
    return bins
