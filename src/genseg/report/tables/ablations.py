"""Sampling ablations: the paper's Tables 3-5, AR against network evaluations, and the read-outs."""

from typing import Any

from genseg.diffusion.guidance import count_evaluations
from genseg.params import OperatingPoint, Params
from genseg.report.render import Column, Table, difference_text, plural, sentence, to_points
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts
from genseg.report.tables.refinement import costs_dir

PUBLISHED_BASE = OperatingPoint(size=1024, num_inference_steps=50, guidance_scale=7.5)
"""Sampling settings of the paper's base row in Tables 3-5 (section 4.2 of the paper)."""


def ablations(params: Params, scores: StudyScores) -> list[Table]:
    """Build the paper's Tables 3-5: AR by image size, by steps (with a note on the main row) and by guidance scale."""
    grid, base, main = params.sample.grid, params.sample.base, params.sample.main
    steps = f"numbers of {base.sampler.upper()} steps"
    table3 = _ablation(params, scores, "table3_size", "size", grid.sizes, "Image size", "image sizes")
    table4 = _ablation(params, scores, "table4_steps", "num_inference_steps", grid.num_inference_steps, "Steps", steps)
    table5 = _ablation(params, scores, "table5_guidance", "guidance_scale", grid.guidance_scale, "Guidance", "guidance scales")
    comparison = scores.comparison(scores.main, scores.base())
    if comparison["n"]:
        table4.notes.append(
            f"The study's main row ({main}: {plural(count_evaluations(main), 'evaluation')} per mask) minus the base row: "
            f"{difference_text(comparison)} points on the {plural(comparison['n'], 'phrase')} of both rows."
        )
    return [table3, table4, table5]


def _ablation(
    params: Params, scores: StudyScores, published: str, field: str, values: list[Any], head: str, description: str
) -> Table:
    """Build one table: the published rows, then the base point and copies of it with `field` set to each of `values`."""
    name, axis = published.split("_")
    rows: list[dict[str, Any]] = []
    for record in parts.read_published(published):
        cell = PUBLISHED_BASE.model_copy(update={field: record[axis]})
        row = {**record, **parts.point_columns(cell), "evaluations": count_evaluations(cell), "source": "published"}
        rows.append(row | {"data": "PNG, about 7 % of test", "scores": str(parts.published_path(published))})

    # The base row is the first measured row.
    base, base_run = params.sample.base, scores.base()
    for cell in dict.fromkeys([base, *(base.model_copy(update={field: value}) for value in values)]):
        run = scores.cells[cell]
        rows.append({**parts.point_columns(cell), **parts.measured_columns(params, run), **_difference_from_base(scores, run)})

    other_axes = [column for column in parts.point_columns(base) if column != axis]
    frame = parts.build_frame(rows, [axis, *other_axes, "source", *SPLITS, "n", "evaluations"])
    study = parts.describe_study(params)
    caption = f"Average recall (points) over {description}: published on PNG, and GS measured here on {study}."
    columns = [
        Column(axis, head, "number"),
        *parts.AR_COLUMNS,
        Column("n", "n", "count"),
        Column("evaluations", "Eval.", "count"),
        Column("ceiling_latent", "Ceiling"),
        *parts.DIFFERENCE_COLUMNS,
    ]
    notes = [
        f"Measured on {parts.describe_phrases(params, base_run)}: a fixed part of test. {parts.comparability_note(params)} "
        f"The base row, which comes first and is repeated in Tables 3 to 5: {base}.",
        "Eval.: U-Net evaluations per mask, two for each step with guidance. Ceiling: overall AR of the ground truth at "
        "label-latent size, read bilinearly (native protocol). Δ: difference in overall AR from the base row, paired bootstrap "
        "over images.",
    ]
    groups = {
        "published": "Published, on about 7 % of PNG's test set",
        "measured": f"Measured here, on {study}, n = {base_run.phrases}",
    }
    return Table(name, caption, frame, columns, notes, group_by="source", groups=groups)


def _difference_from_base(scores: StudyScores, run: ScoredRun) -> dict[str, Any]:
    return {} if run is scores.base() else parts.difference_columns(scores.comparison(run, scores.base()))


