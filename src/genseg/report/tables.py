"""The study's tables, from scores and published rows alone. AR, ceilings and differences are in points (percent)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from genseg.params import Cell, Params, Point
from genseg.report.render import DASH, Column, Table
from genseg.report.study import SPLITS, Scored, StudyScores, published_path, read_published

SOURCES = {
    "scenes": "generated scenes",
    "png": "COCO panoptic with narratives in the layout of PNG",
    "index_masks": "images with index masks, class names as phrases",
    "coco_object": "COCO-Object, class names as phrases",
}
OPTIONAL = ("miou", "refinement_controls", "refinement_sensitivity")
"""Tables that a study may not have."""
SHORT = {
    "cross_attention": "Cross-attention",
    "diffpng_cross": "DiffPNG, cross",
    "diffpng_cross_self": "DiffPNG + self",
    "diffseg": "DiffSeg (ours)",
    "inexact_scribble": "Hull of a scribble",
}
"""What print calls a baseline whose label is long."""
PUBLISHED_BASE = Cell(size=1024, steps=50, guidance=7.5)
"""What the paper's base row of Tables 3-5 was sampled with (its section 4.2)."""
EVALUATION = "An evaluation is one U-Net pass for one phrase; a step with classifier-free guidance takes two."

_WHOLE = ("n", "images", "evaluations", "size", "steps")
_AR = [Column(split, split, over="Average recall") for split in SPLITS]


def build_tables(params: Params, scores: StudyScores) -> list[Table]:
    """Every table of the study, in the order a reader meets them; `miou` only where class phrases were scored."""
    tables = [
        table2(params, scores),
        controls(params, scores),
        table3(params, scores),
        table4(params, scores),
        table5(params, scores),
        evaluations(params, scores),
        readouts(params, scores),
        ceilings(params, scores),
        breakdown(params, scores),
    ]
    if scores.main.summary.get("miou"):
        tables.append(miou(params, scores))
    return [*tables, comparisons(params, scores)]


# --------------------------------------------------------------------------------------------------------------- rows
def measured(params: Params, scored: Scored) -> dict[str, Any]:
    """Columns that every measured row has."""
    summary = scored.summary
    low, high = summary["interval"]["overall"] or (None, None)
    return {
        "source": "measured",
        "data": f"{params.study} ({params.data.source})",
        "protocol": summary["protocol"],
        "n": scored.phrases,
        "images": summary["counts"]["images"],
        "evaluations": summary["run"].get("evaluations"),
        **{split: points(summary["ar"][split]) for split in SPLITS},
        "ci_low": points(low),
        "ci_high": points(high),
        "boundary_iou": points(summary["boundary_iou"]["overall"]),
        "ceiling": points(summary["ceiling"]["overall"]),
        "ceiling_latent": points((summary["ceiling_latent"] or {}).get("overall")),
        "scores": str(scored.path),
    }


def difference(comparison: dict[str, Any], name: str = "difference") -> dict[str, Any]:
    return {
        f"{name}_n": comparison["n"],
        name: points(comparison["difference"]),
        f"{name}_low": points(comparison["ci_low"]),
        f"{name}_high": points(comparison["ci_high"]),
    }


