"""Tables of the refinement: each baseline before and after G4Seg (ours), with controls, sensitivity and costs."""

from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import read_json
from genseg.artifacts.manifest import times_path
from genseg.params import Params
from genseg.report.render import Column, Table, difference_text, plural, to_points
from genseg.report.scores import RefinementScores
from genseg.report.tables.parts import MIOU_NOT_SCORED, SHORT_LABELS, build_frame, describe_miou_part, describe_study

G4SEG = "g4seg"
MEANS = {"all": "mean of all", "real": "mean of real baselines"}  # labels of the mean rows
CONTROLS = {  # how each control differs from G4Seg
    "alpha_zero": "generates without injecting the mask (alpha = 0), and therefore cuts the evidence at 0; for classes equal "
    "to G4Seg, because class evidence is generated without masks",
    "gate": "updates weighted by the discrepancy",
    "no_gate": "updates not weighted by the discrepancy",
    "no_choice": "cuts the evidence at 0 instead of where the generated image suggests",
    "no_generation": "generates nothing: uses the original's features only (F_g := F_o), cuts at 0, and has no class evidence",
    "as_summarised": "only the paper's mechanism: gated by the discrepancy, no choice of the cut, no competition of classes, "
    "bilinear read-out",
    "unconditioned": "compares with an image generated without a mask instead of with the original",
    "random": "the changes of G4Seg, redistributed at random within the same area",
    "crf": "only G4Seg's read-out: a dense CRF on the coarse masks",
    "trained": "a small network, trained on inexact ground truth of the training phrases",
}

_MIOU_COLUMNS = [
    Column("miou_before", "before", over="mIoU"),
    Column("miou_after", "after", over="mIoU"),
    Column("delta", "Δ", "signed", over="mIoU"),
    Column("ci", "95 % CI", "interval", over="mIoU"),
]
_AR_COLUMNS = [
    Column("ar_before", "before", over="AR"),
    Column("ar_after", "after", over="AR"),
    Column("ar_delta", "Δ", "signed", over="AR"),
]
_BOUNDARY_DELTA = Column("boundary_iou_delta", "B. IoU Δ", "signed")


# --------------------------------------------------------------------------------------------------------------- tables
def refinement_tables(params: Params, scores: RefinementScores) -> list[Table]:
    """Build `refinement`, and `refinement_controls` and `refinement_sensitivity` if the study has them."""
    refiners = list(dict.fromkeys(row["refiner"] for row in scores.refinement["rows"]))
    tables = [refinement(params, scores)]
    if controls := [refiner for refiner in refiners if refiner in CONTROLS]:
        tables.append(refinement_controls(params, scores, controls))
    if variants := [refiner for refiner in refiners if "=" in refiner]:
        tables.append(refinement_sensitivity(params, scores, variants))
    return tables


def refinement(params: Params, scores: RefinementScores) -> Table:
    """Compare every coarse mask before and after G4Seg (ours), with the means."""
    g4seg_rows = [row for row in scores.refinement["rows"] if row["refiner"] == G4SEG]
    passes = ", ".join(str(count) for count in sorted({row["passes"] for row in g4seg_rows}))
    notes = [
        f"Real: made without the ground truth. Forward passes of the U-Net per mask with G4Seg: {passes}. The G4Seg paper's "
        "results are not shown: only its published gains of +0.77 to +1.00 mIoU on three benchmarks are known here, and "
        "they are for other data and coarse masks."
    ]
    if params.score.miou and (best := [row for row in g4seg_rows if "best_before" in row["miou"]]):
        # This is not a result, because the threshold is chosen on the scored images. It shows the cost of the fixed threshold.
        values = [
            f"{row['label']} {100 * row['miou']['best_before']:.1f} at {row['miou']['best_threshold_before']:g}" for row in best
        ]
        notes.append(f"Coarse mIoU at the background threshold that is best on these images: {'; '.join(values)}.")
    halves = ["ar", "miou"] if params.score.miou else ["ar"]
    if methods := ", ".join(row["label"] for row in g4seg_rows if None in [row[half]["before"] for half in halves]):
        notes.append(f"{methods}: only class masks or only phrase masks were imported; means omit missing values.")

    caption = (
        "Coarse masks before and after G4Seg (ours, a reimplementation): "
        f"{'mIoU, ' if params.score.miou else ''}average recall and boundary IoU (points), "
        f"measured here on {_describe_subset(params, scores)}."
    )
    columns = [
        Column("shown", "Coarse masks", "text"),
        Column("real", "Real", "flag"),
        *_change_columns(params),
        Column("boundary_iou_before", "before", over="Boundary IoU"),
        Column("boundary_iou_after", "after", over="Boundary IoU"),
    ]
    notes = [_protocol_note(params, scores), *notes]
    frame = _build_frame(params, _refiner_rows(scores, G4SEG))
    return Table("refinement", caption, frame, columns, notes, group_by="kind", small=True)


