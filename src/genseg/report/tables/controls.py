"""Checks of the main result: controls, breakdown by groups of phrases, mIoU, comparisons."""

from genseg.params import OperatingPoint, Params
from genseg.report.render import Column, Table, difference_text, interval_text, plural, sentence, to_points
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts

_METHOD_COLUMNS = [Column("gs", "GS"), Column("discriminative", "Discriminative")]


def controls(params: Params, scores: StudyScores) -> Table:
    """Show how much of the AR of GS is due to the text, to colour alone, and to generation."""
    rows, skipped_notes = [], []
    for run in scores.controls():
        row = {"control": "none" if run is scores.main else run.name, **parts.measured_columns(params, run)}
        if run is not scores.main:
            row |= parts.difference_columns(scores.comparison(scores.main, run))
            row |= parts.difference_columns(scores.comparison(scores.main, run, "things"), "difference_things")
        if skipped := parts.describe_skipped(run):
            skipped_notes.append(f"{row['control']}: {skipped}.")
        rows.append(row)
    caption = f"Average recall (points) of GS and of its controls, measured here on {parts.describe_study(params)}."
    columns = [
        Column("control", "Control", "text"),
        Column("n", "n", "count"),
        *parts.AR_COLUMNS,
        Column("difference", "Δ all", "signed"),
        Column("difference", "95 % CI", "interval"),
        Column("difference_things", "Δ things", "signed"),
        Column("difference_things", "95 % CI", "interval"),
    ]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}. {sentence(parts.describe_ceilings(scores.main))}",
        "none: GS itself. text_permuted: GS given another phrase of the same image (a derangement of phrases whose ground "
        "truths differ; images with no such pair are left out). colour_threshold: colour histograms of the training phrases' "
        f"words, with a threshold chosen on val. discriminative: {parts.DISCRIMINATIVE}. discriminative_mirrored: the mean of "
        "its soft maps of the image and of the mirrored image, two evaluations.",
        "Δ: AR of GS minus AR of the control, overall and for things, on the phrases that both runs share, paired bootstrap "
        "over images.",
        *skipped_notes,
    ]
    frame = parts.build_frame(rows, ["control", "protocol", "n", *SPLITS])
    return Table("controls", caption, frame, columns, notes, small=True)


def breakdown(params: Params, scores: StudyScores) -> Table:
    """Break overall AR down by object size and by tag, and add boundary IoU."""
    gs, discriminative = _part_values(scores.main), _part_values(scores.discriminative)
    origin = f"{scores.main.path}; {scores.discriminative.path}"
    rows = [
        {"part": part, "n": n, "gs": ar, "discriminative": discriminative.get(part, (None, None))[1], "scores": origin}
        for part, (n, ar) in gs.items()
    ]
    study = parts.describe_study(params)
    caption = f"Overall average recall and boundary IoU (points) by group of phrases, measured here on {study}."
    columns = [Column("part", "Part", "text"), Column("n", "n", "count"), *_METHOD_COLUMNS]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}. Small, medium and large are COCO's size classes (32² and "
        "96² pixels in a 640 × 480 image), with bounds scaled by the image's area."
    ]
    if not params.score.miou:
        notes.append(parts.MIOU_NOT_SCORED)
    return Table("breakdown", caption, parts.build_frame(rows), columns, notes)


def _part_values(run: ScoredRun) -> dict[str, tuple[int | None, float | None]]:
    """Return group of phrases -> (number of phrases, None if the scores lack it; AR in points)."""
    sizes, tags = run.summary.get("ar_by_size") or {}, run.summary.get("tags") or {}
    return {
        "all phrases": (run.phrases, to_points(run.summary["ar"]["overall"])),
        **{f"{size} objects": (None, to_points(sizes.get(size))) for size in ("small", "medium", "large")},
        **{tag: (value["n"], to_points(value["overall"])) for tag, value in sorted(tags.items())},
        "boundary IoU, all phrases": (run.phrases, to_points(run.summary["boundary_iou"]["overall"])),
    }


