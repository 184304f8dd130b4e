"""Score the runs and the baselines of a study one at a time: phrases under all of their protocols, class phrases by pixel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import iterate_maps, maps_path, maps_shape, read_predictions
from genseg.artifacts.scores import SCHEMA, write_scores
from genseg.metrics.recall import PHRASE_GROUPS, Floats
from genseg.metrics.scoring import score_run
from genseg.metrics.semantic import ClassPhrases, PixelCounts, mean_iou, miou_summary
from genseg.metrics.soft_maps import calibration_counts, calibration_summary, operating_point, threshold_ious
from genseg.params import Params
from genseg.sampling.runs import Run, predictions_path

LEADING_RUNS = ("main", "discriminative")  # runs in Table 2, under every protocol and with an mIoU
PARTIAL_PHRASES = ("grid", "permutable", "val")  # `Run.phrases` of runs on the part of a split in their predictions


@dataclass(frozen=True)
class ScoredRun:
    """A run, and those of its scores that are compared with other runs."""

    run: Run
    per_phrase: pd.DataFrame  # scores under the study's protocol, one row per phrase
    calibration: Floats | None  # `calibration_counts` [images, 3, bins]; None without bilinear soft maps
    point: dict[str, Any] | None  # `operating_point` of a run on val, None for all other runs
    outputs: list[Path]  # files with the scores


def count_class_runs(params: Params, runs: Sequence[Run]) -> dict[str, PixelCounts]:
    """Count the pixels of a study's runs of class phrases, by method."""
    class_runs = [run for run in runs if run.role == "class_phrases"]
    if not class_runs:
        return {}
    classes = ClassPhrases(params)
    return {run.method: classes.count(predictions_path(params, run)) for run in class_runs}


def score_study_run(
    params: Params, run: Run, phrases: pd.DataFrame, factor: float | None, pixel_counts: Mapping[str, PixelCounts]
) -> ScoredRun:
    """Score a run of any role except `class_phrases`; write `scores/<run>.json` and `.parquet`.

    `factor` is from `latent_factor`, `pixel_counts` from `count_class_runs`. Raises UserError if the predictions are missing
    or broken, or do not match the phrase table.
    """
    path = predictions_path(params, run)
    predictions = read_predictions(path)
    split = "val" if run.phrases == "val" else "test"
    side = None if factor is None or run.point is None else round(run.point.size / factor)

    def score(protocol: str, boundary_ratio: float | None) -> tuple[pd.DataFrame, dict[str, Any]]:
        per_phrase, summary = score_run(
            phrases,
            predictions,
            protocol,
            split=split,
            boundary_ratio=boundary_ratio,
            latent=None if side is None else (side, side),
            replicates=params.score.bootstrap,
            seed=params.seed,
            only_predicted=run.phrases in PARTIAL_PHRASES,
            origins=(str(params.data_dir / "phrases.parquet"), str(path)),
        )
        return per_phrase, summary | {"run": run.model_dump(mode="json")}

    # 1. Score under the study's protocol, including mIoU.
    folder = params.results_dir / "scores"
    out = folder / f"{run.name}.json"
    per_phrase, summary = score(params.score.protocol, None if split == "val" else params.score.boundary_ratio)
    is_leading = run.name in LEADING_RUNS
    if is_leading and run.method in pixel_counts:
        summary["miou"] = miou_summary(params, pixel_counts[run.method])

    # 2. Evaluate bilinear soft maps: calibration and, on val, thresholds.
    calibration = ious = None
    summary["calibration"] = None
    if run.role != "readout" and run.readout == "bilinear" and maps_path(path).exists():
        rows = predictions[KEY].merge(phrases, on=KEY, how="left", sort=False)
        calibration = calibration_counts(rows, iterate_maps(path))
        summary["calibration"] = calibration_summary(calibration, params.score.bootstrap, params.seed)
        ious = threshold_ious(rows, iterate_maps(path)) if split == "val" else None
    point = operating_point(run, summary, ious, params.sample.threshold, out) if split == "val" else None
    outputs = _write(per_phrase, summary, out)

    # 3. Score under the other protocols.
    for protocol in params.score.protocols[1:] if is_leading else []:
        outputs += _write(*score(protocol, None), folder / "protocols" / f"{run.name}.{protocol}.json")
    return ScoredRun(run, per_phrase, calibration, point, outputs)