def points(fraction: float | None) -> float | None:
    """A fraction in percent."""
    return None if fraction is None else 100 * fraction


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows with the given columns first; counts stay whole numbers where some are missing."""
    frame = pd.DataFrame(rows)
    frame = frame[columns + [name for name in frame.columns if name not in columns]]
    for name in frame.columns:
        if name in _WHOLE or name.endswith("_n"):
            frame[name] = frame[name].astype("Int64")
    return frame


# ----------------------------------------------------------------------------------------------------- captions, notes
def data(params: Params) -> str:
    return f"study {params.study} ({SOURCES[params.data.source]})"


def where(params: Params, scored: Scored) -> str:
    """On which data a number was measured, in words."""
    counts = scored.summary["counts"]
    return (
        f"{data(params)}, {scored.summary['split']} split, {counts['phrases']} phrases in {counts['images']} images, "
        f"protocol {scored.summary['protocol']}"
    )


def caution(params: Params) -> str:
    """What a reader must know before setting measured beside published rows."""
    if params.data.source == "png":
        return "Comparable with the published rows only if these are the files of the PNG benchmark, scored by its protocol."
    return "These are other data than those of the published rows, so the two are not comparable."


def _with_interval(comparison: dict[str, Any]) -> str:
    value = f"{100 * comparison['difference']:+.1f}"
    if comparison["ci_low"] is not None:
        value += f" {_interval([comparison['ci_low'], comparison['ci_high']])}"
    return value.replace("-", "−")


def _interval(found: list[float] | None) -> str:
    return DASH if found is None else f"[{100 * found[0]:.1f}, {100 * found[1]:.1f}]".replace("-", "−")


def _skipped(scored: Scored) -> str:
    """What the scorer reports of phrases that it could not score as usual; empty when there is nothing to say."""
    counts = scored.summary["counts"]
    told = {"missing": "without a prediction (IoU 0)", "empty_union": "with an empty union (a miss)", "left_out": "left out"}
    return ", ".join(f"{counts[key]} {text}" for key, text in told.items() if counts.get(key))


def _ceilings(scored: Scored) -> str:
    latent = (scored.summary["ceiling_latent"] or {}).get("overall")
    found = {
        "a perfect prediction scores": scored.summary["ceiling"]["overall"],
        "the ground truth at label-latent size": latent,
    }
    return ", ".join(f"{text} {100 * value:.1f}" for text, value in found.items() if value is not None)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


# ------------------------------------------------------------------------------------------------------------ Table 2
def table2(params: Params, scores: StudyScores) -> Table:
    """The paper's Table 2 and, apart, our rows on our data. Of imported methods nobody told what they are made of."""
    rows: list[dict[str, Any]] = [
        {**record, "shown": record["method"], "source": "published", "data": "PNG", "scores": str(published_path("table2"))}
        for record in read_published("table2")
    ]
    ours: dict[str, tuple[Scored, bool | None]] = {"GS": (scores.main, True), "Discriminative": (scores.discriminative, False)}
    real = [(scored, scored.summary["run"]) for scored in scores.baselines if scored.summary["run"]["real"]]
    ours |= {run["label"]: (scored, None if run["imported"] else True) for scored, run in real}
    imported = [run["label"] for _, run in real if run["imported"]]
    rows += [
        {
            "method": name,
            "shown": SHORT.get(Path(scored.name).name, name),
            "venue": "imported" if name in imported else "this study",
            "diffusion": diffusion,
            "ps_pretrain": None if name in imported else False,
            **measured(params, scored),
        }
        for name, (scored, diffusion) in ours.items()
    ]
    run = scores.main.summary["run"]
    facts = {
        name: [f"95 % interval {_interval(scored.summary['interval']['overall'])}", _ceilings(scored), _skipped(scored)]
        for name, (scored, _) in ours.items()
        if scored.phrases
    }
    return Table(
        name="table2",
        caption=f"Average recall (points): published on the PNG benchmark, and measured here on {data(params)}.",
        frame=_frame(rows, ["method", "venue", "diffusion", "ps_pretrain", "source", *SPLITS, "data", "protocol", "n"]),
        columns=[
            Column("shown", "Method", "text"),
            Column("venue", "Venue", "text"),
            Column("diffusion", "Diffusion", "flag"),
            Column("ps_pretrain", "P.S. Pretrain", "flag"),
            *_AR,
        ],
        group_by="source",
        groups={
            "published": "Published, on PNG (Table 2 of the GS paper)",
            "measured": f"Measured here, on {data(params)}, n = {scores.main.phrases}",
        },
        notes=[
            f"Measured on {where(params, scores.main)}. {caution(params)}",
            *(f"{name}, overall: {'; '.join(filter(None, texts))}." for name, texts in facts.items()),
            f"GS was sampled at {run['size']} × {run['size']} pixels (steps: {run['steps']}, guidance: {run['guidance']:g}, "
            f"evaluations per mask: {run['evaluations']}). {EVALUATION} Discriminative: a U-Net of the same size, "
            "data and budget that predicts the mask in one pass. Cross-attention, DiffPNG and DiffSeg: "
            "reimplemented here, on the study's backbone; how DiffSeg takes phrases is our adaptation."
            + (f" Masks that another program made, scored here: {', '.join(imported)}." if imported else ""),
        ],
    )