def refinement_controls(params: Params, scores: RefinementScores, controls: list[str]) -> Table:
    """Compare the controls of G4Seg. The CSV has every row; only the means are printed."""
    frame = _build_frame(params, [{"control": name, **row} for name in controls for row in _refiner_rows(scores, name)])
    means = [mean for mean in scores.refinement["means"] if mean["refiner"] == G4SEG]
    gain, gain_label = _gain(params)
    gains = "; ".join(f"{MEANS[mean['over']]} {difference_text(mean[gain])}" for mean in means)
    subset = _describe_subset(params, scores)
    caption = f"Controls of G4Seg (ours): mean results over the coarse masks (points), measured here on {subset}."
    columns = [
        Column("control", "Control", "text"),
        Column("shown", "Mean", "text"),
        Column("baselines", "N", "count"),
        Column("passes", "Passes", "count"),
        *_change_columns(params),
        _BOUNDARY_DELTA,
    ]
    notes = [
        f"G4Seg itself, {gain_label}: {gains}. {_protocol_note(params, scores)} Single coarse masks: refinement_controls.csv.",
        " ".join(f"{name}: {CONTROLS[name]}." for name in controls),
        "N: number of baselines in the mean. Passes: forward passes of the U-Net per mask; measured seconds: "
        f"{costs_dir(params) / 'refinement_costs.md'}.",
    ]
    printed = frame["kind"] == "mean"
    return Table("refinement_controls", caption, frame, columns, notes, group_by="control", printed=printed, small=True)


def refinement_sensitivity(params: Params, scores: RefinementScores, variants: list[str]) -> Table:
    """Compare G4Seg with variants in which one constant is changed."""
    all_rows, refine = scores.refinement["rows"], params.refine
    baselines = list(dict.fromkeys(row["baseline"] for row in all_rows if row["refiner"] in variants))
    compared = [row for row in all_rows if row["baseline"] in baselines and row["refiner"] in (G4SEG, *variants)]
    rows = [
        {"changed": "unchanged" if row["refiner"] == G4SEG else row["refiner"].replace("=", " = "), **_row(scores, row)}
        for row in sorted(compared, key=lambda row: baselines.index(row["baseline"]))
    ]
    caption = f"Sensitivity of G4Seg (ours) to its constants (points), measured here on {_describe_subset(params, scores)}."
    columns = [Column("changed", "Changed", "text"), Column("passes", "Passes", "count")]
    columns += [*_change_columns(params), _BOUNDARY_DELTA]
    note = (
        f"Unchanged: alpha = {refine.alpha:g}, beta = {refine.beta:g}, timesteps {refine.timesteps}, "
        f"{plural(refine.iterations, 'iteration')}, layers {refine.layers}, cuts at 0 and at {refine.cut_quantiles}. "
        f"{_protocol_note(params, scores)}"
    )
    groups = {row["method"]: row["method"] for row in rows}
    frame = _build_frame(params, rows)
    return Table("refinement_sensitivity", caption, frame, columns, [note], group_by="method", groups=groups, small=True)


