"""Checks of the main result: controls, ceilings, breakdown by part, mIoU, and all paired comparisons."""

from __future__ import annotations

from typing import Any

from genseg.params import Cell, Params
from genseg.report.render import Column, Table
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts
from genseg.report.text import difference_text, interval_text, plural, sentence, to_points


# ------------------------------------------------------------------------------------------------------------- controls
def controls(params: Params, scores: StudyScores) -> Table:
    """Show how much of the AR of GS is due to the text, to colour alone, and to generation."""
    runs = {
        "none": scores.main,
        "text_permuted": scores.text_permuted,
        "colour_threshold": scores.colour_threshold,
        "discriminative": scores.discriminative,
    }
    rows = []
    for name, run in runs.items():
        row = {"control": name, **parts.measured_columns(params, run)}
        if run is not scores.main:
            row |= parts.difference_columns(scores.comparison(scores.main, run))
            row |= parts.difference_columns(scores.comparison(scores.main, run, "things"), "difference_things")
        rows.append(row)
    return Table(
        name="controls",
        caption=f"Average recall (points) of GS and of its controls, measured here on {parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["control", "protocol", "n", *SPLITS]),
        columns=[
            Column("control", "Control", "text"),
            Column("n", "n", "count"),
            *parts.AR_COLUMNS,
            Column("difference", "Δ all", "signed"),
            Column("difference", "95 % CI", "interval"),
            Column("difference_things", "Δ things", "signed"),
            Column("difference_things", "95 % CI", "interval"),
        ],
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.main)}. {sentence(parts.describe_ceilings(scores.main))}",
            "none: GS itself. text_permuted: GS given another phrase of the same image (a derangement of phrases whose "
            "ground truths differ; images with no such pair are left out). colour_threshold: colour histograms of the "
            "training phrases' words, with a threshold chosen on val. discriminative: a U-Net of the same size, data and "
            "training budget that predicts the mask in one forward pass.",
            "Δ: AR of GS minus AR of the control, overall and for things, on the phrases that both runs share, paired "
            "bootstrap over images.",
            *(f"{name}: {parts.describe_skipped(run)}." for name, run in runs.items() if parts.describe_skipped(run)),
        ],
        small=True,
    )


# -------------------------------------------------------------------------------------------------- ceilings, breakdown
def ceilings(params: Params, scores: StudyScores) -> Table:
    """Compare, for each protocol, the measured AR with that of a perfect prediction and of the label latent's resolution."""
    rows = []
    for protocol in dict.fromkeys(protocol for _, protocol in scores.protocols):
        main, discriminative = scores.protocols["main", protocol], scores.protocols["discriminative", protocol]
        rows.append(_ceiling_row(protocol, "perfect prediction", main, main.summary["ceiling"]))
        if protocol == "native":
            rows.append(_ceiling_row(protocol, "ground truth at label-latent size", main, main.summary["ceiling_latent"]))
        rows.append(_ceiling_row(protocol, "GS", main, main.summary["ar"]))
        rows.append(_ceiling_row(protocol, "discriminative", discriminative, discriminative.summary["ar"]))
    return Table(
        name="ceilings",
        caption=f"Highest possible and measured average recall (points) of each protocol, on {parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["protocol", "quantity", "n", *SPLITS]),
        columns=[
            Column("protocol", "Protocol", "text"),
            Column("quantity", "Prediction", "text"),
            Column("n", "n", "count"),
            *parts.AR_COLUMNS,
        ],
        group_by="protocol",
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.main)}; the groups below use the other protocols.",
            "Ground truth at label-latent size: the mask reduced by area averaging to the size of the latent that GS "
            "generates, and read bilinearly. It is the highest AR that this resolution allows.",
        ],
    )


def _ceiling_row(protocol: str, quantity: str, run: ScoredRun, values: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "quantity": quantity,
        "n": run.phrases,
        **{split: to_points((values or {}).get(split)) for split in SPLITS},
        "source": "measured",
        "scores": str(run.path),
    }


def breakdown(params: Params, scores: StudyScores) -> Table:
    """Break overall AR down by object size and by tag, and add boundary IoU."""
    gs, discriminative = _part_values(scores.main), _part_values(scores.discriminative)
    origin = f"{scores.main.path}; {scores.discriminative.path}"
    rows = [
        {"part": part, "n": n, "gs": ar, "discriminative": discriminative.get(part, (None, None))[1], "scores": origin}
        for part, (n, ar) in gs.items()
    ]
    return Table(
        name="breakdown",
        caption="Overall average recall and boundary IoU (points) by part of the phrases, measured here on "
        f"{parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["part", "n", "gs", "discriminative"]),
        columns=[
            Column("part", "Part", "text"),
            Column("n", "n", "count"),
            Column("gs", "GS"),
            Column("discriminative", "Discriminative"),
        ],
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.main)}. Small, medium and large are COCO's areas (bounds "
            "32² and 96² pixels of a 640 × 480 image), scaled with the image's area."
        ],
    )