def evaluations(params: Params, scores: StudyScores) -> Table:
    """Compare AR and U-Net evaluations per mask over the operating points and the base row.

    The main point is chosen on val; test is the grid's part of test. The base row has the paper's steps and guidance.
    """
    cells = {params.sample.base, *params.sample.val_points()}
    cells_by_cost = sorted(cells, key=lambda cell: (count_evaluations(cell), str(cell)))
    first = ["point", "role", "evaluations", "val_ar", "val_best_ar", "val_threshold", *SPLITS, "n"]
    frame = parts.build_frame([_evaluations_row(params, scores, cell) for cell in cells_by_cost], first)
    caption = f"AR (points) against U-Net evaluations per mask, GS measured here on {parts.describe_study(params)}."
    columns = [
        Column("point", "Operating point", "text"),
        Column("role", "", "text"),
        Column("evaluations", "Eval.", "count"),
        Column("val_ar", "Val"),
        Column("val_best_ar", "Val, best"),
        Column("val_threshold", "Thr.", "number"),
        Column("overall", "Test"),
        *parts.DIFFERENCE_COLUMNS,
        Column("ece", "ECE"),
    ]
    val, thresholds = scores.val[params.sample.main], scores.ranking["thresholds"]
    notes = [
        f"Val: {plural(val.phrases, 'phrase')} in {plural(val.images, 'image')}, a fixed part of val; AR at the study's "
        f"threshold {params.sample.threshold:g}, and the best AR over {plural(len(thresholds), 'threshold')} (native protocol) "
        f"with the threshold that reaches it. Test: {parts.describe_phrases(params, scores.base())}, a fixed part. "
        f"{_choice_note(params, scores)}",
        "Δ: difference in overall AR from base, paired bootstrap over images. ECE: expected calibration error of the "
        f"soft maps' pixels in points, with 15 bins. {parts.EVALUATION_NOTE} A mean of k samples takes k times as many. "
        f"Measured seconds: {costs_dir(params) / 'sampling_costs.md'}.",
        *_calibration_notes(scores),
    ]
    return Table("evaluations", caption, frame, columns, notes, small=True)


def _evaluations_row(params: Params, scores: StudyScores, cell: OperatingPoint) -> dict[str, Any]:
    """Return one operating point's row: AR on test and, if it was also sampled on val, AR and best threshold on val."""
    run, val_run = scores.cells[cell], scores.val.get(cell)
    row: dict[str, Any] = {
        "point": cell.label,
        "role": ", ".join(role for role in ("main", "base") if cell == getattr(params.sample, role)),
        **parts.point_columns(cell),
        **parts.measured_columns(params, run),
        "ece": to_points(_calibration_error(run)),
    }
    if val_run is not None:
        point = next(point for point in scores.ranking["points"] if point["scores"] == str(val_run.path))
        row |= {f"val_{key}": to_points(point[key]) for key in ("ar", "ci_low", "ci_high", "best_ar", "ece")}
        row |= {"val_n": val_run.phrases, "val_threshold": point["best_threshold"], "val_scores": str(val_run.path)}
    return row | _difference_from_base(scores, run)


def _calibration_error(run: ScoredRun) -> float | None:
    return (run.summary.get("calibration") or {}).get("ece")


def _choice_note(params: Params, scores: StudyScores) -> str:
    """Say whether the main point is the best one on val among the points that cost no more."""
    ranking = scores.ranking
    if ranking["main_is_best_for_its_cost"]:
        return "The main point has the best AR on val among those that cost no more."
    cost = count_evaluations(params.sample.main)
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
            f"Expected calibration error of {ensemble}: {a_error:.1f} points against {b_error:.1f} for one sample"
            f"{change_text}; AR {difference_text(scores.comparison(a, b))}."
        )
    return notes


def readouts(params: Params, scores: StudyScores) -> Table:
    """Compare the scores of the read-outs in the paper's Fig. 4; the study's own read-out is first."""
    names = {"bilinear": "bilinear", "nearest": "nearest", "vae": "VAE decoding"}
    base, base_run = params.sample.base, scores.base()
    runs = {names[name]: run for name, run in scores.readouts.items()}
    runs[f"{names[params.sample.readout]}, no CFG"] = scores.cells[base.model_copy(update={"guidance_scale": 1.0})]
    rows = [
        {"readout": name, **parts.measured_columns(params, run), **_difference_from_base(scores, run)}
        for name, run in runs.items()
    ]
    frame = parts.build_frame(rows, ["readout", "protocol", "n", "evaluations", *SPLITS, "boundary_iou"])
    study = parts.describe_study(params)
    caption = f"Read-out of the label latent (the paper's Fig. 4 as numbers): AR (points), measured here on {study}."
    columns = [
        Column("readout", "Read-out", "text"),
        Column("evaluations", "Eval.", "count"),
        *parts.AR_COLUMNS,
        Column("boundary_iou", "B. IoU"),
        *parts.DIFFERENCE_COLUMNS,
    ]
    notes = [
        f"Measured on {parts.describe_phrases(params, base_run)}: a fixed part of test. {sentence(str(base))} "
        f"{sentence(parts.describe_ceilings(base_run))}",
        f"Eval.: U-Net evaluations per mask. {parts.EVALUATION_NOTE} B. IoU: mean boundary IoU. Δ: difference in overall AR "
        "from the first row, paired bootstrap over images.",
        "All rows read the same stored maps, which are softened, bounded and of 8 bits. VAE decoding of the raw x_0 keeps more "
        "of the residual noise: figure readouts.png.",
    ]
    return Table("readouts", caption, frame, columns, notes)
