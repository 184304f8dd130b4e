"""Baselines by themselves, and coarse against refined: AR, boundary IoU and mIoU before and after, on the same images.

Of class phrases the labelling is refined that the baseline's own background rule gives; after refinement a class owns a pixel
where its probability is the highest and, with a background class, at least 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import write_json
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import maps_path, read_predictions
from genseg.artifacts.scores import SCHEMA, write_scores
from genseg.errors import UserError
from genseg.metrics.bootstrap import percentile_interval, resampled_sums
from genseg.metrics.class_phrases import ClassPhrases
from genseg.metrics.operating import THRESHOLDS
from genseg.metrics.recall import SPLITS
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import Semantic, mean_iou
from genseg.params import Params

PROTOCOL = "native"
CUT = 0.5
"""Where a refined probability becomes a label, in `refine` as here."""
QUANTITIES = ("ar", "boundary_iou", "miou")
COARSE_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COMPLEXITY_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
Floats = NDArray[np.float64]


def manifests(params: Params) -> dict[str, dict[str, Any]]:
    """The manifests of the baselines and of what was refined. Raises UserError where one is missing."""
    commands = {"baselines": "baseline", "refined": "refine"}
    found = {}
    for folder, command in commands.items():
        path = params.results_dir / folder / "manifest.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; run `genseg {command}` with this study's params")
        found[folder] = read_manifest(path)
    return found


def score_baselines(params: Params, phrases: pd.DataFrame, made: dict[str, Any]) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Score every baseline of the manifest `made` that is no run of sampling, on all of test, and write
    `scores/baselines/<name>.json`; yields the paths and summaries."""
    classes = ClassPhrases(params)
    for entry in made["baselines"]:
        files = [None if entry[which] is None else Path(entry[which]) for which in ("predictions", "class_predictions")]
        path, class_path = files
        if any(file is not None and file.parent != params.results_dir / "baselines" for file in files):
            continue
        out = params.results_dir / "scores" / "baselines" / f"{entry['name']}.json"
        per_phrase, summary = _unscored(params)
        if path is not None:
            per_phrase, summary = score_run(
                phrases,
                read_predictions(path),
                params.score.protocol,
                boundary_ratio=params.score.boundary_ratio,
                replicates=params.score.bootstrap,
                seed=params.seed,
                origins=("phrase table", str(path)),
            )
        miou = mean_iou(classes.count(class_path).counts.sum(0)) if class_path else np.nan
        run = {"name": f"baselines/{entry['name']}", "role": "baseline"} | {
            key: entry[key] for key in ("label", "real", "imported")
        }
        summary |= {"run": run, "miou": {"mean": None if np.isnan(miou) else float(miou)}}
        write_scores(per_phrase, summary, out)
        yield out, summary