# --------------------------------------------------------------------------------------------------------- Tables 3-5
def table3(params: Params, scores: StudyScores) -> Table:
    return _ablation(params, scores, "table3", "size", "Image size", list(params.sample.grid.sizes), "image sizes")


def table4(params: Params, scores: StudyScores) -> Table:
    what = f"numbers of {params.sample.base.rule.upper()} steps"
    table = _ablation(params, scores, "table4", "steps", "Steps", list(params.sample.grid.steps), what)
    main, found = params.sample.main, scores.comparison(scores.main, scores.base())
    if found["n"]:
        table.notes.append(
            f"The study's main row (size {main.size}, {main.steps} steps, guidance {main.guidance:g}: {main.evaluations} "
            f"evaluations per mask) minus the base row: {_with_interval(found)} points on the {found['n']} phrases that both "
            "hold."
        )
    return table


def table5(params: Params, scores: StudyScores) -> Table:
    return _ablation(params, scores, "table5", "guidance", "Guidance", list(params.sample.grid.guidance), "guidance scales")


def _ablation(params: Params, scores: StudyScores, name: str, axis: str, head: str, values: list[Any], what: str) -> Table:
    """One coordinate of the base cell replaced by each of `values`, below the published rows of the same ablation."""
    published = f"{name}_{axis}"
    rows: list[dict[str, Any]] = []
    for record in read_published(published):
        cell = PUBLISHED_BASE.model_copy(update={axis: record[axis]})
        rows.append({**record, **cell.model_dump(), "evaluations": cell.evaluations, "source": "published"})
        rows[-1] |= {"data": "PNG, about 7 % of test", "scores": str(published_path(published))}
    base = params.sample.base
    for cell in dict.fromkeys([base, *(base.model_copy(update={axis: value}) for value in values)]):
        row = {**cell.model_dump(), **measured(params, scores.cells[cell])}
        rows.append(row if cell == base else row | difference(scores.comparison(scores.cells[cell], scores.base())))
    others = [key for key in Cell.model_fields if key != axis]
    return Table(
        name=name,
        caption=f"Average recall (points) over {what}: published on PNG, and GS measured here on {data(params)}.",
        frame=_frame(rows, [axis, *others, "source", *SPLITS, "n", "evaluations"]),
        columns=[
            Column(axis, head, "number"),
            *_AR,
            Column("n", "n", "count"),
            Column("evaluations", "Eval.", "count"),
            Column("ceiling_latent", "Ceiling"),
            Column("difference", "Δ", "signed"),
            Column("difference", "95 % CI", "interval"),
        ],
        group_by="source",
        groups={
            "published": "Published, on about 7 % of PNG's test set",
            "measured": f"Measured here, on {data(params)}, n = {scores.base().phrases}",
        },
        notes=[
            f"Measured on {where(params, scores.base())}: a fixed part of test. {caution(params)} Base row, first and "
            f"repeated in Tables 3 to 5: size {base.size}, {base.steps} steps, guidance {base.guidance:g}.",
            "Eval.: U-Net evaluations per mask, two for each step with guidance. Ceiling: overall AR of the ground truth at "
            "label-latent size, read bilinearly (native protocol). Δ: difference in overall AR from the base row, paired "
            "bootstrap over images.",
        ],
    )


