"""Score the runs of a study one at a time: phrases under all of their protocols, class phrases by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.scores import write_scores
from genseg.metrics.calibration import Counts, calibration_counts, calibration_summary
from genseg.metrics.class_phrases import ClassPhrases, miou_summary
from genseg.metrics.operating import Floats, operating_point, threshold_ious
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import PixelCounts
from genseg.params import Params

LEADING_RUNS = ("main", "discriminative")
"""Runs that are also scored under the protocols in `score.also` and that have an mIoU."""
PARTIAL_PHRASES = ("grid", "permutable", "val")
"""Values of a run's `phrases` that denote only part of a split; its predictions file lists the phrases."""


@dataclass(frozen=True)
class ScoredRun:
    """A run and the scores of it that other runs are compared with."""

    run: dict[str, Any]
    """The run's entry in the manifest of sampling."""
    per_phrase: pd.DataFrame
    """Scores under the study's protocol, one row per phrase."""
    calibration: Counts | None
    """`calibration_counts` [images, 3, bins]; None without bilinear soft maps."""
    point: dict[str, Any] | None
    """`operating_point` of a run on val, None for all other runs."""
    outputs: list[Path]
    """Files with the scores, in the order of writing."""


def count_class_runs(params: Params, runs: Sequence[dict[str, Any]]) -> dict[str, PixelCounts]:
    """Count the pixels of a study's runs of class phrases, by method."""
    class_runs = [run for run in runs if run["role"] == "class_phrases"]
    if not class_runs:
        return {}
    classes = ClassPhrases(params)
    return {run["method"]: classes.count(predictions_path(params, run)) for run in class_runs}


def score_study_run(
    params: Params,
    run: dict[str, Any],
    phrases: pd.DataFrame,
    factor: float | None,
    pixel_counts: Mapping[str, PixelCounts],
) -> ScoredRun:
    """Score a run of any role except `class_phrases`; write `scores/<run>.json` and `.parquet`.

    Args:
        factor: from `latent_factor`.
        pixel_counts: from `count_class_runs`.

    Raises:
        UserError: the predictions are missing or broken, or do not match the phrase table.
    """
    path = predictions_path(params, run)
    predictions = read_predictions(path)
    split = "val" if run["phrases"] == "val" else "test"
    replicates, seed = params.score.bootstrap, params.seed

    def score(protocol: str, boundary_ratio: float | None) -> tuple[pd.DataFrame, dict[str, Any]]:
        per_phrase, summary = score_run(
            phrases,
            predictions,
            protocol,
            split=split,
            boundary_ratio=boundary_ratio,
            latent=_latent_size(run, factor),
            replicates=replicates,
            seed=seed,
            only_predicted=run["phrases"] in PARTIAL_PHRASES,
            origins=(str(params.data_dir / "phrases.parquet"), str(path)),
        )
        return per_phrase, summary | {"run": run}

    # 1. Score under the study's protocol, including mIoU and calibration.
    folder = params.results_dir / "scores"
    out = folder / f"{run['name']}.json"
    per_phrase, summary = score(params.score.protocol, None if split == "val" else params.score.boundary_ratio)
    is_leading = run["name"] in LEADING_RUNS
    if is_leading and run["method"] in pixel_counts:
        summary["miou"] = miou_summary(params, pixel_counts[run["method"]])
    calibration, ious = _evaluate_maps(run, path, predictions, phrases)
    summary["calibration"] = None if calibration is None else calibration_summary(calibration, replicates, seed)
    point = operating_point(run, summary, ious, params.sample.threshold, out) if split == "val" else None
    outputs = _write(per_phrase, summary, out)

    # 2. Score under the other protocols.
    for protocol in dict.fromkeys(params.score.also if is_leading else []):
        if protocol != params.score.protocol:
            outputs += _write(*score(protocol, None), folder / "protocols" / f"{run['name']}.{protocol}.json")
    return ScoredRun(run, per_phrase, calibration, point, outputs)


def _write(per_phrase: pd.DataFrame, summary: dict[str, Any], out: Path) -> list[Path]:
    """Write scores and return their paths."""
    write_scores(per_phrase, summary, out)
    print(f"{out}: AR {summary['ar']['overall']:.4f} over {summary['counts']['phrases']} phrases", flush=True)
    return [out, out.with_suffix(".parquet")]


def _evaluate_maps(
    run: Mapping[str, Any], path: Path, predictions: pd.DataFrame, phrases: pd.DataFrame
) -> tuple[Counts | None, Floats | None]:
    """`calibration_counts` of a run's soft maps and, on val, their `threshold_ious`; None without bilinear soft maps."""
    if run["role"] == "readout" or run.get("readout", "bilinear") != "bilinear" or not maps_path(path).exists():
        return None, None
    rows = predictions[KEY].merge(phrases, on=KEY, how="left", sort=False)
    maps = read_maps(path)
    return calibration_counts(rows, maps), threshold_ious(rows, maps) if run["phrases"] == "val" else None


def predictions_path(params: Params, run: Mapping[str, Any]) -> Path:
    """Return the path of a run's predictions."""
    return params.results_dir / "predictions" / run["name"] / "predictions.parquet"


def latent_factor(params: Params, runs: Sequence[dict[str, Any]]) -> float | None:
    """Return the ratio of image size to label-latent size, from the main run's soft maps; None if it has none."""
    main = next((run for run in runs if run["role"] == "main"), None)
    shape = maps_shape(predictions_path(params, main)) if main else None
    return main["size"] / shape[1] if main and shape else None


def _latent_size(run: Mapping[str, Any], factor: float | None) -> tuple[int, int] | None:
    """Height and width of a run's label latent; None for a method without one."""
    if factor is None or run["size"] is None:
        return None
    side = round(run["size"] / factor)
    return side, side
