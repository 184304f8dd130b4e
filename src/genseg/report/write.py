"""Write a study's tables, figures, page and their manifest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import write_text
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.artifacts.scores import read_per_phrase
from genseg.params import Params
from genseg.report.figures.evaluations import draw_evaluations, evaluations_caption
from genseg.report.figures.evolution import draw_evolution, evolution_caption, read_evolution
from genseg.report.figures.examples import choose_examples, draw_examples, examples_caption, load_examples
from genseg.report.figures.gain import draw_gain, gain_caption
from genseg.report.figures.refined import draw_refined, load_refined, refined_caption
from genseg.report.figures.reliability import draw_reliability, reliability_caption
from genseg.report.page import build_page
from genseg.report.published import PUBLISHED, published_path
from genseg.report.render import Table, write_table
from genseg.report.scores import StudyScores, read_study_scores
from genseg.report.tables import OPTIONAL_TABLES, build_tables
from genseg.report.tables.refinement import costs_dir, refinement_costs


def write_report(params: Params) -> None:
    """Write `results/<study>/tables` and `results/<study>/figures`, and the table of costs in `work/<study>/tables`.

    Raises:
        UserError: an input is missing or broken, or the inputs disagree.
    """
    start_time = time.time()
    folder, figures = params.results_dir / "tables", params.results_dir / "figures"

    # 1. Read the scores and what refinement recorded.
    scores, refined = read_study_scores(params), read_manifest(_refined_dir(params) / "manifest.json")

    # 2. Write the tables. The manifest is removed first, since it describes complete tables only.
    tables = build_tables(params, scores)
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = [path for table in tables for path in write_table(table, folder)]
    write_table(refinement_costs(params, scores, refined), costs_dir(params))

    # 3. Draw the figures.
    examples = choose_examples(read_per_phrase(scores.main.path), params.tables.examples)
    captions = _draw_figures(params, scores, refined, tables, examples, figures)

    # 4. Write the page, and remove tables that the study no longer has.
    write_text(folder / "index.html", build_page(params, scores, tables, captions))
    outputs += [folder / "index.html", *(figures / name for name in captions)]
    for path in (folder / f"{name}.{suffix}" for name in OPTIONAL_TABLES for suffix in ("csv", "tex", "md")):
        if path not in outputs:
            path.unlink(missing_ok=True)

    # 5. Write the manifest, the last file of the phase.
    write_manifest(
        folder / "manifest.json",
        phase="tables",
        params=params.subtree("study", "data.source", "data.class_template", "seed", "sample", "refine", "score", "tables"),
        inputs=_inputs(params, scores),
        outputs=sorted(outputs),
        started=start_time,
        code=code_hash("report", "artifacts", "cli/tables.py", "params.py"),
        examples=examples[[*KEY, "iou"]].to_dict("records"),
    )
    print(f"{len(tables)} tables and {len(captions)} figures: open {folder / 'index.html'}")


def _draw_figures(
    params: Params, scores: StudyScores, refined: dict[str, Any], tables: list[Table], chosen: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """Draw the figures into `folder` and remove those that the study no longer has.

    Args:
        refined: manifest of refinement.
        chosen: scores of the phrases in the figure of examples.

    Returns:
        File name -> caption, in the order of the page.
    """
    dpi, captions = params.tables.dpi, {}

    # 1. Examples, and the evolution of masks over t.
    phrases = read_phrases(_phrases_path(params))
    evolution = read_evolution(_evolution_path(params))
    examples = load_examples(chosen, phrases, read_predictions(_predictions_path(params)))
    draw_examples(examples, folder / "examples.png", dpi)
    captions["examples.png"] = examples_caption(len(examples))
    draw_evolution(evolution, phrases, folder / "evolution.png", dpi)
    captions["evolution.png"] = evolution_caption()

    # 2. AR against evaluations.
    points = next(table.frame for table in tables if table.name == "evaluations")
    draw_evaluations(points, folder / "evaluations.png", dpi)
    captions["evaluations.png"] = evaluations_caption()

    # 3. Refinement: examples, if there are any, and gain.
    (folder / "refined.png").unlink(missing_ok=True)
    refined_examples = load_refined(refined["refined"], _refined_dir(params) / "discrepancy", phrases)
    if refined_examples:
        draw_refined(refined_examples, folder / "refined.png", dpi)
        captions["refined.png"] = refined_caption()
    draw_gain(scores.refinement["gain"], folder / "gain.png", dpi)
    captions["gain.png"] = gain_caption(scores.refinement)

    # 4. Calibration of the first ensemble, if the grid has one.
    (folder / "reliability.png").unlink(missing_ok=True)
    ensembles = scores.ensembles()
    if ensembles:
        ensemble, single = ensembles[0]
        curves = {str(cell): scores.cells[cell].summary["calibration"] for cell in (ensemble, single)}
        draw_reliability(curves, folder / "reliability.png", dpi)
        captions["reliability.png"] = reliability_caption(ensemble)
    return captions


# --------------------------------------------------------------------------------------------------------------- inputs
def _inputs(params: Params, scores: StudyScores) -> list[Path]:
    """Return the input files. Manifests are left out although the page quotes them, because they hold times."""
    return [
        *scores.paths(),
        scores.main.path.with_suffix(".parquet"),
        _phrases_path(params),
        _predictions_path(params),
        _evolution_path(params),
        *sorted((_refined_dir(params) / "discrepancy").iterdir()),
        *(published_path(name) for name in PUBLISHED),
    ]


def _phrases_path(params: Params) -> Path:
    return params.data_dir / "phrases.parquet"


def _predictions_path(params: Params) -> Path:
    return params.results_dir / "predictions" / "main" / "predictions.parquet"


def _evolution_path(params: Params) -> Path:
    return params.results_dir / "predictions" / "evolution.safetensors"


def _refined_dir(params: Params) -> Path:
    return params.results_dir / "refined"