# ------------------------------------------------------------------------------------------ evaluations, calibration
def evaluations(params: Params, scores: StudyScores) -> Table:
    """AR against evaluations per mask: the operating points on val, where one is chosen, and on the grid's part of test; the
    base row, with the paper's steps and guidance, among them."""
    base, ranked = params.sample.base, {point["scores"]: point for point in scores.ranking["points"]}
    rows = []
    for cell in sorted({base, *params.sample.operating_points()}, key=lambda cell: (cell.evaluations, str(cell))):
        scored, val = scores.cells[cell], scores.val.get(cell)
        roles = {"main": cell == params.sample.main, "base": cell == base}
        row: dict[str, Any] = {
            "point": str(Point.model_validate(cell.model_dump(exclude={"size"}))),
            "role": ", ".join(name for name, held in roles.items() if held),
            **cell.model_dump(),
            **measured(params, scored),
            "ece": points(_ece(scored)),
        }
        if val is not None:
            point = ranked[str(val.path)]
            row |= {f"val_{key}": points(point[key]) for key in ("ar", "ci_low", "ci_high", "best_ar", "ece")}
            row |= {"val_n": val.phrases, "val_threshold": point["best_threshold"], "val_scores": str(val.path)}
        rows.append(row if cell == base else row | difference(scores.comparison(scored, scores.base())))
    main, tried = scores.val[params.sample.main], len(scores.ranking["thresholds"])
    return Table(
        name="evaluations",
        caption=f"Average recall (points) against U-Net evaluations per mask, GS measured here on {data(params)}.",
        frame=_frame(rows, ["point", "role", "evaluations", "val_ar", "val_best_ar", "val_threshold", *SPLITS, "n"]),
        columns=[
            Column("point", "Operating point", "text"),
            Column("role", "", "text"),
            Column("evaluations", "Eval.", "count"),
            Column("val_ar", "Val"),
            Column("val_best_ar", "Val, best"),
            Column("val_threshold", "at", "number"),
            Column("overall", "Test"),
            Column("difference", "Δ", "signed"),
            Column("difference", "95 % CI", "interval"),
            Column("ece", "ECE"),
        ],
        notes=[
            f"Val: {main.phrases} phrases in {main.summary['counts']['images']} images, a fixed part of val; AR at the study's "
            f"threshold {params.sample.threshold:g}, and the best of {tried} thresholds (native protocol) with where it is "
            f"reached. Test: {where(params, scores.base())}, a fixed part. {_choice(params, scores)}",
            "Δ: difference in overall AR from base, paired bootstrap over images. ECE: expected calibration error of the soft "
            f"map's pixels in points, 15 bins. {EVALUATION} A mean of k samples takes k times as many.",
            *_calibration_facts(scores),
        ],
        small=True,
    )


def _ece(scored: Scored) -> float | None:
    return (scored.summary.get("calibration") or {}).get("ece")


def _choice(params: Params, scores: StudyScores) -> str:
    """Whether the main point is what val would choose for its cost."""
    ranking = scores.ranking
    if ranking["main_is_best_for_its_cost"]:
        return "The main point has the best AR on val among those that cost no more."
    cost = params.sample.main.evaluations
    name = next(entry["name"] for entry in ranking["best"] if entry["evaluations_at_most"] == cost)
    better = next(cell for cell, scored in scores.val.items() if scored.name == name)
    return f"Among the points that cost no more than the main one, {better} has a higher AR on val."