def latent_factor(params: Params, runs: Sequence[Run]) -> float | None:
    """Return the ratio of image size to label-latent size, from the main run's soft maps; None if it has none."""
    main = next((run for run in runs if run.role == "main"), None)
    shape = maps_shape(predictions_path(params, main)) if main else None
    return main.point.size / shape[1] if main and main.point and shape else None


def score_baselines(params: Params, phrases: pd.DataFrame, manifest: dict[str, Any]) -> list[Path]:
    """Write the scores of every baseline of a manifest that is not a sampling run, and return the written files.

    Baselines are scored on all test phrases: `scores/baselines/<name>.json` and `.parquet` hold AR, boundary IoU and mIoU.
    Those made without ground truth, the baselines of Table 2, have AR under the other protocols as well, in
    `scores/protocols/baselines`.
    """
    classes, folder = ClassPhrases(params), params.results_dir / "scores"
    outputs: list[Path] = []
    for entry in manifest["baselines"]:
        path, class_path = entry["predictions"], entry["class_predictions"]
        if any(file and Path(file).parent != params.results_dir / "baselines" for file in (path, class_path)):
            continue  # This baseline is a sampling run, which has its own scores.
        name = f"baselines/{entry['name']}"
        run = {"name": name, "role": "baseline"} | {key: entry[key] for key in ("label", "real", "imported")}

        # 1. Score under the study's protocol, including mIoU.
        miou = float("nan") if class_path is None else float(mean_iou(classes.count(Path(class_path)).counts.sum(0)))
        per_phrase, summary = _score_baseline(params, phrases, path, params.score.protocol)
        summary |= {"miou": {"mean": None if np.isnan(miou) else miou}, "run": run}
        outputs += _write(per_phrase, summary, folder / f"{name}.json")

        # 2. Score under the other protocols.
        for protocol in params.score.protocols[1:] if entry["real"] else []:
            per_phrase, summary = _score_baseline(params, phrases, path, protocol)
            outputs += _write(per_phrase, summary | {"run": run}, folder / "protocols" / f"{name}.{protocol}.json")
    return outputs


def _score_baseline(
    params: Params, phrases: pd.DataFrame, path: str | None, protocol: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score a baseline under one protocol; boundary IoU under the study's only. Without predictions, all scores are null."""
    if path is None:  # predictions of class phrases only
        summary: dict[str, Any] = {"protocol": protocol, "split": "test", "ceiling_latent": None, "miou": None}
        summary |= dict.fromkeys(("ar", "interval", "ceiling", "boundary_iou"), dict.fromkeys(PHRASE_GROUPS))
        summary["counts"] = dict.fromkeys(("phrases", "images", "narratives", "missing"), 0)
        return SCHEMA.empty_table().to_pandas(), summary
    return score_run(
        phrases,
        read_predictions(path),
        protocol,
        boundary_ratio=params.score.boundary_ratio if protocol == params.score.protocol else None,
        replicates=params.score.bootstrap,
        seed=params.seed,
        origins=("phrase table", path),
    )


def _write(per_phrase: pd.DataFrame, summary: dict[str, Any], out: Path) -> list[Path]:
    write_scores(per_phrase, summary, out)
    values = {"AR": summary["ar"]["overall"], "mIoU": (summary["miou"] or {}).get("mean")}
    text = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
    print(f"{out}: {text} ({summary['counts']['phrases']} phrases)", flush=True)
    return [out, out.with_suffix(".parquet")]