def _unscored(params: Params) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Scores of no phrase: of a baseline of which class masks alone were imported."""
    nothing = dict.fromkeys(SPLITS)
    summary: dict[str, Any] = dict.fromkeys(("ar", "interval", "ceiling", "boundary_iou"), nothing)
    counts = dict.fromkeys(("phrases", "images", "narratives", "missing"), 0)
    summary |= {"protocol": params.score.protocol, "split": "test", "ceiling_latent": None, "counts": counts}
    return SCHEMA.empty_table().to_pandas(), summary


@dataclass(frozen=True)
class Measured:
    """One set of predictions on the refined images; None for what was not predicted."""

    per_phrase: pd.DataFrame | None
    sums: Floats | None
    """[images, 3]: IoU, boundary IoU, phrases."""
    semantic: Semantic | None

    def statistics(self, replicates: int, seed: int) -> dict[str, tuple[float, Floats]]:
        """Each quantity over all images, and over images drawn with replacement."""
        found = dict.fromkeys(QUANTITIES, (float("nan"), np.full(replicates, np.nan)))
        if self.sums is not None:
            drawn, whole = resampled_sums(self.sums, replicates, seed), self.sums.sum(0)
            for column, name in enumerate(("ar", "boundary_iou")):
                found[name] = float(whole[column] / whole[2]), drawn[:, column] / drawn[:, 2]
        if self.semantic is not None:
            counts = self.semantic.counts
            found["miou"] = float(mean_iou(counts.sum(0))), mean_iou(resampled_sums(counts, replicates, seed))
        return found


def score_refinement(params: Params, phrases: pd.DataFrame, refined: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write `scores/refinement.json`: for every baseline and refiner of the manifest `refined` each quantity before and
    after, the paired difference with its 95 % interval over images, the mean difference over the baselines (images drawn
    jointly), over all and over the real ones, and G4Seg's gain by the coarse mask's IoU and by the boundary's complexity."""
    images = [int(image) for image in refined["images"]]
    table = phrases[(phrases["split"] == "test") & phrases["image_id"].isin(images)]
    classes = ClassPhrases(params, images)
    replicates, seed = params.score.bootstrap, params.seed

    def measure(path: str | None, class_path: str | None, threshold: float | None = None) -> Measured:
        semantic = None if class_path is None else classes.count(Path(class_path), threshold)
        if path is None:
            return Measured(None, None, semantic)
        predictions = read_predictions(path)
        predictions = predictions[predictions["image_id"].isin(images)].reset_index(drop=True)
        ratio = params.score.boundary_ratio
        origins = ("phrase table", path)
        per_phrase, _ = score_run(table, predictions, PROTOCOL, boundary_ratio=ratio, replicates=0, origins=origins)
        sums = per_phrase.assign(n=1.0).groupby("image_id", sort=True)[["iou", "boundary_iou", "n"]].sum()
        return Measured(per_phrase, sums.to_numpy(np.float64), semantic)

    coarse: dict[str, Measured] = {}
    before: dict[str, dict[str, tuple[float, Floats]]] = {}
    rows: list[dict[str, Any]] = []
    differences: dict[str, list[dict[str, tuple[float, Floats]]]] = {}
    gains: list[pd.DataFrame] = []
    for entry in refined["refined"]:
        name, refiner = entry["baseline"], entry["refiner"]
        if name not in coarse:
            coarse[name] = measure(entry["coarse"], entry["coarse_classes"])
            before[name] = coarse[name].statistics(replicates, seed)
        after = measure(entry["predictions"], entry["class_predictions"], CUT)
        old, new = before[name], after.statistics(replicates, seed)
        change = {key: (new[key][0] - old[key][0], new[key][1] - old[key][1]) for key in QUANTITIES}
        differences.setdefault(refiner, []).append(change)
        row = {key: entry[key] for key in ("refiner", "baseline", "label", "real", "passes")}
        row |= {
            key: {"before": _number(old[key][0]), "after": _number(new[key][0])} | _told(*change[key]) for key in QUANTITIES
        }
        if classes.has_background and entry["coarse_classes"] and maps_path(entry["coarse_classes"]).exists():
            row["miou"] |= _swept(classes, entry)
        rows.append(row)
        first, second = coarse[name].per_phrase, after.per_phrase
        if refiner == "g4seg" and first is not None and second is not None:
            gains.append(first.merge(second[[*KEY, "iou"]], on=KEY, suffixes=("", "_after")))
    out = params.results_dir / "scores" / "refinement.json"
    summary = {
        "version": 1,
        "protocol": PROTOCOL,
        "split": "test",
        "counts": {"images": len(images), "phrases": len(table), "replicates": replicates},
        "background_threshold": params.score.background_threshold if classes.has_background else None,
        "rows": rows,
        "means": _means(rows, differences),
        "gain": _gain(pd.concat(gains, ignore_index=True), table, replicates, seed),
    }
    write_json(out, summary)
    return out, summary


