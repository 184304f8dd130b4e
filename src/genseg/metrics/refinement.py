"""Compare coarse and refined masks: AR, boundary IoU and mIoU before and after refinement, on the same images.

Coarse class phrases are labelled by the study's background rule; refined ones are disjoint masks.
"""

from collections.abc import Sequence
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
from genseg.metrics.bootstrap import describe_difference, resampled_ratio, resampled_sums
from genseg.metrics.recall import Floats
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import ClassPhrases, mean_iou
from genseg.metrics.soft_maps import THRESHOLDS
from genseg.params import Params

Statistics = dict[str, tuple[float, Floats]]
"""Quantity -> its value over all images, and its values [replicates] over images drawn with replacement."""

PROTOCOL = "native"
QUANTITIES = ("ar", "boundary_iou", "miou")


def score_refinement(params: Params, phrases: pd.DataFrame, manifest: dict[str, Any]) -> Path:
    """Write `scores/refinement.json` from a phrase table and the manifest of the refined masks, and return its path.

    The file contains, for every baseline and refiner, each quantity before and after with the paired difference and its 95 %
    interval over images (`rows`); the mean difference over all and over the real baselines, with images drawn jointly
    (`means`); and G4Seg's gain by the IoU of the coarse mask and by the complexity of the boundary (`gain`).
    """
    images = [int(image) for image in manifest["images"]]
    part = RefinedPart(params, phrases, images)

    # 1. Measure every baseline once, and every refiner of it.
    coarse: dict[str, tuple[pd.DataFrame | None, Statistics]] = {}
    rows: list[tuple[dict[str, Any], Statistics]] = []
    gains: list[pd.DataFrame] = []
    for entry in manifest["refined"]:
        name = entry["baseline"]
        if name not in coarse:
            coarse[name] = part.measure(entry["coarse"], entry["coarse_classes"])
        coarse_ious, before = coarse[name]
        refined_ious, after = part.measure(entry["predictions"], entry["class_predictions"])
        difference = {key: (after[key][0] - before[key][0], after[key][1] - before[key][1]) for key in QUANTITIES}
        row = {key: entry[key] for key in ("refiner", "baseline", "label", "real", "passes")}
        for key in QUANTITIES:
            sides = {"before": before[key][0], "after": after[key][0]}
            row[key] = {side: None if np.isnan(value) else value for side, value in sides.items()}
            row[key] |= describe_difference(*difference[key])
        row["miou"] |= part.best_coarse_miou(entry["coarse_classes"])
        rows.append((row, difference))
        if entry["refiner"] == "g4seg" and coarse_ious is not None and refined_ious is not None:
            gains.append(coarse_ious.merge(refined_ious[[*KEY, "iou"]], on=KEY, suffixes=("", "_after")))

    # 2. Aggregate and write.
    out = params.results_dir / "scores" / "refinement.json"
    means = _means(rows)
    summary = {
        "version": 1,
        "protocol": PROTOCOL,
        "split": "test",
        "counts": {"images": len(images), "phrases": len(part.table), "replicates": params.score.bootstrap},
        "background_threshold": params.score.background_threshold if part.classes.has_background else None,
        "rows": [row for row, _ in rows],
        "means": means,
        "gain": _gain(gains, part.table, params.score.bootstrap, params.seed),
    }
    write_json(out, summary)
    for mean in means:
        if mean["miou"]["difference"] is not None:
            points = 100 * mean["miou"]["difference"]
            print(f"{out}: {mean['refiner']}, {mean['over']} baselines: mIoU {points:+.2f} points", flush=True)
    return out


