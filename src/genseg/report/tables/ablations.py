"""Sampling ablations: the paper's Tables 3-5, AR against network evaluations, and the read-outs."""

from __future__ import annotations

from typing import Any

from genseg.params import Cell, Params, Point
from genseg.report.published import published_path, read_published
from genseg.report.render import Column, Table
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts
from genseg.report.text import difference_text, plural, sentence, to_points

PUBLISHED_BASE = Cell(size=1024, steps=50, guidance=7.5)
"""Sampling settings of the paper's base row in Tables 3-5 (section 4.2 of the paper)."""


# ----------------------------------------------------------------------------------------------------------- Tables 3-5
def table3(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 3: AR by image size."""
    return _ablation(params, scores, "table3", "size", "Image size", list(params.sample.grid.sizes), "image sizes")


def table4(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 4, AR by number of steps, with a note that compares the main row with the base row."""
    description = f"numbers of {params.sample.base.rule.upper()} steps"
    table = _ablation(params, scores, "table4", "steps", "Steps", list(params.sample.grid.steps), description)
    main, comparison = params.sample.main, scores.comparison(scores.main, scores.base())
    if comparison["n"]:
        table.notes.append(
            f"The study's main row ({parts.describe_cell(main)}: "
            f"{plural(main.evaluations, 'evaluation')} per mask) minus the base row: {difference_text(comparison)} points on "
            f"the {plural(comparison['n'], 'phrase')} that both rows share."
        )
    return table


def table5(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 5: AR by guidance scale."""
    return _ablation(params, scores, "table5", "guidance", "Guidance", list(params.sample.grid.guidance), "guidance scales")


def _ablation(
    params: Params, scores: StudyScores, name: str, axis: str, head: str, values: list[Any], description: str
) -> Table:
    """Replace one coordinate of the base cell by each of `values`, below the published rows of the same ablation."""
    # 1. The published rows.
    rows: list[dict[str, Any]] = []
    for record in read_published(f"{name}_{axis}"):
        cell = PUBLISHED_BASE.model_copy(update={axis: record[axis]})
        row = {**record, **cell.model_dump(), "evaluations": cell.evaluations, "source": "published"}
        rows.append(row | {"data": "PNG, about 7 % of test", "scores": str(published_path(f"{name}_{axis}"))})

    # 2. The measured rows, base first.
    base = params.sample.base
    for cell in dict.fromkeys([base, *(base.model_copy(update={axis: value}) for value in values)]):
        run = scores.cells[cell]
        row = {**cell.model_dump(), **parts.measured_columns(params, run)}
        rows.append(row if cell == base else row | parts.difference_columns(scores.comparison(run, scores.base())))

    # 3. The table.
    other_axes = [key for key in Cell.model_fields if key != axis]
    return Table(
        name=name,
        caption=f"Average recall (points) over {description}: published on PNG, and GS measured here on "
        f"{parts.describe_study(params)}.",
        frame=parts.build_frame(rows, [axis, *other_axes, "source", *SPLITS, "n", "evaluations"]),
        columns=[
            Column(axis, head, "number"),
            *parts.AR_COLUMNS,
            Column("n", "n", "count"),
            Column("evaluations", "Eval.", "count"),
            Column("ceiling_latent", "Ceiling"),
            *parts.DIFFERENCE_COLUMNS,
        ],
        group_by="source",
        groups={
            "published": "Published, on about 7 % of PNG's test set",
            "measured": f"Measured here, on {parts.describe_study(params)}, n = {scores.base().phrases}",
        },
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.base())}: a fixed part of test. "
            f"{parts.comparability_note(params)} The base row, which comes first and is repeated in Tables 3 to 5: "
            f"{parts.describe_cell(base)}.",
            "Eval.: U-Net evaluations per mask, two for each step with guidance. Ceiling: overall AR of the ground truth at "
            "label-latent size, read bilinearly (native protocol). Δ: difference in overall AR from the base row, paired "
            "bootstrap over images.",
        ],
    )


# --------------------------------------------------------------------------------------------- evaluations, calibration
def evaluations(params: Params, scores: StudyScores) -> Table:
    """Compare AR and U-Net evaluations per mask over the operating points and the base row.

    The main point is chosen on val; test is the grid's part of test. The base row has the paper's steps and guidance.
    """
    base, main_val = params.sample.base, scores.val[params.sample.main]
    cells = sorted({base, *params.sample.operating_points()}, key=lambda cell: (cell.evaluations, str(cell)))
    return Table(
        name="evaluations",
        caption=f"AR (points) against U-Net evaluations per mask, GS measured here on {parts.describe_study(params)}.",
        frame=parts.build_frame(
            [_evaluations_row(params, scores, cell) for cell in cells],
            ["point", "role", "evaluations", "val_ar", "val_best_ar", "val_threshold", *SPLITS, "n"],
        ),
        columns=[
            Column("point", "Operating point", "text"),
            Column("role", "", "text"),
            Column("evaluations", "Eval.", "count"),
            Column("val_ar", "Val"),
            Column("val_best_ar", "Val, best"),
            Column("val_threshold", "at", "number"),
            Column("overall", "Test"),
            *parts.DIFFERENCE_COLUMNS,
            Column("ece", "ECE"),
        ],
        notes=[
            f"Val: {plural(main_val.phrases, 'phrase')} in {plural(main_val.images, 'image')}, a fixed part of val; AR at the "
            f"study's threshold {params.sample.threshold:g}, and the best AR over "
            f"{plural(len(scores.ranking['thresholds']), 'threshold')} (native protocol) with the threshold that reaches it. "
            f"Test: {parts.describe_phrases(params, scores.base())}, a fixed part. {_choice_note(params, scores)}",
            "Δ: difference in overall AR from base, paired bootstrap over images. ECE: expected calibration error of the soft "
            f"map's pixels in points, 15 bins. {parts.EVALUATION_NOTE} A mean of k samples takes k times as many.",
            *_calibration_notes(scores),
        ],
        small=True,
    )


def _evaluations_row(params: Params, scores: StudyScores, cell: Cell) -> dict[str, Any]:
    """Return one operating point's row: AR on test and, if it was also sampled on val, AR and best threshold on val."""
    run, val_run, base = scores.cells[cell], scores.val.get(cell), params.sample.base
    roles = [name for name, role_cell in {"main": params.sample.main, "base": base}.items() if cell == role_cell]
    row: dict[str, Any] = {
        "point": str(Point.model_validate(cell.model_dump(exclude={"size"}))),
        "role": ", ".join(roles),
        **cell.model_dump(),
        **parts.measured_columns(params, run),
        "ece": to_points(_calibration_error(run)),
    }
    if val_run is not None:
        point = next(point for point in scores.ranking["points"] if point["scores"] == str(val_run.path))
        row |= {f"val_{key}": to_points(point[key]) for key in ("ar", "ci_low", "ci_high", "best_ar", "ece")}
        row |= {"val_n": val_run.phrases, "val_threshold": point["best_threshold"], "val_scores": str(val_run.path)}
    return row if cell == base else row | parts.difference_columns(scores.comparison(run, scores.base()))


def _calibration_error(run: ScoredRun) -> float | None:
    return (run.summary.get("calibration") or {}).get("ece")


def _choice_note(params: Params, scores: StudyScores) -> str:
    """Say whether the main point is the best one on val among the points that cost no more."""
    ranking = scores.ranking
    if ranking["main_is_best_for_its_cost"]:
        return "The main point has the best AR on val among those that cost no more."
    cost = params.sample.main.evaluations
    name = next(entry["name"] for entry in ranking["best"] if entry["evaluations_at_most"] == cost)
    better = next(cell for cell, run in scores.val.items() if run.name == name)
    return f"Among the points that cost no more than the main one, {better} has a higher AR on val."


def _calibration_notes(scores: StudyScores) -> list[str]:
    """Compare the calibration and AR of each ensemble's mean map with those of a single sample."""
    notes = []
    for ensemble, single in scores.ensembles():
        a, b = scores.cells[ensemble], scores.cells[single]
        a_error, b_error = (100 * (_calibration_error(run) or 0) for run in (a, b))
        change = scores.comparisons.get(f"{a.name} - {b.name} (ece)")
        change_text = f" ({difference_text(change)})" if change else ""
        notes.append(
            f"{sentence(str(ensemble))[:-1]}: expected calibration error {a_error:.1f} points against {b_error:.1f} for one "
            f"sample{change_text}; AR {difference_text(scores.comparison(a, b))}."
        )
    return notes


# ------------------------------------------------------------------------------------------------------------ read-outs
def readouts(params: Params, scores: StudyScores) -> Table:
    """Compare the read-outs of the paper's Fig. 4 as numbers, the study's own read-out first."""
    names = {"bilinear": "bilinear", "nearest": "nearest", "vae": "VAE decoding"}
    base, own_name = params.sample.base, names[params.sample.readout]
    runs = [(names[name], run) for name, run in scores.readouts.items()]
    runs.append((f"{own_name}, no CFG", scores.cells[base.model_copy(update={"guidance": 1.0})]))
    rows = [
        {"readout": name, **parts.measured_columns(params, run)}
        | (parts.difference_columns(scores.comparison(run, scores.base())) if run is not scores.base() else {})
        for name, run in runs
    ]
    return Table(
        name="readouts",
        caption="Read-out of the label latent (the paper's Fig. 4 as numbers): AR (points), measured here on "
        f"{parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["readout", "protocol", "n", "evaluations", *SPLITS, "boundary_iou"]),
        columns=[
            Column("readout", "Read-out", "text"),
            Column("evaluations", "Eval.", "count"),
            *parts.AR_COLUMNS,
            Column("boundary_iou", "B. IoU"),
            *parts.DIFFERENCE_COLUMNS,
        ],
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.base())}: a fixed part of test. "
            f"{sentence(parts.describe_cell(base))} {sentence(parts.describe_ceilings(scores.base()))}",
            f"Eval.: U-Net evaluations per mask. {parts.EVALUATION_NOTE} B. IoU: mean boundary IoU. "
            "Δ: difference in overall AR from the first row, paired bootstrap over images.",
        ],
    )