def _calibration_facts(scores: StudyScores) -> list[str]:
    """The soft mask of several seeds against one sample's."""
    facts = []
    for several, single in scores.ensembles():
        a, b = scores.cells[several], scores.cells[single]
        change = scores.comparisons.get(f"{a.name} - {b.name} (ece)")
        told = f" ({_with_interval(change)})" if change else ""
        errors = [f"{100 * (_ece(scored) or 0):.1f}" for scored in (a, b)]
        facts.append(
            f"{sentence(str(several))[:-1]}: expected calibration error {errors[0]} points against {errors[1]} of one sample"
            f"{told}; AR {_with_interval(scores.comparison(a, b))}."
        )
    return facts


# ------------------------------------------------------------------------------------------------- read-outs, controls
def readouts(params: Params, scores: StudyScores) -> Table:
    """The comparison of the paper's Fig. 4, as numbers; the study's own read-out first."""
    names = {"bilinear": "bilinear", "nearest": "nearest", "vae": "VAE decoding"}
    base, own = params.sample.base, names[params.sample.readout]
    found = [(names[name], scored) for name, scored in scores.readouts.items()]
    found.append((f"{own}, no CFG", scores.cells[base.model_copy(update={"guidance": 1.0})]))
    rows = [
        {"readout": name, **measured(params, scored)}
        | (difference(scores.comparison(scored, scores.base())) if scored is not scores.base() else {})
        for name, scored in found
    ]
    return Table(
        name="readouts",
        caption=f"Read-out of the label latent (the paper's Fig. 4 as numbers): AR (points), measured here on {data(params)}.",
        frame=_frame(rows, ["readout", "protocol", "n", "evaluations", *SPLITS, "boundary_iou"]),
        columns=[
            Column("readout", "Read-out", "text"),
            Column("evaluations", "Eval.", "count"),
            *_AR,
            Column("boundary_iou", "B. IoU"),
            Column("difference", "Δ", "signed"),
            Column("difference", "95 % CI", "interval"),
        ],
        notes=[
            f"Measured on {where(params, scores.base())}: a fixed part of test. Size {base.size}, {base.steps} steps, "
            f"guidance {base.guidance:g}. {sentence(_ceilings(scores.base()))}",
            f"Eval.: U-Net evaluations per mask. {EVALUATION} B. IoU: mean boundary IoU. "
            "Δ: difference in overall AR from the first row, paired bootstrap over images.",
        ],
    )


def controls(params: Params, scores: StudyScores) -> Table:
    """What GS owes to the text, to colour alone, and to being generative."""
    found = {
        "none": scores.main,
        "text_permuted": scores.text_permuted,
        "colour_threshold": scores.colour_threshold,
        "discriminative": scores.discriminative,
    }
    rows = []
    for name, scored in found.items():
        row = {"control": name, **measured(params, scored)}
        if scored is not scores.main:
            row |= difference(scores.comparison(scores.main, scored))
            row |= difference(scores.comparison(scores.main, scored, "things"), "difference_things")
        rows.append(row)
    return Table(
        name="controls",
        caption=f"Controls: average recall (points) of GS and of what it is checked against, measured here on {data(params)}.",
        frame=_frame(rows, ["control", "protocol", "n", *SPLITS]),
        columns=[
            Column("control", "Control", "text"),
            Column("n", "n", "count"),
            *_AR,
            Column("difference", "Δ all", "signed"),
            Column("difference", "95 % CI", "interval"),
            Column("difference_things", "Δ things", "signed"),
            Column("difference_things", "95 % CI", "interval"),
        ],
        notes=[
            f"Measured on {where(params, scores.main)}. {sentence(_ceilings(scores.main))}",
            "none: GS itself. text_permuted: GS given another phrase of the same image (a derangement among phrases whose "
            "ground truths differ; images with no such pair are left out). colour_threshold: colour histograms of the "
            "training phrases' words, thresholded on val. discriminative: a U-Net of the same size, data and budget that "
            "predicts the mask in one pass.",
            "Δ: AR of GS minus AR of the control, overall and of things, on the phrases that both hold, paired bootstrap over "
            "images.",
            *(f"{name}: {_skipped(scored)}." for name, scored in found.items() if _skipped(scored)),
        ],
        small=True,
    )