def miou(params: Params, scores: StudyScores) -> Table:
    """Show the IoU of every class and the mean, from class phrases."""
    runs = {"gs": scores.main, "discriminative": scores.discriminative}
    values = {method: run.summary.get("miou") or {"mean": None, "per_class": {}} for method, run in runs.items()}
    classes = dict.fromkeys(name for value in values.values() for name in value["per_class"])
    rows = []
    for name in classes:
        ious = {method: to_points(value["per_class"].get(name)) for method, value in values.items()}
        rows.append({"class": name, **ious, "kind": "class"})
    means = {method: to_points(value["mean"]) for method, value in values.items()}
    rows.append({"class": "mean", **means, "kind": "mean"})
    frame = parts.build_frame(rows).assign(scores="; ".join(str(run.path) for run in runs.values()))
    caption = f"Intersection over union per class and its mean (points), measured here on {parts.describe_study(params)}."
    columns = [Column("class", "Class", "text"), *_METHOD_COLUMNS]
    split = f"{scores.main.summary['split']} split{parts.describe_miou_part(params)}"
    notes = [
        f"{sentence(split)} Every class is a phrase of its own, "
        f"“{params.data.class_template}”, and a pixel takes the class with the highest score. The mean is over the classes "
        "that have ground truth."
    ]
    for column in _METHOD_COLUMNS:
        if interval := values[column.key].get("interval"):
            notes.append(f"{column.head}, mean: 95 % interval {interval_text(interval)}.")
    if comparison := scores.comparisons.get("main - discriminative (miou)"):
        notes.append(f"GS minus discriminative, mean: {difference_text(comparison)} points, paired bootstrap over images.")
    return Table("miou", caption, frame, columns, notes, group_by="kind")


def comparisons(params: Params, scores: StudyScores) -> Table:
    """List every paired comparison of the scores."""
    base = params.sample.base
    labels = {run.name: _cell_label(cell, base) for cell, run in scores.cells.items()}
    labels |= {f"readouts/{name}": f"read-out {name}" for name in scores.readouts}
    rows = []
    for key, value in scores.comparisons.items():
        pair, _, quantity = key.removesuffix(")").partition(" (")
        row = {"comparison": pair, "split": quantity or "overall", "n": value["n"]}
        row |= {name: to_points(value[name]) for name in ("difference", "ci_low", "ci_high")}
        rows.append(row | {"label": " − ".join(labels.get(name, name) for name in pair.split(" - "))})
    frame = parts.build_frame(rows).assign(scores=str(scores.folder / "comparisons.json"))
    miou, miou_and = (", mIoU", "miou and ") if params.score.miou else ("", "")
    caption = f"Paired differences of AR{miou} and calibration (points), on {parts.describe_study(params)}."
    columns = [
        Column("label", "Comparison", "text"),
        Column("split", "Quantity", "text"),
        Column("n", "n", "count"),
        Column("difference", "Difference", "signed"),
        Column("ci", "95 % CI", "interval"),
    ]
    note = (
        f"overall and things: AR on the n phrases that both runs share; {miou_and}ece (calibration error of soft maps): over "
        "the n images that both runs share. Paired bootstrap over images. Points are named by how they differ from base "
        f"({base})."
    )
    return Table("comparisons", caption, frame, columns, [note], small=True)


def _cell_label(cell: OperatingPoint, base: OperatingPoint) -> str:
    """Name a grid point by the settings in which it differs from base."""
    texts = {
        "size": f"size {cell.size}",
        "num_inference_steps": plural(cell.num_inference_steps, "step"),
        "guidance_scale": f"guidance {cell.guidance_scale:g}",
    }
    changed = [key for key in OperatingPoint.model_fields if getattr(cell, key) != getattr(base, key)]
    if not changed:
        return "base"
    return ", ".join(texts[key] for key in changed) if texts.keys() >= set(changed) else str(cell)