def _part_values(run: ScoredRun) -> dict[str, tuple[int | None, float | None]]:
    """Return part of the phrases -> (number of its phrases, if the scores give it, and its AR in points)."""
    summary = run.summary
    sizes = summary.get("ar_by_size") or {}
    tags = sorted((summary.get("tags") or {}).items())
    return {
        "all phrases": (run.phrases, to_points(summary["ar"]["overall"])),
        **{f"{size} objects": (None, to_points(sizes.get(size))) for size in ("small", "medium", "large")},
        **{tag: (value["n"], to_points(value["overall"])) for tag, value in tags},
        "boundary IoU, all phrases": (run.phrases, to_points(summary["boundary_iou"]["overall"])),
    }


# ----------------------------------------------------------------------------------------------------------------- mIoU
def miou(params: Params, scores: StudyScores) -> Table:
    """Show the IoU of every class and the mean, from class phrases."""
    runs = {"gs": scores.main, "discriminative": scores.discriminative}
    values = {method: run.summary.get("miou") or {"mean": None, "per_class": {}} for method, run in runs.items()}
    classes = dict.fromkeys(name for value in values.values() for name in value["per_class"])
    origin = "; ".join(str(run.path) for run in runs.values())
    rows: list[dict[str, Any]] = [
        {
            "class": name,
            **{method: to_points(value["per_class"].get(name)) for method, value in values.items()},
            "kind": "class",
            "scores": origin,
        }
        for name in classes
    ]
    means = {method: to_points(value["mean"]) for method, value in values.items()}
    rows.append({"class": "mean", **means, "kind": "mean", "scores": origin})
    return Table(
        name="miou",
        caption=f"Intersection over union per class and its mean (points), measured here on {parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["class", "gs", "discriminative"]),
        columns=[Column("class", "Class", "text"), Column("gs", "GS"), Column("discriminative", "Discriminative")],
        group_by="kind",
        notes=[
            f"{sentence(scores.main.summary['split'] + ' split')} Every class is a phrase of its own, "
            f"“{params.data.class_template}”, and a pixel takes the class with the highest score. The mean is over the "
            "classes that have ground truth.",
            *_miou_notes(scores, values),
        ],
    )


def _miou_notes(scores: StudyScores, values: dict[str, dict[str, Any]]) -> list[str]:
    """Give the intervals of the means, and the difference between the two methods."""
    names = {"gs": "GS", "discriminative": "Discriminative"}
    notes = [
        f"{names[method]}, mean: 95 % interval {interval_text(value['interval'])}."
        for method, value in values.items()
        if value.get("interval")
    ]
    comparison = scores.comparisons.get("main - discriminative (miou)")
    if comparison:
        notes.append(f"GS minus discriminative, mean: {difference_text(comparison)} points, paired bootstrap over images.")
    return notes


# ---------------------------------------------------------------------------------------------------------- comparisons
def comparisons(params: Params, scores: StudyScores) -> Table:
    """List every paired comparison of the scores."""
    base = params.sample.base
    labels = {run.name: _cell_label(cell, base) for cell, run in scores.cells.items()}
    labels |= {f"readouts/{name}": f"read-out {name}" for name in scores.readouts}
    rows = []
    for key, value in scores.comparisons.items():
        pair, _, quantity = key.removesuffix(")").partition(" (")
        rows.append(
            {
                "comparison": pair,
                "split": quantity or "overall",
                "n": value["n"],
                "difference": to_points(value["difference"]),
                "ci_low": to_points(value["ci_low"]),
                "ci_high": to_points(value["ci_high"]),
                "label": " − ".join(labels.get(name, name) for name in pair.split(" - ")),
                "scores": str(scores.comparisons_path),
            }
        )
    return Table(
        name="comparisons",
        caption=f"Paired differences of AR, mIoU and calibration (points), on {parts.describe_study(params)}.",
        frame=parts.build_frame(rows, ["comparison", "split", "n", "difference", "ci_low", "ci_high"]),
        columns=[
            Column("label", "Comparison", "text"),
            Column("split", "Of", "text"),
            Column("n", "n", "count"),
            Column("difference", "Difference", "signed"),
            Column("ci", "95 % CI", "interval"),
        ],
        notes=[
            "overall and things: AR on the n phrases that both runs share; miou and ece (calibration error of soft maps): "
            "over the n images that both runs share. Paired bootstrap over images. A grid cell is named by its differences "
            f"from base ({parts.describe_cell(base)})."
        ],
    )


def _cell_label(cell: Cell, base: Cell) -> str:
    """Name a cell by the settings in which it differs from base."""
    texts = {
        "size": f"size {cell.size}",
        "steps": plural(cell.steps, "step"),
        "guidance": f"guidance {cell.guidance:g}",
    }
    changed = [key for key in Cell.model_fields if getattr(cell, key) != getattr(base, key)]
    if not changed:
        return "base"
    return ", ".join(texts[key] for key in changed) if texts.keys() >= set(changed) else str(cell)
