"""Score every run of a study, and compare them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import atomic_path, write_json
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.scores import write_scores
from genseg.errors import UserError
from genseg.metrics.bootstrap import (
    paired_difference,
    paired_miou_difference,
    paired_statistic_difference,
    percentile_interval,
    resampled_sums,
)
from genseg.metrics.calibration import Counts, calibration_counts, calibration_error, calibration_summary
from genseg.metrics.class_phrases import ClassPhrases
from genseg.metrics.operating import THRESHOLDS, operating_points, threshold_ious
from genseg.metrics.recall import split_members
from genseg.metrics.refinement import manifests, score_baselines, score_refinement
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import Semantic, class_ious, mean_iou
from genseg.params import Cell, Params

SPLIT = "test"
_READ = (".parquet", ".safetensors")
PARTIAL = ("grid", "permutable", "val")
"""Values of a run's `phrases` that stand for a part of a split: the phrases in its predictions file."""


def score_study(params: Params) -> Path:
    """Score all runs that `results/S/predictions/manifest.json` names; returns the manifest of the scores, written last.

    Writes under `results/S/scores`: a summary (`<run>.json`) and a per-phrase table (`<run>.parquet`) for every run but
    those of class phrases, which give the `miou` of the main row and of the discriminative control;
    `protocols/<run>.<protocol>.json` for both of these and every protocol in `score.also`; `comparisons.json`; and
    `operating_points.json` and `.csv`, the operating points on val. Scores that no run accounts for are removed.

    Raises:
        UserError: an artifact is missing or broken, or does not fit the others.
    """
    started = time.time()
    folder, predicted = params.results_dir / "scores", params.results_dir / "predictions"
    if not (predicted / "manifest.json").exists():
        raise UserError(
            f"{predicted / 'manifest.json'}: no predictions of study {params.study} yet; run `genseg sample` with its params"
        )
    runs: list[dict[str, Any]] = read_manifest(predicted / "manifest.json")["runs"]
    phrases_path = params.data_dir / "phrases.parquet"
    phrases = read_phrases(phrases_path)
    (folder / "manifest.json").unlink(missing_ok=True)  # scores in the making have no manifest

    others = manifests(params) if params.sample.is_whole() else {}
    class_runs = [run for run in runs if run["role"] == "class_phrases"]
    classes = ClassPhrases(params) if class_runs else None
    semantics = {run["method"]: classes.count(predicted / run["name"] / "predictions.parquet") for run in class_runs if classes}
    factor = _latent_factor(runs, predicted)
    tables: dict[str, pd.DataFrame] = {}
    calibrations: dict[str, Counts] = {}
    points: list[dict[str, Any]] = []
    outputs: list[Path] = []
    for run in (run for run in runs if run["role"] != "class_phrases"):
        name = run["name"]
        path = predicted / name / "predictions.parquet"
        predictions = read_predictions(path)
        leading, val = name in ("main", "discriminative"), run["phrases"] == "val"
        for protocol in dict.fromkeys([params.score.protocol, *(params.score.also if leading else [])]):
            first = protocol == params.score.protocol
            per_phrase, summary = score_run(
                phrases,
                predictions,
                protocol,
                split="val" if val else SPLIT,
                boundary_ratio=params.score.boundary_ratio if first and not val else None,
                latent=_latent(run, factor),
                replicates=params.score.bootstrap,
                seed=params.seed,
                only_predicted=run["phrases"] in PARTIAL,
                origins=(str(phrases_path), str(path)),
            )
            summary["run"] = run
            if first:
                tables[name] = per_phrase
                if leading and run["method"] in semantics:
                    summary["miou"] = miou_summary(semantics[run["method"]], params)
                soft = run["role"] != "readout" and maps_path(path).exists() and run.get("readout", "bilinear") == "bilinear"
                truth = predictions[KEY].merge(phrases, on=KEY, how="left", sort=False) if soft else None
                summary["calibration"] = None
                if truth is not None:
                    calibrations[name] = calibration_counts(truth, read_maps(path))
                    summary["calibration"] = calibration_summary(calibrations[name], params.score.bootstrap, params.seed)
                if val:
                    ious = None if truth is None else threshold_ious(truth, read_maps(path))
                    points.append(_point(run, summary, ious, params.sample.threshold, folder / f"{name}.json"))
            out = folder / f"{name}.json" if first else folder / "protocols" / f"{name}.{protocol}.json"
            write_scores(per_phrase, summary, out)
            outputs += [out, out.with_suffix(".parquet")]
            overall = summary["ar"]["overall"]
            print(f"{out}: AR {overall:.4f} over {summary['counts']['phrases']} phrases", flush=True)

    comparisons = compare(tables, runs, params)
    if {"gs", "discriminative"} <= semantics.keys():
        comparisons["main - discriminative (miou)"] = paired_miou_difference(
            semantics["gs"].counts, semantics["discriminative"].counts, params.score.bootstrap, params.seed
        )
    for several, single in _ensembles(runs):
        if single in calibrations:
            comparisons[f"{several} - {single} (ece)"] = paired_statistic_difference(
                calibration_error, calibrations[several], calibrations[single], params.score.bootstrap, params.seed
            )
    write_json(folder / "comparisons.json", comparisons)
    outputs.append(folder / "comparisons.json")
    if points:
        main_point = next(run["name"] for run in runs if run["role"] == "val" and Cell.of(run) == params.sample.main)
        ranked = operating_points(points, main_point)
        write_json(folder / "operating_points.json", ranked)
        with atomic_path(folder / "operating_points.csv") as temporary:
            pd.DataFrame(ranked["points"]).to_csv(temporary, index=False, lineterminator="\n")
        outputs += [folder / "operating_points.json", folder / "operating_points.csv"]
    if others:
        for out, summary in score_baselines(params, phrases, others["baselines"]):
            outputs += [out, out.with_suffix(".parquet")]
            found = {"AR": summary["ar"]["overall"], "mIoU": summary["miou"]["mean"]}
            print(
                f"{out}: {', '.join(f'{name} {value:.4f}' for name, value in found.items() if value is not None)}", flush=True
            )
        out, refinement = score_refinement(params, phrases, others["refined"])
        outputs.append(out)
        for mean in (mean for mean in refinement["means"] if mean["miou"]["difference"] is not None):
            gain = f"{100 * mean['miou']['difference']:+.2f}"
            print(f"{out}: {mean['refiner']}, {mean['over']} baselines: mIoU {gain} points", flush=True)
    for orphan in {*folder.rglob("*.json"), *folder.rglob("*.parquet")} - set(outputs):
        orphan.unlink()
    write_manifest(
        folder / "manifest.json",
        phase="score",
        params=params.subtree("study", *("seed", "score", "sample.main", "sample.base", "sample.readout", "sample.threshold")),
        inputs=sorted(
            {
                *(phrases_path, predicted / "manifest.json"),
                *_read_files(params, runs, predicted),
                *map(Path, (path for made in others.values() for path in made["outputs"] if path.endswith(_READ))),
            }
        ),
        outputs=sorted(outputs),
        started=started,
        code=code_hash("artifacts", "cli/score.py", "metrics", "params.py"),
    )
    return folder / "manifest.json"