# ---------------------------------------------------------------------------------------------------------------- costs
def costs_dir(params: Params) -> Path:
    """Return the folder of the costs table. It is not below the results, because times differ between equal runs."""
    return params.work_dir / "tables"


def refinement_costs(params: Params, scores: RefinementScores) -> Table:
    """Compare each refiner's measured seconds per image, if there are any, and its gain."""
    # 1. Build one row per refiner and baseline, then one mean row per refiner.
    path = times_path(params, "refine")
    times = read_json(path) if path.exists() else {}
    gain, gain_label = _gain(params)
    frame = pd.DataFrame([_cost_row(times, row, gain) for row in scores.refinement["rows"]])
    means = pd.DataFrame([_mean_cost(refiner, members) for refiner, members in frame.groupby("refiner", sort=False)])
    frame = pd.concat([frame, means], ignore_index=True)

    # 2. Compute values per image, to three significant digits.
    for name, total in (("seconds_per_image", "seconds"), ("masks_per_image", "masks")):
        per_image = pd.to_numeric(frame[total]) / pd.to_numeric(frame["images"])
        frame[name] = [None if pd.isna(value) else float(f"{value:.3g}") for value in per_image]
    frame["scores"] = str(params.results_dir / "refined" / "manifest.json")

    # 3. Build the table; only the means are printed.
    timed_means = frame[(frame["kind"] == "mean") & (frame["baselines"] > 0)]
    devices = "; ".join(
        f"on {device} in blocks of {batch:g}: {', '.join(refiners)}"
        for (device, batch), refiners in timed_means.groupby(["device", "batch"], sort=False)["refiner"]
    )
    caption = (
        "Cost and gain of G4Seg (ours), its controls and its variants, mean over the coarse masks: seconds, and "
        f"{gain_label} (points), measured here on {_describe_subset(params, scores)}."
    )
    columns = [
        Column("refiner", "Refiner", "text"),
        Column("baselines", "N", "count"),
        Column("passes", "Passes per mask", "count"),
        Column("masks_per_image", "Masks per image", "number"),
        Column("seconds_per_image", "Seconds per image", "number"),
        Column("delta", gain_label, "signed"),
    ]
    note = (
        f"Measured {devices}. Masks from an earlier run keep the time of that run. The times cover all masks of an image, "
        "those of class phrases included if there are any, and reading and writing the masks, but not loading the networks. "
        "Class evidence is timed with the refiner that needs it first. N: number of baselines with a time. —: no time, for "
        "example for random, if it reuses the forward "
        "passes of G4Seg."
    )
    return Table("refinement_costs", caption, frame, columns, [note], printed=frame["kind"] == "mean")


def _cost_row(times: dict[str, Any], row: dict[str, Any], gain: str) -> dict[str, Any]:
    """Return the time and the `gain` of one refiner on one baseline. The time is null if a part of it was not measured."""
    unmeasured = dict.fromkeys(("seconds", "images", "masks", "device", "batch"))
    time = times.get(f"{row['refiner']}/{row['baseline']}", unmeasured)
    columns = {"refiner": row["refiner"], "method": row["label"], "baseline": row["baseline"], **time}
    columns |= {"delta": to_points(row[gain]["difference"]), "passes": row["passes"]}
    return columns | {"kind": "method", "baselines": 1}