# ---------------------------------------------------------------------------------------------------- ceilings, parts
def ceilings(params: Params, scores: StudyScores) -> Table:
    """By protocol: what a perfect prediction scores, what the label latent allows, and what was reached."""
    rows = []
    for protocol in dict.fromkeys(protocol for _, protocol in scores.protocols):
        main, discriminative = scores.protocols["main", protocol], scores.protocols["discriminative", protocol]
        rows.append(_quantity(protocol, "perfect prediction", main, main.summary["ceiling"]))
        if protocol == "native":
            rows.append(_quantity(protocol, "ground truth at label-latent size", main, main.summary["ceiling_latent"]))
        rows.append(_quantity(protocol, "GS", main, main.summary["ar"]))
        rows.append(_quantity(protocol, "discriminative", discriminative, discriminative.summary["ar"]))
    return Table(
        name="ceilings",
        caption=f"Average recall (points) that each protocol allows, and that was reached, measured here on {data(params)}.",
        frame=_frame(rows, ["protocol", "quantity", "n", *SPLITS]),
        columns=[
            Column("protocol", "Protocol", "text"),
            Column("quantity", "Prediction", "text"),
            Column("n", "n", "count"),
            *_AR,
        ],
        group_by="protocol",
        notes=[
            f"Measured on {where(params, scores.main)} and, below it, under the other protocols.",
            "Ground truth at label-latent size: the mask reduced by area to the size of the latent that GS generates, and read "
            "bilinearly: what its resolution allows.",
        ],
    )


def _quantity(protocol: str, quantity: str, scored: Scored, values: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "quantity": quantity,
        "n": scored.phrases,
        **{split: points((values or {}).get(split)) for split in SPLITS},
        "source": "measured",
        "scores": str(scored.path),
    }


def breakdown(params: Params, scores: StudyScores) -> Table:
    """Overall AR by object size and by tag, and boundary IoU."""
    gs, discriminative = _parts(scores.main), _parts(scores.discriminative)
    rows = [
        {"part": part, "n": n, "gs": value, "discriminative": discriminative.get(part, (None, None))[1]}
        | {"scores": f"{scores.main.path}; {scores.discriminative.path}"}
        for part, (n, value) in gs.items()
    ]
    return Table(
        name="breakdown",
        caption=f"Overall average recall and boundary IoU (points) by part of the phrases, measured here on {data(params)}.",
        frame=_frame(rows, ["part", "n", "gs", "discriminative"]),
        columns=[
            Column("part", "Part", "text"),
            Column("n", "n", "count"),
            Column("gs", "GS"),
            Column("discriminative", "Discriminative"),
        ],
        notes=[
            f"Measured on {where(params, scores.main)}. Small, medium and large are COCO's areas (bounds 32² and 96² pixels of "
            "a 640 × 480 image), scaled with the image's area."
        ],
    )


def _parts(scored: Scored) -> dict[str, tuple[int | None, float | None]]:
    """Part of the test phrases -> (phrases in it where the scores say so, points)."""
    summary = scored.summary
    sizes = summary.get("ar_by_size") or {}
    tags = sorted((summary.get("tags") or {}).items())
    return {
        "all phrases": (scored.phrases, points(summary["ar"]["overall"])),
        **{f"{size} objects": (None, points(sizes.get(size))) for size in ("small", "medium", "large")},
        **{tag: (value["n"], points(value["overall"])) for tag, value in tags},
        "boundary IoU, all phrases": (scored.phrases, points(summary["boundary_iou"]["overall"])),
    }