def _read_files(params: Params, runs: list[dict[str, Any]], predicted: Path) -> Iterable[Path]:
    """Files that scoring reads beside the phrase table."""
    for run in runs:
        path = predicted / run["name"] / "predictions.parquet"
        yield path
        if maps_path(path).exists():
            yield maps_path(path)
    if any(run["role"] == "class_phrases" for run in runs):
        yield from (params.data_dir / "class_phrases.parquet", params.data_dir / "classes.json")


def _point(
    run: dict[str, Any], summary: dict[str, Any], ious: NDArray[np.float64] | None, threshold: float, path: Path
) -> dict[str, Any]:
    """An operating point on val: AR as every run is scored, and AR (native) at the best threshold of its soft maps, of which
    `ious` [N, K] are the IoUs; a run whose read-out has no such maps keeps its own threshold."""
    best, best_threshold = summary["ar"]["overall"], threshold
    if ious is not None:
        recall = ious.mean(0)
        best, best_threshold = float(recall.max()), float(THRESHOLDS[recall.argmax()])
    low, high = summary["interval"]["overall"] or (None, None)
    return {
        "name": run["name"],
        **{name: run[name] for name in ("size", "steps", "guidance", "rule", "guidance_interval", "ensemble", "evaluations")},
        "phrases": summary["counts"]["phrases"],
        "images": summary["counts"]["images"],
        "threshold": threshold,
        "ar": summary["ar"]["overall"],
        "ci_low": low,
        "ci_high": high,
        "best_threshold": best_threshold,
        "best_ar": best,
        "ece": (summary["calibration"] or {}).get("ece"),
        "scores": str(path),
    }


