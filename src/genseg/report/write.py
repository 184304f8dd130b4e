"""Write a study's tables, figures, page and their manifest."""

from pathlib import Path

import pandas as pd

from genseg.artifacts.files import write_text
from genseg.artifacts.manifest import is_current, write_manifest
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.artifacts.scores import read_per_phrase
from genseg.params import Params
from genseg.report.figures.evaluations import draw_evaluations
from genseg.report.figures.evolution import draw_evolution, read_evolution
from genseg.report.figures.examples import choose_examples, draw_examples
from genseg.report.figures.failures import draw_failures
from genseg.report.figures.gain import draw_gain
from genseg.report.figures.narratives import draw_narratives
from genseg.report.figures.readouts import draw_readouts
from genseg.report.figures.refined import draw_refined, load_refined
from genseg.report.figures.reliability import draw_reliability
from genseg.report.page import build_page, manifest_paths
from genseg.report.refinement import write_refinement_report
from genseg.report.render import write_table
from genseg.report.scores import StudyScores, read_study_scores
from genseg.report.tables.ablations import ablations, evaluations, readouts
from genseg.report.tables.controls import breakdown, comparisons, controls, miou
from genseg.report.tables.costs import sampling_costs
from genseg.report.tables.failures import failures, find_failures
from genseg.report.tables.main import protocols, table2
from genseg.report.tables.parts import PUBLISHED, published_path
from genseg.report.tables.refinement import costs_dir, refinement_costs, refinement_tables
from genseg.report.tables.shares import shares

_EVOLUTION = "evolution.safetensors"
_OPTIONAL_TABLES = ("miou", "refinement_controls", "refinement_sensitivity")  # Some studies do not have them.


def write_report(params: Params) -> None:
    """Write `results/<study>/tables` and `results/<study>/figures`, and the tables of costs in `work/<study>/tables`.

    Raises UserError if an input is missing or broken, or the inputs disagree.
    """
    if not params.sample.runs:
        write_refinement_report(params)
        return
    results = params.results_dir
    folder, figures = results / "tables", results / "figures"

    # 1. Read the scores, and write the tables of costs, which are not outputs because they contain times.
    scores = read_study_scores(params)
    for costs in (refinement_costs(params, scores), sampling_costs(params)):
        write_table(costs, costs_dir(params))
    inputs = [
        *manifest_paths(params).values(),
        *scores.paths(),
        *(run.path.with_suffix(".parquet") for run in (scores.main, scores.discriminative)),
        *(params.data_dir / name for name in ("phrases.parquet", "class_phrases.parquet")),
        *(results / "predictions" / name / "predictions.parquet" for name in ("main", "discriminative")),
        results / "predictions" / _EVOLUTION,
        *sorted((results / "refined/discrepancy").glob("*")),
        *(published_path(name) for name in PUBLISHED),
    ]
    if is_current(folder / "manifest.json", "tables", params, inputs):
        return

    # 2. Write the tables of each section of the page. The manifest is removed first: it describes complete tables only.
    phrases, per_phrase = read_phrases(params.data_dir / "phrases.parquet"), read_per_phrase(scores.main.path)
    predictions = read_predictions(results / "predictions/main/predictions.parquet")
    failed = find_failures(per_phrase, phrases, read_phrases(params.data_dir / "class_phrases.parquet"), predictions)
    class_tables = [miou(params, scores)] if scores.main.summary.get("miou") else []
    sections = {
        "Results": [table2(params, scores), protocols(params, scores), controls(params, scores)],
        "Refinement": refinement_tables(params, scores),
        "Sampling": [evaluations(params, scores), *ablations(params, scores), readouts(params, scores)],
        "Evaluation": [
            shares(params, phrases),
            breakdown(params, scores),
            failures(params, scores, per_phrase, failed),
            *class_tables,
            comparisons(params, scores),
        ],
    }
    tables = {table.name: table for section in sections.values() for table in section}
    (folder / "manifest.json").unlink(missing_ok=True)
    outputs = [path for table in tables.values() for path in write_table(table, folder)]

    # 3. Draw the figures.
    examples = choose_examples(per_phrase, params.tables.examples)
    captions = _draw_figures(params, scores, phrases, tables["evaluations"].frame, examples, failed, figures)

    # 4. Write the page, and remove tables that the study no longer has.
    write_text(folder / "index.html", build_page(params, scores, sections, captions))
    outputs += [folder / "index.html", *(figures / name for name in captions)]
    for path in (folder / f"{name}.{suffix}" for name in _OPTIONAL_TABLES for suffix in ("csv", "tex", "md")):
        if path not in outputs:
            path.unlink(missing_ok=True)

    # 5. Write the manifest, the last file of the phase.
    records = examples[[*KEY, "iou"]].to_dict("records")
    write_manifest(folder / "manifest.json", "tables", params, inputs, sorted(outputs), examples=records)
    print(f"{len(tables)} tables and {len(captions)} figures: open {folder / 'index.html'}")


def _draw_figures(
    params: Params,
    scores: StudyScores,
    phrases: pd.DataFrame,
    points: pd.DataFrame,
    examples: pd.DataFrame,
    failed: pd.DataFrame,
    folder: Path,
) -> dict[str, str]:
    """Draw the figures into `folder`, remove those that the study no longer has, and return their captions by file name.

    `phrases` is the phrase table, `points` is the frame of the table `evaluations`, `examples` are the scores of the phrases
    in the figure of examples, and `failed` is the result of `find_failures`.
    """
    captions, dpi, predictions_dir = {}, params.tables.dpi, params.results_dir / "predictions"
    methods = {
        name: (read_predictions(predictions_dir / run.name / "predictions.parquet"), read_per_phrase(run.path))
        for name, run in (("GS", scores.main), ("discriminative", scores.discriminative))
    }
    captions["examples.png"] = draw_examples(examples, phrases, methods["GS"][0], folder / "examples.png", dpi)
    captions["narratives.png"] = draw_narratives(methods, phrases, folder / "narratives.png", dpi)
    captions["failures.png"] = draw_failures(failed, folder / "failures.png", dpi)
    record = read_evolution(predictions_dir / _EVOLUTION)
    captions["evolution.png"] = draw_evolution(record, phrases, folder / "evolution.png", dpi)
    captions["readouts.png"] = draw_readouts(record, phrases, params.sample, folder / "readouts.png", dpi)
    captions["evaluations.png"] = draw_evaluations(points, folder / "evaluations.png", dpi)
    if refined := load_refined(params.results_dir / "refined", phrases):
        captions["refined.png"] = draw_refined(refined, folder / "refined.png", dpi)
    if scores.refinement["gain"]:
        captions["gain.png"] = draw_gain(scores.refinement, folder / "gain.png", dpi)
    if ensembles := scores.ensembles():
        # Calibration of the first ensemble and of its single sample.
        curves = {str(cell): scores.cells[cell].summary["calibration"] for cell in ensembles[0]}
        captions["reliability.png"] = draw_reliability(curves, folder / "reliability.png", dpi)
    for name in {"gain.png", "refined.png", "reliability.png"} - captions.keys():
        (folder / name).unlink(missing_ok=True)
    return captions