class RefinedPart:
    """The phrases (`table`) and class phrases of the test images on which coarse and refined masks are compared."""

    def __init__(self, params: Params, phrases: pd.DataFrame, images: list[int]) -> None:
        self.params = params
        self.images = images
        self.table = phrases[(phrases["split"] == "test") & phrases["image_id"].isin(images)]
        self.classes = ClassPhrases(params, images)

    def measure(self, path: str | None, class_path: str | None) -> tuple[pd.DataFrame | None, Statistics]:
        """Return the per-phrase table (None without `path`) and each of `QUANTITIES` (NaN without the file that it needs).

        The files are predictions for phrases and for class phrases.
        """
        score, seed = self.params.score, self.params.seed
        statistics = dict.fromkeys(QUANTITIES, (float("nan"), np.full(score.bootstrap, np.nan)))
        per_phrase = None
        if path is not None:
            predictions = read_predictions(path)
            predictions = predictions[predictions["image_id"].isin(self.images)].reset_index(drop=True)
            ratio, origins = score.boundary_ratio, ("phrase table", path)
            per_phrase, _ = score_run(self.table, predictions, PROTOCOL, boundary_ratio=ratio, replicates=0, origins=origins)
            by_image = per_phrase.assign(n=1.0).groupby("image_id", sort=True)[["iou", "boundary_iou", "n"]].sum()
            sums = by_image.to_numpy(np.float64)
            resampled, total = resampled_sums(sums, score.bootstrap, seed), sums.sum(0)
            for column, name in enumerate(("ar", "boundary_iou")):
                statistics[name] = float(total[column] / total[2]), resampled[:, column] / resampled[:, 2]
        if class_path is not None:
            counts = self.classes.count(Path(class_path)).counts
            statistics["miou"] = float(mean_iou(counts.sum(0))), mean_iou(resampled_sums(counts, score.bootstrap, seed))
        return per_phrase, statistics

    def best_coarse_miou(self, class_path: str | None) -> dict[str, float]:
        """Return the mIoU of coarse soft maps at the background threshold that is best on the test images, and that threshold.

        Empty without a background class, without soft maps, or if no class has ground truth.
        """
        if not self.classes.has_background or not class_path or not maps_path(class_path).exists():
            return {}
        counts = (self.classes.count(Path(class_path), float(threshold)).counts for threshold in THRESHOLDS)
        values = [float(mean_iou(pixels.sum(0))) for pixels in counts]
        if np.isnan(values).all():
            return {}
        best = int(np.nanargmax(values))
        return {"best_before": values[best], "best_threshold_before": float(THRESHOLDS[best])}


def _means(rows: Sequence[tuple[dict[str, Any], Statistics]]) -> list[dict[str, Any]]:
    """Mean differences of each refiner over all of its baselines and over the real ones, from rows and their differences.

    Each quantity is averaged over the baselines that have it; imported ones may lack phrases or class phrases.
    """
    means: list[dict[str, Any]] = []
    for refiner in dict.fromkeys(row["refiner"] for row, _ in rows):
        for over in ("all", "real"):
            group = [item for item in rows if item[0]["refiner"] == refiner and (item[0]["real"] or over == "all")]
            if not group:
                continue
            mean: dict[str, Any] = {"refiner": refiner, "over": over, "baselines": [row["baseline"] for row, _ in group]}
            for key in QUANTITIES:
                measured = [(row[key], *difference[key]) for row, difference in group if row[key]["difference"] is not None]
                if not measured:
                    mean[key] = dict.fromkeys(("before", "after", "difference", "ci_low", "ci_high"))
                    continue
                values, differences, replicated = zip(*measured, strict=True)
                mean[key] = {side: float(np.mean([value[side] for value in values])) for side in ("before", "after")}
                mean[key] |= describe_difference(float(np.mean(differences)), np.mean(replicated, 0))
            means.append(mean)
    return means


def complexity(mask: NDArray[np.bool_]) -> float:
    """Return the perimeter squared over the area of a mask [H, W]; 16 for a square inside the image, NaN for an empty mask.

    The perimeter counts the pixel sides between foreground and background, and none at the border of the image.
    """
    sides = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    area = np.count_nonzero(mask)
    return sides**2 / area if area else float("nan")


def _gain(gains: Sequence[pd.DataFrame], table: pd.DataFrame, replicates: int, seed: int) -> list[dict[str, Any]]:
    """Mean gain in IoU over all phrases and baselines, in bins of coarse IoU and of the ground truth's complexity.

    Empty if no baseline has masks of phrases (`gains`).
    """
    if not gains:
        return []
    masks = (decode(*row) for row in zip(table["mask"], table["height"], table["width"], strict=True))
    shapes = table.assign(complexity=[complexity(mask) for mask in masks])
    pairs = pd.concat(gains, ignore_index=True).merge(shapes[[*KEY, "complexity"]], on=KEY)
    edges = {
        "iou": np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        "complexity": np.quantile(shapes["complexity"].dropna(), np.linspace(0, 1, 5)) if len(shapes) else np.zeros(5),
    }
    bins: list[dict[str, Any]] = []
    for by, bounds in edges.items():
        indices = np.clip(np.searchsorted(bounds, pairs[by].to_numpy(), side="right") - 1, 0, len(bounds) - 2)
        for index, (low, high) in enumerate(pairwise(bounds)):
            in_bin = (indices == index) & pairs[by].notna().to_numpy()
            if not in_bin.any():
                continue  # Empty bins are left out.
            weighted = pairs.assign(gain=(pairs["iou_after"] - pairs["iou"]) * in_bin, n=in_bin.astype(float))
            sums = weighted.groupby("image_id", sort=True)[["gain", "n"]].sum().to_numpy(np.float64)
            gain, count = sums.sum(0)
            entry = {"by": by, "low": float(low), "high": float(high), "n": int(count)}
            bins.append(entry | describe_difference(float(gain / count), resampled_ratio(sums, replicates, seed)))
    return bins