def _ensembles(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names of each ensemble on the grid and of the run that is its first sample alone, where the study has both."""
    cells = {Cell.of(run): run["name"] for run in runs if run["role"] == "grid"}
    singles = {cell: cell.model_copy(update={"ensemble": 1}) for cell in cells if cell.ensemble > 1}
    return [(cells[cell], cells[single]) for cell, single in singles.items() if single in cells]


# ------------------------------------------------------------------------------------------------- label-latent size
def _latent_factor(runs: list[dict[str, Any]], predicted: Path) -> float | None:
    """Pixels of the model's square image a cell of its label latent, as the main row's soft maps show it; None without."""
    main = next((run for run in runs if run["role"] == "main"), None)
    shape = maps_shape(predicted / main["name"] / "predictions.parquet") if main else None
    return main["size"] / shape[1] if main and shape else None


def _latent(run: dict[str, Any], factor: float | None) -> tuple[int, int] | None:
    if factor is None or run["size"] is None:
        return None
    side = round(run["size"] / factor)
    return side, side


# ------------------------------------------------------------------------------------------------------ class phrases
def miou_summary(semantic: Semantic, params: Params) -> dict[str, Any]:
    """The `miou` of a scores file: `mean`, `per_class` (null without ground truth), 95 % `interval`, and what it rests on."""
    total = semantic.counts.sum(0)
    mean = float(mean_iou(total))
    per_class = {
        name: None if np.isnan(iou) else float(iou) for name, iou in zip(semantic.names, class_ious(total), strict=True)
    }
    return {
        "mean": None if np.isnan(mean) else mean,
        "per_class": per_class,
        "interval": percentile_interval(mean_iou(resampled_sums(semantic.counts, params.score.bootstrap, params.seed))),
        "background_threshold": params.score.background_threshold,
        "images": len(semantic.image_ids),
        "pixels": int(total[1].sum()),
        "missing": semantic.missing,
    }


# -------------------------------------------------------------------------------------------------------- comparisons
def compare(tables: dict[str, pd.DataFrame], runs: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    """Paired differences of AR, overall and of things, by "<a> - <b>": the main row minus each control and minus the base
    cell of the grid, each other cell and each read-out minus the base cell, each ensemble minus its first sample."""
    by_role: dict[str, list[str]] = {}
    for run in runs:
        by_role.setdefault(run["role"], []).append(run["name"])
    base = [run["name"] for run in runs if run["role"] == "grid" and Cell.of(run) == params.sample.base]
    pairs = [(main, other) for main in by_role.get("main", []) for other in [*by_role.get("control", []), *base]]
    pairs += [(name, cell) for cell in base for name in [*by_role.get("grid", []), *by_role.get("readout", [])] if name != cell]
    pairs += _ensembles(runs)
    found = {}
    for first, second in pairs:
        a, b = tables[first], tables[second]
        found[f"{first} - {second}"] = paired_difference(a, b, params.score.bootstrap, params.seed)
        things = [table[split_members(table)["things"]] for table in (a, b)]
        found[f"{first} - {second} (things)"] = paired_difference(things[0], things[1], params.score.bootstrap, params.seed)
    return {name: value for name, value in found.items() if value is not None}