def _mean_cost(refiner: Any, members: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over a refiner's timed rows."""
    timed = members.dropna(subset="seconds")
    means = {name: timed[name].mean() if len(timed) else None for name in ("seconds", "images", "masks", "delta")}
    columns = {"refiner": refiner, "method": "mean", "kind": "mean", "baselines": len(timed), **means}
    devices = {"device": ", ".join(dict.fromkeys(timed["device"])), "batch": timed["batch"].max()}
    return columns | devices | {"passes": members["passes"].iloc[0]}


# ----------------------------------------------------------------------------------------------------------------- rows
def _refiner_rows(scores: RefinementScores, refiner: str) -> list[dict[str, Any]]:
    """Return a refiner's rows: one per baseline, then the mean over all and the mean over those made without ground truth."""
    rows = [_row(scores, row) for row in scores.refinement["rows"] if row["refiner"] == refiner]
    for mean in scores.refinement["means"]:
        if mean["refiner"] == refiner:
            labels = {"label": MEANS[mean["over"]], "baseline": mean["over"], "real": mean["over"] == "real"}
            row = _row(scores, mean | labels | {"passes": rows[0]["passes"]})
            rows.append(row | {"kind": "mean", "baselines": len(mean["baselines"])})
    return rows


def _row(scores: RefinementScores, row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of one row of `refinement.json`, in points. The mIoU difference and its interval have no prefix."""
    counts = scores.refinement["counts"]
    return {
        "method": row["label"],
        "real": row["real"],
        **_changes(row["miou"], "miou_", ""),
        "shown": SHORT_LABELS.get(row["baseline"], row["label"]),
        **_changes(row["ar"], "ar_", "ar_"),
        **_changes(row["boundary_iou"], "boundary_iou_", "boundary_iou_"),
        "miou_best_before": to_points(row["miou"].get("best_before")),
        "baseline": row["baseline"],
        "passes": row["passes"],
        "kind": "method",
        "baselines": 1,
        "source": "measured",
        "n": counts["phrases"],
        "images": counts["images"],
        "scores": str(scores.folder / "refinement.json"),
    }


def _changes(change: dict[str, Any], prefix: str, difference_prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": to_points(change[key]) for key in ("before", "after")} | {
        f"{difference_prefix}{name}": to_points(change[key])
        for key, name in (("difference", "delta"), ("ci_low", "ci_low"), ("ci_high", "ci_high"))
    }


def _build_frame(params: Params, rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = build_frame(rows)
    unscored = [] if params.score.miou else ["miou_before", "miou_after", "delta", "ci_low", "ci_high"]
    return frame.drop(columns=[*unscored, *(["miou_best_before"] if frame["miou_best_before"].isna().all() else [])])


def _change_columns(params: Params) -> list[Column]:
    """Return the columns of the changes of mIoU, if it is scored, and of AR."""
    return [*_MIOU_COLUMNS, *_AR_COLUMNS] if params.score.miou else _AR_COLUMNS


def _gain(params: Params) -> tuple[str, str]:
    """Return the quantity whose difference is the gain of a refiner, and its label: mIoU, or AR if mIoU is not scored."""
    return ("miou", "Δ mIoU") if params.score.miou else ("ar", "Δ AR")


# --------------------------------------------------------------------------------------------------- captions and notes
def _describe_subset(params: Params, scores: RefinementScores) -> str:
    counts = scores.refinement["counts"]
    return f"{describe_study(params)}, {plural(counts['images'], 'image')} of test with {plural(counts['phrases'], 'phrase')}"


def _protocol_note(params: Params, scores: RefinementScores) -> str:
    """Describe the images, the background rule, and what is refined and compared."""
    fraction, threshold = params.refine.test_fraction, scores.refinement["background_threshold"]
    subset = "all of test" if fraction == 1 else f"a fixed part of test ({fraction:g} of its images, chosen by hash)"
    rule = "none, because the data have no background class"
    if threshold is not None:
        rule = f"threshold {threshold:g} of soft maps, or the rule of the import, fixed before refinement"
    miou = (
        f"mIoU{describe_miou_part(params)}: class phrases “{params.data.class_template}”, one confusion matrix at native size; "
        f"background rule: {rule}. The classes of an image compete in refinement."
    )
    return (
        f"On {subset}. {miou if params.score.miou else MIOU_NOT_SCORED} "
        f"AR and boundary IoU: phrases, protocol {scores.refinement['protocol']}. Δ: after minus before, paired bootstrap over "
        "images; the rows of a mean share the resampled images."
    )
