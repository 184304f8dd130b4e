"""Score every run of a study, and compare them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.files import read_json, write_json
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions
from genseg.artifacts.scores import write_scores
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference, paired_miou_difference, percentile_interval, resampled_sums
from genseg.metrics.recall import split_members
from genseg.metrics.scoring import fitting_pairs, match, score_run
from genseg.metrics.semantic import Semantic, class_ious, count_pixels, mean_iou
from genseg.params import Params

SPLIT = "test"
PARTIAL = ("grid", "permutable")
"""Values of a run's `phrases` that stand for a part of the test split: the phrases in its predictions file."""


def score_study(params: Params) -> Path:
    """Score all runs that `results/S/predictions/manifest.json` names; returns the manifest of the scores, written last.

    Writes under `results/S/scores`: a summary (`<run>.json`) and a per-phrase table (`<run>.parquet`) for every run but
    those of class phrases, which give the `miou` of the main row and of the discriminative control;
    `protocols/<run>.<protocol>.json` for both of these and every protocol in `score.also`; `comparisons.json`. Scores that
    no run accounts for are removed.

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

    semantics = {run["method"]: _semantic(params, run, predicted) for run in runs if run["role"] == "class_phrases"}
    factor = _latent_factor(runs, predicted)
    tables: dict[str, pd.DataFrame] = {}
    outputs: list[Path] = []
    for run in (run for run in runs if run["role"] != "class_phrases"):
        name = run["name"]
        path = predicted / name / "predictions.parquet"
        predictions = read_predictions(path)
        leading = name in ("main", "discriminative")
        for protocol in dict.fromkeys([params.score.protocol, *(params.score.also if leading else [])]):
            first = protocol == params.score.protocol
            per_phrase, summary = score_run(
                phrases,
                predictions,
                protocol,
                split=SPLIT,
                boundary_ratio=params.score.boundary_ratio if first else None,
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
    write_json(folder / "comparisons.json", comparisons)
    outputs.append(folder / "comparisons.json")
    for orphan in {*folder.rglob("*.json"), *folder.rglob("*.parquet")} - set(outputs):
        orphan.unlink()
    write_manifest(
        folder / "manifest.json",
        phase="score",
        params=params.subtree("study", "seed", "score", "sample.base"),
        inputs=[phrases_path, predicted / "manifest.json", *_read_files(params, runs, predicted)],
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
        if run["role"] == "class_phrases" and maps_path(path).exists():
            yield maps_path(path)
    if any(run["role"] == "class_phrases" for run in runs):
        yield from (params.data_dir / "class_phrases.parquet", params.data_dir / "classes.json")


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
def _semantic(params: Params, run: dict[str, Any], predicted: Path) -> Semantic:
    """Pixel counts of a run over class phrases, from its soft maps where it has them and its masks otherwise."""
    phrases_path, path = params.data_dir / "class_phrases.parquet", predicted / run["name"] / "predictions.parquet"
    origins = (str(phrases_path), str(path))
    predictions = read_predictions(path)
    rows, _ = match(read_phrases(phrases_path), predictions, SPLIT, False, origins)
    pairs = fitting_pairs(rows, origins)
    rows = rows.assign(mask=pairs.truths, predicted_mask=pairs.predictions, area=pairs.truth_area)
    shape = maps_shape(path)
    if shape is not None and shape[0] != len(predictions):
        raise UserError(
            f"{maps_path(path)}: {shape[0]} soft maps for {len(predictions)} predictions; remove both and sample again"
        )

    def maps(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        low, high = (int(chosen.min()), int(chosen.max()) + 1) if len(chosen) else (0, 0)
        return read_maps(path, slice(low, high))[chosen - low]  # an image's rows lie together

    classes = read_json(params.data_dir / "classes.json")
    return count_pixels(rows, None if shape is None else maps, classes, params.score.background_threshold, origins[0])


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
    cell of the grid, each other cell and each read-out minus the base cell."""
    by_role: dict[str, list[str]] = {}
    for run in runs:
        by_role.setdefault(run["role"], []).append(run["name"])
    base_cell = params.sample.base
    base = [
        run["name"]
        for run in runs
        if run["role"] == "grid"
        and (run["size"], run["steps"], run["guidance"]) == (base_cell.size, base_cell.steps, base_cell.guidance)
    ]
    pairs = [(main, other) for main in by_role.get("main", []) for other in [*by_role.get("control", []), *base]]
    pairs += [(name, cell) for cell in base for name in [*by_role.get("grid", []), *by_role.get("readout", [])] if name != cell]
    found = {}
    for first, second in pairs:
        a, b = tables[first], tables[second]
        found[f"{first} - {second}"] = paired_difference(a, b, params.score.bootstrap, params.seed)
        things = [table[split_members(table)["things"]] for table in (a, b)]
        found[f"{first} - {second} (things)"] = paired_difference(things[0], things[1], params.score.bootstrap, params.seed)
    return {name: value for name, value in found.items() if value is not None}