def _means(rows: list[dict[str, Any]], differences: dict[str, list[dict[str, tuple[float, Floats]]]]) -> list[dict[str, Any]]:
    """By refiner: the mean difference over all its baselines and over the real ones among them, as far as they have the
    quantity: imported ones may lack the phrases or the class phrases."""
    found: list[dict[str, Any]] = []
    for refiner, changes in differences.items():
        own = [row for row in rows if row["refiner"] == refiner]
        for over in ("all", "real"):
            chosen = [index for index, row in enumerate(own) if row["real"] or over == "all"]
            if not chosen:
                continue
            mean: dict[str, Any] = {"refiner": refiner, "over": over, "baselines": [own[index]["baseline"] for index in chosen]}
            for key in QUANTITIES:
                there = [index for index in chosen if own[index][key]["difference"] is not None]
                mean[key] = {
                    side: float(np.mean([own[index][key][side] for index in there])) if there else None
                    for side in ("before", "after")
                }
                whole = float(np.mean([changes[index][key][0] for index in there])) if there else float("nan")
                mean[key] |= _told(whole, np.mean([changes[index][key][1] for index in there or chosen], 0))
            found.append(mean)
    return found


def _told(difference: float, replicated: Floats) -> dict[str, Any]:
    low, high = percentile_interval(replicated) or (None, None)
    return {"difference": _number(difference), "ci_low": low, "ci_high": high}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _swept(classes: ClassPhrases, entry: dict[str, Any]) -> dict[str, Any]:
    """mIoU of the coarse masks at their best background threshold: what a choice made on test would give."""
    path = Path(entry["coarse_classes"])
    values = [float(mean_iou(classes.count(path, float(threshold)).counts.sum(0))) for threshold in THRESHOLDS]
    if np.isnan(values).all():
        return {}
    best = int(np.nanargmax(values))
    return {"best_before": values[best], "best_threshold_before": float(THRESHOLDS[best])}


# --------------------------------------------------------------------------------------------- who gains
def complexity(mask: NDArray[np.bool_]) -> float:
    """Perimeter squared over area of a mask [H, W], the perimeter in pixel sides between foreground and background; a square
    has 16. NaN for an empty mask."""
    sides = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    area = np.count_nonzero(mask)
    return sides**2 / area if area else float("nan")


def _gain(pairs: pd.DataFrame, table: pd.DataFrame, replicates: int, seed: int) -> list[dict[str, Any]]:
    """Mean gain in IoU of G4Seg over all baselines' phrases, by the coarse mask's IoU and by the ground truth's complexity."""
    shapes = table.assign(
        complexity=[complexity(decode(*row)) for row in zip(table["mask"], table["height"], table["width"], strict=True)]
    )
    pairs = pairs.merge(shapes[[*KEY, "complexity"]], on=KEY)
    edges = {
        "iou": np.array(COARSE_BINS),
        "complexity": np.quantile(shapes["complexity"].dropna(), COMPLEXITY_QUANTILES) if len(shapes) else np.zeros(5),
    }
    found = []
    for by, bounds in edges.items():
        place = np.clip(np.searchsorted(bounds, pairs[by].to_numpy(), side="right") - 1, 0, len(bounds) - 2)
        for index, (low, high) in enumerate(pairwise(bounds)):
            chosen = (place == index) & pairs[by].notna().to_numpy()
            part = pairs.assign(gain=(pairs["iou_after"] - pairs["iou"]) * chosen, n=chosen.astype(float))
            sums = part.groupby("image_id", sort=True)[["gain", "n"]].sum().to_numpy(np.float64)
            if not chosen.any():
                continue
            drawn = resampled_sums(sums, replicates, seed)
            ratio = np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0)
            total = sums.sum(0)
            bin_ = {"by": by, "low": float(low), "high": float(high), "n": int(total[1])}
            found.append(bin_ | _told(float(total[0] / total[1]), ratio))
    return found
