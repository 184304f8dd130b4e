"""Score all runs of a study, its baselines and its refined masks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import atomic_path, write_json
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import maps_path
from genseg.errors import UserError
from genseg.metrics.baselines import score_baselines
from genseg.metrics.comparisons import compare_runs
from genseg.metrics.operating import operating_points
from genseg.metrics.refinement import score_refinement
from genseg.metrics.runs import ScoredRun, count_class_runs, latent_factor, predictions_path, score_study_run
from genseg.params import Cell, Params

READ_SUFFIXES = (".parquet", ".safetensors")
"""Suffixes of the baselines' and refiners' outputs that scoring reads."""


def score_study(params: Params) -> Path:
    """Score all runs listed in `results/S/predictions/manifest.json` and return the path of the scores' manifest.

    The manifest is written last. Files under `results/S/scores`:
        * `<run>.json` and `<run>.parquet`: summary and per-phrase table of every run except those of class phrases, which
          provide the `miou` of the main row and of the discriminative control;
        * `protocols/<run>.<protocol>.json`: the same two runs under every protocol in `score.also`;
        * `comparisons.json`: paired differences between runs;
        * `operating_points.json` and `.csv`: the operating points on val;
        * `baselines/<name>.json` and `refinement.json`, if the study samples all runs.

    Scores of runs that no longer exist are removed.

    Raises:
        UserError: an artifact is missing or broken, or does not match the others.
    """
    start_time = time.time()
    folder = params.results_dir / "scores"

    # 1. Load inputs.
    runs = _read_runs(params)
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    (folder / "manifest.json").unlink(missing_ok=True)  # Incomplete scores have no manifest.
    manifests = _read_refinement_manifests(params) if params.sample.is_whole() else {}

    # 2. Count pixels of the class phrases, for mIoU.
    pixel_counts = count_class_runs(params, runs)

    # 3. Score all other runs.
    factor = latent_factor(params, runs)
    phrase_runs = [run for run in runs if run["role"] != "class_phrases"]
    scored_runs = [score_study_run(params, run, phrases, factor, pixel_counts) for run in phrase_runs]
    outputs = [path for scored in scored_runs for path in scored.outputs]

    # 4. Compare runs and operating points.
    write_json(folder / "comparisons.json", compare_runs(params, scored_runs, pixel_counts))
    outputs.append(folder / "comparisons.json")
    outputs += _write_operating_points(params, scored_runs)

    # 5. Score the baselines and the refined masks.
    if manifests:
        outputs += score_baselines(params, phrases, manifests["baselines"])
        outputs.append(score_refinement(params, phrases, manifests["refined"]))

    # 6. Remove stale scores and write the manifest.
    _remove_stale_scores(folder, outputs)
    _write_manifest(params, runs, manifests.values(), outputs, start_time)
    return folder / "manifest.json"


def _read_runs(params: Params) -> list[dict[str, Any]]:
    """Return the runs of sampling, in the order of its manifest. Raises UserError if nothing was sampled."""
    path = params.results_dir / "predictions" / "manifest.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run `genseg sample` with the params of study {params.study} first")
    runs: list[dict[str, Any]] = read_manifest(path)["runs"]
    return runs


def _read_refinement_manifests(params: Params) -> dict[str, dict[str, Any]]:
    """Return the manifests of `baselines` and `refined`. Raises UserError if one is missing."""
    manifests = {}
    for folder, command in (("baselines", "baseline"), ("refined", "refine")):
        path = params.results_dir / folder / "manifest.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; run `genseg {command}` with the params of study {params.study} first")
        manifests[folder] = read_manifest(path)
    return manifests


def _write_operating_points(params: Params, scored_runs: Sequence[ScoredRun]) -> list[Path]:
    """Write `operating_points.json` and `.csv`, if the study has runs on val, and return their paths."""
    points = [scored.point for scored in scored_runs if scored.point is not None]
    if not points:
        return []
    main_cell = params.sample.main
    main = next(scored.run["name"] for scored in scored_runs if scored.point and Cell.of(scored.run) == main_cell)
    summary = operating_points(points, main)
    path = params.results_dir / "scores" / "operating_points.json"
    write_json(path, summary)
    with atomic_path(path.with_suffix(".csv")) as temporary:
        pd.DataFrame(summary["points"]).to_csv(temporary, index=False, lineterminator="\n")
    return [path, path.with_suffix(".csv")]


def _remove_stale_scores(folder: Path, outputs: Sequence[Path]) -> None:
    """Remove scores that earlier runs left behind in `folder`."""
    for path in {*folder.rglob("*.json"), *folder.rglob("*.parquet")} - set(outputs):
        path.unlink()


def _write_manifest(
    params: Params,
    runs: Sequence[dict[str, Any]],
    manifests: Iterable[dict[str, Any]],
    outputs: Sequence[Path],
    start_time: float,
) -> None:
    inputs = {params.data_dir / "phrases.parquet", params.results_dir / "predictions" / "manifest.json"}
    for run in runs:
        path = predictions_path(params, run)
        inputs |= {path, maps_path(path)} if maps_path(path).exists() else {path}
    if any(run["role"] == "class_phrases" for run in runs):
        inputs |= {params.data_dir / "class_phrases.parquet", params.data_dir / "classes.json"}
    for manifest in manifests:
        inputs |= {Path(path) for path in manifest["outputs"] if path.endswith(READ_SUFFIXES)}
    write_manifest(
        params.results_dir / "scores" / "manifest.json",
        phase="score",
        params=params.subtree("study", *("seed", "score", "sample.main", "sample.base", "sample.readout", "sample.threshold")),
        inputs=sorted(inputs),
        outputs=sorted(outputs),
        started=start_time,
        code=code_hash("artifacts", "cli/score.py", "metrics", "params.py"),
    )