def miou(params: Params, scores: StudyScores) -> Table:
    """mIoU over class phrases, per class and its mean."""
    sides = {"gs": scores.main, "discriminative": scores.discriminative}
    found = {side: scored.summary.get("miou") or {"mean": None, "per_class": {}} for side, scored in sides.items()}
    names = dict.fromkeys(name for value in found.values() for name in value["per_class"])
    origin = {"scores": "; ".join(str(scored.path) for scored in sides.values())}
    rows: list[dict[str, Any]] = [
        {"class": name, **{side: points(value["per_class"].get(name)) for side, value in found.items()}, "kind": "class"}
        | origin
        for name in names
    ]
    rows.append({"class": "mean", **{side: points(value["mean"]) for side, value in found.items()}, "kind": "mean"} | origin)
    return Table(
        name="miou",
        caption=f"Intersection over union per class and its mean (points), measured here on {data(params)}.",
        frame=_frame(rows, ["class", "gs", "discriminative"]),
        columns=[Column("class", "Class", "text"), Column("gs", "GS"), Column("discriminative", "Discriminative")],
        group_by="kind",
        notes=[
            f"{sentence(scores.main.summary['split'] + ' split')} Every class of the list is a phrase of its own, "
            f"“{params.data.class_template}”, and a pixel takes the class of the highest score. The mean "
            "is over the classes that have ground truth.",
            *_miou_facts(scores, found),
        ],
    )


def _miou_facts(scores: StudyScores, found: dict[str, dict[str, Any]]) -> list[str]:
    """Intervals of the mean, and of the difference between the two methods."""
    names = {"gs": "GS", "discriminative": "Discriminative"}
    facts = [
        f"{names[side]}, mean: 95 % interval {_interval(value['interval'])}."
        for side, value in found.items()
        if value.get("interval")
    ]
    compared = scores.comparisons.get("main - discriminative (miou)")
    if compared:
        facts.append(f"GS minus discriminative, mean: {_with_interval(compared)} points, paired bootstrap over images.")
    return facts


# -------------------------------------------------------------------------------------------------------- comparisons
def comparisons(params: Params, scores: StudyScores) -> Table:
    """Every paired comparison that was scored."""
    base = params.sample.base
    labels = {scored.name: _cell_label(cell, base) for cell, scored in scores.cells.items()}
    labels |= {f"readouts/{name}": f"read-out {name}" for name in scores.readouts}
    rows = []
    for key, value in scores.comparisons.items():
        pair, _, quantity = key.removesuffix(")").partition(" (")
        rows.append(
            {
                "comparison": pair,
                "split": quantity or "overall",
                "n": value["n"],
                "difference": points(value["difference"]),
                "ci_low": points(value["ci_low"]),
                "ci_high": points(value["ci_high"]),
                "label": " − ".join(labels.get(name, name) for name in pair.split(" - ")),
                "scores": str(scores.comparisons_path),
            }
        )
    return Table(
        name="comparisons",
        caption=f"Paired differences of AR, mIoU and calibration (points) with 95 % intervals, on {data(params)}.",
        frame=_frame(rows, ["comparison", "split", "n", "difference", "ci_low", "ci_high"]),
        columns=[
            Column("label", "Comparison", "text"),
            Column("split", "Of", "text"),
            Column("n", "n", "count"),
            Column("difference", "Difference", "signed"),
            Column("ci", "95 % CI", "interval"),
        ],
        notes=[
            "overall and things: AR on the phrases that both runs hold (n); miou and ece (calibration error of soft maps): "
            "over the same images (n). Paired bootstrap over images. A grid cell is named by what differs from base: size "
            f"{base.size}, {base.steps} steps, guidance {base.guidance:g}."
        ],
    )


def _cell_label(cell: Cell, base: Cell) -> str:
    parts = {"size": f"size {cell.size}", "steps": f"{cell.steps} steps", "guidance": f"guidance {cell.guidance:g}"}
    changed = [key for key in Cell.model_fields if getattr(cell, key) != getattr(base, key)]
    return (", ".join(parts[key] for key in changed) if parts.keys() >= set(changed) else str(cell)) or "base"
