"""Score all runs of a study, its baselines and its refined masks, and compare the runs in pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import atomic_path, write_json
from genseg.artifacts.manifest import is_current, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.reuse import prune, with_maps
from genseg.errors import UserError
from genseg.metrics.bootstrap import paired_difference, paired_statistic_difference
from genseg.metrics.headline import headline
from genseg.metrics.refinement import score_refinement
from genseg.metrics.runs import ScoredRun, count_class_runs, latent_factor, score_baselines, score_study_run
from genseg.metrics.semantic import PixelCounts, mean_iou
from genseg.metrics.soft_maps import calibration_error, operating_points
from genseg.params import Params
from genseg.phases import PHASES
from genseg.sampling.runs import Run, predictions_path


def score_study(params: Params) -> Path:
    """Score all runs in the manifest of the predictions, and return the path of the scores' manifest, which is written last.

    Files in `results/<study>/scores`:

    * `<run>.json` and `<run>.parquet`: summary and per-phrase table of every run except those of class phrases, which provide
      the `miou` of the main run and of the discriminative control;
    * `protocols/<run>.<protocol>.json` and `.parquet`: the same two runs, and every baseline made without ground truth, under
      every protocol in `score.extra_protocols`;
    * `comparisons.json`: paired differences between runs;
    * `operating_points.json` and `.csv`: the operating points on val;
    * `baselines/<name>.json` and `refinement.json`, if the study has tables.

    A study without runs has the last two only. `metrics/<study>.json` is the headline (`metrics.headline`).

    Scores of runs that no longer exist are removed. Raises UserError if an artifact is missing or broken, or does not match
    the others.
    """
    folder = params.results_dir / "scores"
    manifest_path = folder / "manifest.json"

    # 1. List inputs.
    runs, inputs = [], {params.data_dir / "phrases.parquet"}
    if params.sample.runs:
        runs = [Run.model_validate(run) for run in _read_manifest(params, "predictions", "sample")["runs"]]
        inputs.add(params.results_dir / "predictions" / "manifest.json")
    inputs |= set(with_maps(predictions_path(params, run) for run in runs))
    if any(run.role == "class_phrases" for run in runs):
        inputs |= {params.data_dir / "class_phrases.parquet", params.data_dir / "classes.json"}
    baselines = refined = None
    if params.sample.has_tables():
        baselines, refined = _read_manifest(params, "baselines", "baseline"), _read_manifest(params, "refined", "refine")
        files = [*baselines["outputs"], *refined["outputs"]]
        inputs |= {Path(file) for file in files if file.endswith((".parquet", ".safetensors"))}
    if is_current(manifest_path, "score", params, sorted(inputs)):
        return manifest_path
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    manifest_path.unlink(missing_ok=True)  # Incomplete scores have no manifest.

    # 2. Score the runs.
    pixel_counts = count_class_runs(params, runs)
    factor = latent_factor(params, runs)
    scored_runs = [score_study_run(params, run, phrases, factor, pixel_counts) for run in runs if run.role != "class_phrases"]
    outputs = [path for scored in scored_runs for path in scored.outputs]

    # 3. Compare runs and operating points.
    if runs:
        write_json(folder / "comparisons.json", compare_runs(params, scored_runs, pixel_counts))
        outputs.append(folder / "comparisons.json")
    outputs += _write_operating_points(params, scored_runs)

    # 4. Score the baselines and the refined masks.
    if baselines is not None and refined is not None:
        outputs += score_baselines(params, phrases, baselines)
        outputs.append(score_refinement(params, phrases, refined))

    # 5. Remove stale scores, and write the headline and the manifest.
    prune(folder, outputs, "score")
    headline_path = Path(PHASES["score"].metrics[0].format(study=params.study))
    write_json(headline_path, headline(params, [scored.run for scored in scored_runs]))
    write_manifest(manifest_path, "score", params, sorted(inputs), sorted([*outputs, headline_path]))
    return manifest_path


def _read_manifest(params: Params, folder: str, command: str) -> dict[str, Any]:
    path = params.results_dir / folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run `genseg {command}` with the params of study {params.study} first")
    return read_manifest(path)


def _write_operating_points(params: Params, scored_runs: Sequence[ScoredRun]) -> list[Path]:
    """Write `operating_points.json` and `.csv`, if the study has runs on val, and return their paths."""
    points = [scored.point for scored in scored_runs if scored.point is not None]
    if not points:
        return []
    main = next(scored.run.name for scored in scored_runs if scored.point and scored.run.point == params.sample.main)
    summary = operating_points(points, main)
    path = params.results_dir / "scores" / "operating_points.json"
    write_json(path, summary)
    with atomic_path(path.with_suffix(".csv")) as temporary:
        rows = [{"name": row["name"], **row["point"], **row} for row in summary["points"]]
        pd.DataFrame(rows).drop(columns="point").to_csv(temporary, index=False, lineterminator="\n")
    return [path, path.with_suffix(".csv")]


def compare_runs(
    params: Params, scored_runs: Sequence[ScoredRun], pixel_counts: Mapping[str, PixelCounts]
) -> dict[str, dict[str, Any]]:
    """Return paired differences with 95 % intervals, by name. `pixel_counts` is from `runs.count_class_runs`.

    * "<a> - <b>" and "<a> - <b> (things)", in AR: the main run minus each control and minus the base cell of the grid; each
      other cell and each read-out minus the base cell; each ensemble minus its first sample. Pairs of runs without a common
      phrase are left out.
    * "main - discriminative (miou)", in mIoU.
    * "<a> - <b> (ece)", in expected calibration error: each ensemble minus its first sample.
    """
    replicates, seed = params.score.bootstrap, params.seed
    runs = [scored.run for scored in scored_runs]
    by_name = {scored.run.name: scored for scored in scored_runs}
    ensembles = _ensemble_pairs(runs)
    differences: dict[str, dict[str, Any] | None] = {}

    # 1. Average recall.
    for first, second in [*_pairs(params, runs), *ensembles]:
        a, b = by_name[first].per_phrase, by_name[second].per_phrase
        differences[f"{first} - {second}"] = paired_difference(a, b, replicates, seed)
        things = a[a["is_thing"]], b[b["is_thing"]]
        differences[f"{first} - {second} (things)"] = paired_difference(*things, replicates, seed)

    # 2. mIoU.
    if {"gs", "discriminative"} <= pixel_counts.keys():
        counts = pixel_counts["gs"].counts, pixel_counts["discriminative"].counts
        differences["main - discriminative (miou)"] = paired_statistic_difference(mean_iou, *counts, replicates, seed)

    # 3. Calibration error.
    for ensemble, single in ensembles:
        ensemble_counts, single_counts = by_name[ensemble].calibration, by_name[single].calibration
        if ensemble_counts is not None and single_counts is not None:
            differences[f"{ensemble} - {single} (ece)"] = paired_statistic_difference(
                calibration_error, ensemble_counts, single_counts, replicates, seed
            )
    return {name: difference for name, difference in differences.items() if difference is not None}


def _pairs(params: Params, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Names of the pairs of runs whose AR is compared, except for the ensembles."""
    names = {role: [run.name for run in runs if run.role == role] for role in ("main", "control", "grid", "readout")}
    base = [run.name for run in runs if run.role == "grid" and run.point == params.sample.base]
    pairs = [(main, other) for main in names["main"] for other in [*names["control"], *base]]
    return pairs + [(name, other) for other in base for name in [*names["grid"], *names["readout"]] if name != other]


def _ensemble_pairs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Names of each ensemble in the grid and of the run of its first sample, if the study has both."""
    names = {run.point: run.name for run in runs if run.role == "grid" and run.point is not None}
    ensembles = [point for point in names if point.ensemble_size > 1 and point.single in names]
    return [(names[point], names[point.single]) for point in ensembles]
