"""Write a study's tables (CSV, LaTeX, Markdown), figures and index.html from its scores and the published numbers."""

from __future__ import annotations

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", default="params.yaml", help="params file of the study (default: params.yaml)")


def run(args: argparse.Namespace) -> None:
    from genseg.artifacts.files import write_text
    from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
    from genseg.artifacts.parquet import KEY
    from genseg.artifacts.phrases import read_phrases
    from genseg.artifacts.predictions import read_predictions
    from genseg.artifacts.scores import read_per_phrase
    from genseg.params import load_params
    from genseg.report import build_tables, read_study
    from genseg.report.figures import (
        choose_examples,
        draw_evaluations,
        draw_evolution,
        draw_examples,
        draw_gain,
        draw_refined,
        draw_reliability,
        load_examples,
        load_refined,
        read_evolution,
    )
    from genseg.report.page import build_page
    from genseg.report.refinement import costs_dir, refinement_costs, refinement_tables
    from genseg.report.render import write_table
    from genseg.report.study import PUBLISHED, published_path
    from genseg.report.tables import OPTIONAL

    started = time.time()
    params = load_params(args.params)
    folder, figures = params.results_dir / "tables", params.results_dir / "figures"
    phrases_path = params.data_dir / "phrases.parquet"
    predictions_path = params.results_dir / "predictions" / "main" / "predictions.parquet"
    evolution_path = params.results_dir / "predictions" / "evolution.safetensors"

    refined_folder = params.results_dir / "refined"
    study, refined = read_study(params), read_manifest(refined_folder / "manifest.json")
    tables = [*build_tables(params, study), *refinement_tables(params, study)]
    (folder / "manifest.json").unlink(missing_ok=True)  # tables in the making have no manifest
    outputs = [path for table in tables for path in write_table(table, folder)]
    write_table(refinement_costs(params, study, refined), costs_dir(params))

    phrases = read_phrases(phrases_path)
    chosen = choose_examples(read_per_phrase(study.main.path), params.tables.examples)
    evolution = read_evolution(evolution_path)
    examples = load_examples(chosen, phrases, read_predictions(predictions_path))
    draw_examples(examples, figures / "examples.png", params.tables.dpi)
    draw_evolution(evolution, phrases, figures / "evolution.png", params.tables.dpi)
    captions = {
        "examples.png": f"Test phrases at {len(examples)} equidistant quantiles of the main row's IoU, best to worst: image, "
        "ground truth, and prediction of GS with the outline of the ground truth (dashed).",
        "evolution.png": "Sampling over t (the paper's Fig. 5): the noisy label x_t and the estimate of x_0 made from it.",
    }
    points = next(table.frame for table in tables if table.name == "evaluations")
    draw_evaluations(points, figures / "evaluations.png", params.tables.dpi)
    captions["evaluations.png"] = "Average recall against U-Net evaluations per mask: the operating points of the table below."
    counts = study.refinement["counts"]
    shown = load_refined(refined["refined"], refined_folder / "discrepancy", phrases)
    (figures / "refined.png").unlink(missing_ok=True)
    if shown:
        draw_refined(shown, figures / "refined.png", params.tables.dpi)
        captions["refined.png"] = (
            "G4Seg (ours): coarse mask, discrepancy of the first iteration, refined mask and ground truth, of phrases that a "
            "hash chose from the refined part of test."
        )
    draw_gain(study.refinement["gain"], figures / "gain.png", params.tables.dpi)
    captions["gain.png"] = (
        "Mean gain in IoU by G4Seg (ours) over all coarse masks, by their IoU and by the ground truth's complexity: "
        f"{counts['phrases']} phrases in {counts['images']} test images, protocol {study.refinement['protocol']}, bootstrap "
        "over images. A gain that falls with the IoU of the coarse mask is in part regression to the mean."
    )
    (figures / "reliability.png").unlink(missing_ok=True)
    if pairs := study.ensembles():
        several, single = pairs[0]
        curves = {str(cell): study.cells[cell].summary["calibration"] for cell in (several, single)}
        draw_reliability(curves, figures / "reliability.png", params.tables.dpi)
        captions["reliability.png"] = (
            f"Reliability of the soft masks on the grid's phrases, {several} against one sample: per bin of probability the "
            "frequency of foreground pixels (dashed: perfect), and the share of pixels in the bin. ECE: expected calibration "
            "error, points."
        )
    write_text(folder / "index.html", build_page(params, study, tables, captions))

    outputs += [folder / "index.html", *(figures / name for name in captions)]
    for path in (folder / f"{name}.{kind}" for name in OPTIONAL for kind in ("csv", "tex", "md")):
        if path not in outputs:
            path.unlink(missing_ok=True)
    write_manifest(
        folder / "manifest.json",
        phase="tables",
        params=params.subtree("study", "data.source", "data.class_template", "seed", "sample", "refine", "score", "tables"),
        inputs=[
            # No manifests here, though the page quotes them: their bytes hold times.
            *study.paths(),
            study.main.path.with_suffix(".parquet"),
            phrases_path,
            predictions_path,
            evolution_path,
            *sorted((refined_folder / "discrepancy").iterdir()),
            *(published_path(name) for name in PUBLISHED),
        ],
        outputs=sorted(outputs),
        started=started,
        code=code_hash("report", "artifacts", "cli/tables.py", "params.py"),
        examples=chosen[[*KEY, "iou"]].to_dict("records"),
    )
    print(f"{len(tables)} tables and {len(captions)} figures: open {folder / 'index.html'}")
