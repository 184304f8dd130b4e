"""Tables of the refinement: each baseline before and after G4Seg (ours), with controls, sensitivity and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from genseg.params import Params
from genseg.report.render import Column, Table
from genseg.report.scores import StudyScores
from genseg.report.tables.parts import SHORT_LABELS, build_frame, describe_study
from genseg.report.text import difference_text, plural, to_points

G4SEG = "g4seg"
MEANS = {"all": "mean of all", "real": "mean of the real ones"}
"""Labels of the mean rows."""
FIRST_COLUMNS = ("method", "real", "miou_before", "miou_after", "delta", "ci_low", "ci_high")
CONTROLS = {
    "alpha_zero": "generates without injecting the mask (alpha = 0), and therefore without the choice",
    "gate": "updates weighted by the discrepancy",
    "no_gate": "updates not weighted by the discrepancy",
    "no_choice": "the evidence is cut at 0 and not where the generated image suggests",
    "no_generation": "generates nothing: features of the original alone (F_g := F_o), cut at 0",
    "upsampling_only": "no iteration, only the edge-aware read-out",
    "unconditioned": "compares with an image generated without a mask and not with the original",
    "random": "the changes of G4Seg, redistributed at random within the same area",
    "crf": "dense CRF in place of G4Seg",
    "g4seg_crf": "dense CRF on the masks of G4Seg",
    "trained": "a small network, trained on the training phrases' ground truth made inexact",
}
"""The difference of each control from G4Seg."""

_CHANGE_COLUMNS = [
    Column("miou_before", "before", over="mIoU"),
    Column("miou_after", "after", over="mIoU"),
    Column("delta", "Δ", "signed", over="mIoU"),
    Column("ci", "95 % CI", "interval", over="mIoU"),
    Column("ar_before", "before", over="AR"),
    Column("ar_after", "after", over="AR"),
    Column("ar_delta", "Δ", "signed", over="AR"),
]
_BOUNDARY_DELTA = Column("boundary_iou_delta", "B. IoU Δ", "signed")


def refinement_tables(params: Params, scores: StudyScores) -> list[Table]:
    """Build `refinement`, and `refinement_controls` and `refinement_sensitivity` if the study has them."""
    names = {row["refiner"] for row in scores.refinement["rows"]}
    tables = [refinement(params, scores)]
    if names & CONTROLS.keys():
        tables.append(refinement_controls(params, scores))
    if any("=" in name for name in names):
        tables.append(refinement_sensitivity(params, scores))
    return tables


# --------------------------------------------------------------------------------------------------------------- tables
def refinement(params: Params, scores: StudyScores) -> Table:
    """Compare every coarse mask before and after G4Seg (ours), with the means."""
    rows = _refiner_rows(scores, G4SEG)
    return Table(
        name="refinement",
        caption="Coarse masks before and after G4Seg (ours, a reimplementation): mIoU, average recall and boundary IoU "
        f"(points), measured here on {_describe_subset(params, scores)}.",
        frame=_build_frame(rows, list(FIRST_COLUMNS)),
        columns=[
            Column("shown", "Coarse masks", "text"),
            Column("real", "Real", "flag"),
            *_CHANGE_COLUMNS,
            Column("boundary_iou_before", "before", over="Boundary IoU"),
            Column("boundary_iou_after", "after", over="Boundary IoU"),
        ],
        group_by="kind",
        notes=[
            _protocol_note(params, scores),
            f"Real: made without the ground truth. {_passes_note(scores)} The G4Seg paper's rows cannot be given: all that is "
            "known of its numbers are gains of +0.77 to +1.00 mIoU on three benchmarks (published), on other data and coarse "
            "masks.",
            *_best_threshold_notes(scores),
            *_missing_values_notes(rows),
        ],
        small=True,
    )


def refinement_controls(params: Params, scores: StudyScores) -> Table:
    """Compare the controls of G4Seg. The CSV has every row; only the means are printed."""
    names = [name for name in dict.fromkeys(row["refiner"] for row in scores.refinement["rows"]) if name in CONTROLS]
    rows = [{"control": name, **row} for name in names for row in _refiner_rows(scores, name)]
    frame = _build_frame(rows, ["control", *FIRST_COLUMNS])
    g4seg_gains = "; ".join(
        f"{MEANS[mean['over']]} {difference_text(mean['miou'])}"
        for mean in scores.refinement["means"]
        if mean["refiner"] == G4SEG
    )
    return Table(
        name="refinement_controls",
        caption="Controls of G4Seg (ours): mean results over the coarse masks (points), measured here on "
        f"{_describe_subset(params, scores)}.",
        frame=frame,
        columns=[
            Column("control", "Control", "text"),
            Column("shown", "Mean", "text"),
            Column("baselines", "of", "count"),
            Column("passes", "Passes", "count"),
            *_CHANGE_COLUMNS,
            _BOUNDARY_DELTA,
        ],
        group_by="control",
        printed=frame["kind"] == "mean",
        notes=[
            f"G4Seg itself, Δ mIoU: {g4seg_gains}. {_protocol_note(params, scores)} Rows of single coarse masks: "
            "refinement_controls.csv.",
            " ".join(f"{name}: {CONTROLS[name]}." for name in names),
            "of: number of methods in the mean. Passes: forward passes of the U-Net per mask; "
            f"measured seconds: {costs_dir(params) / 'refinement_costs.md'}.",
        ],
        small=True,
    )


def refinement_sensitivity(params: Params, scores: StudyScores) -> Table:
    """Compare G4Seg with variants in which one constant is changed."""
    all_rows = scores.refinement["rows"]
    variants = {row["refiner"] for row in all_rows if "=" in row["refiner"]}
    baselines = dict.fromkeys(row["baseline"] for row in all_rows if row["refiner"] in variants)
    rows = []
    for baseline in baselines:
        for row in all_rows:
            if row["baseline"] == baseline and row["refiner"] in (G4SEG, *variants):
                change = "unchanged" if row["refiner"] == G4SEG else row["refiner"].replace("=", " = ")
                rows.append({"changed": change, **_row(scores, row)})
    refine = params.refine
    return Table(
        name="refinement_sensitivity",
        caption=f"Sensitivity of G4Seg (ours) to its constants (points), measured here on {_describe_subset(params, scores)}.",
        frame=_build_frame(rows, ["changed", *FIRST_COLUMNS]),
        columns=[
            Column("changed", "Changed", "text"),
            Column("passes", "Passes", "count"),
            *_CHANGE_COLUMNS,
            _BOUNDARY_DELTA,
        ],
        group_by="method",
        groups={row["method"]: row["method"] for row in rows},
        notes=[
            f"Unchanged: alpha = {refine.alpha:g}, beta = {refine.beta:g}, timesteps {refine.timesteps}, "
            f"{plural(refine.iterations, 'iteration')}, layers {refine.layers}, cuts at 0 and the quantiles {refine.levels}. "
            f"{_protocol_note(params, scores)}"
        ],
        small=True,
    )


# ---------------------------------------------------------------------------------------------------------------- costs
def costs_dir(params: Params) -> Path:
    """Return the folder of the costs table, outside of the results because times differ between runs."""
    return params.work_dir / "tables"


def refinement_costs(params: Params, scores: StudyScores, manifest: dict[str, Any]) -> Table:
    """Compare the seconds per image and the gain of each refiner, using the times in the manifest of refinement.

    Refiners without a time have an empty cell, e.g. the random control when it is made from the forward passes of G4Seg.
    All other tables are the same bytes in every run that makes the same masks; this one is not, hence `costs_dir`.
    """
    # 1. One row per refiner and baseline, then one mean per refiner.
    timing = manifest.get("timing", {})
    frame = pd.DataFrame([_cost_row(timing, row) for row in scores.refinement["rows"]])
    means = pd.DataFrame([_mean_cost(refiner, members) for refiner, members in frame.groupby("refiner", sort=False)])
    frame = pd.concat([frame, means], ignore_index=True)

    # 2. Values per image, to three significant digits.
    for name, total in (("seconds_per_image", "seconds"), ("masks_per_image", "masks")):
        per_image = pd.to_numeric(frame[total]) / pd.to_numeric(frame["images"])
        frame[name] = [None if pd.isna(value) else float(f"{value:.3g}") for value in per_image]
    frame["scores"] = str(params.results_dir / "refined" / "manifest.json")

    # 3. The table; only the means are printed.
    timed_means = frame[(frame["kind"] == "mean") & (frame["baselines"] > 0)]
    devices = "; ".join(
        f"on {device} in blocks of {batch:g}: {', '.join(refiners)}"
        for (device, batch), refiners in timed_means.groupby(["device", "batch"], sort=False)["refiner"]
    )
    return Table(
        name="refinement_costs",
        caption="Cost and gain of G4Seg (ours), its controls and its variants, mean over the coarse masks: seconds, and Δ mIoU "
        f"(points), measured here on {_describe_subset(params, scores)}.",
        frame=frame,
        columns=[
            Column("refiner", "Refiner", "text"),
            Column("baselines", "of", "count"),
            Column("passes", "Passes per mask", "count"),
            Column("masks_per_image", "Masks per image", "number"),
            Column("seconds_per_image", "Seconds per image", "number"),
            Column("delta", "Δ mIoU", "signed"),
        ],
        printed=frame["kind"] == "mean",
        notes=[
            f"Measured {devices}. Masks from an earlier run keep the time of that run. The times cover all masks of an image, "
            "for phrases and class phrases, including reading and writing the masks but not loading the networks. g4seg_crf: "
            "G4Seg and the CRF together. of: number of coarse masks with a time. —: no time, as for random when it is made "
            "from the forward passes of G4Seg."
        ],
    )


def _cost_row(timing: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the time and the gain of one refiner on one baseline."""
    return {
        "refiner": row["refiner"],
        "method": row["label"],
        "baseline": row["baseline"],
        **_measured_time(timing, row["refiner"], row["baseline"]),
        "delta": to_points(row["miou"]["difference"]),
        "passes": row["passes"],
        "kind": "method",
        "baselines": 1,
    }


def _measured_time(timing: dict[str, Any], refiner: str, baseline: str) -> dict[str, Any]:
    """Return seconds, masks, images, device and batch of one refiner on one baseline; all null if a part was not timed."""
    names = (G4SEG, refiner) if refiner == "g4seg_crf" else (refiner,)
    times = [timing[f"{name}/{baseline}"] for name in names if f"{name}/{baseline}" in timing]
    if len(times) < len(names):
        return dict.fromkeys(("seconds", "images", "masks", "device", "batch"))
    return times[0] | {"seconds": sum(time["seconds"] for time in times)}


def _mean_cost(refiner: Any, members: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over a refiner's timed rows."""
    timed = members.dropna(subset="seconds")
    means = {name: timed[name].mean() if len(timed) else None for name in ("seconds", "images", "masks", "delta")}
    return {
        "refiner": refiner,
        "method": "mean",
        "kind": "mean",
        "baselines": len(timed),
        "passes": members["passes"].iloc[0],
        **means,
        "device": ", ".join(dict.fromkeys(timed["device"])),
        "batch": timed["batch"].max(),
    }


# ----------------------------------------------------------------------------------------------------------------- rows
def _refiner_rows(scores: StudyScores, refiner: str) -> list[dict[str, Any]]:
    """Return a refiner's rows: one per baseline, then the mean over all and the mean over the real ones."""
    rows = [_row(scores, row) for row in scores.refinement["rows"] if row["refiner"] == refiner]
    for mean in scores.refinement["means"]:
        if mean["refiner"] == refiner:
            labels = {"label": MEANS[mean["over"]], "baseline": mean["over"], "real": mean["over"] == "real"}
            row = _row(scores, mean | labels | {"passes": rows[0]["passes"]})
            rows.append(row | {"kind": "mean", "baselines": len(mean["baselines"])})
    return rows


def _row(scores: StudyScores, row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of one row of `refinement.json`, in points. The mIoU columns of the change have no prefix."""
    columns: dict[str, Any] = {
        "method": row["label"],
        "real": row["real"],
        "shown": SHORT_LABELS.get(row["baseline"], row["label"]),
    }
    for name in ("miou", "ar", "boundary_iou"):
        value, prefix = row[name], "" if name == "miou" else f"{name}_"
        columns[f"{name}_before"] = to_points(value["before"])
        columns[f"{name}_after"] = to_points(value["after"])
        columns[f"{prefix}delta"] = to_points(value["difference"])
        columns[f"{prefix}ci_low"] = to_points(value["ci_low"])
        columns[f"{prefix}ci_high"] = to_points(value["ci_high"])
    counts = scores.refinement["counts"]
    return columns | {
        "miou_best_before": to_points(row["miou"].get("best_before")),
        "baseline": row["baseline"],
        "passes": row["passes"],
        "kind": "method",
        "baselines": 1,
        "source": "measured",
        "n": counts["phrases"],
        "images": counts["images"],
        "scores": str(scores.refinement_path),
    }


def _build_frame(rows: list[dict[str, Any]], first: list[str]) -> pd.DataFrame:
    frame = build_frame(rows, first)
    return frame.drop(columns="miou_best_before") if frame["miou_best_before"].isna().all() else frame


# --------------------------------------------------------------------------------------------------- captions and notes
def _describe_subset(params: Params, scores: StudyScores) -> str:
    counts = scores.refinement["counts"]
    return f"{describe_study(params)}, {plural(counts['images'], 'image')} of test with {plural(counts['phrases'], 'phrase')}"


def _protocol_note(params: Params, scores: StudyScores) -> str:
    """Describe the images, the background rule, and what is refined and compared."""
    subset = "all of test"
    if params.refine.test_fraction != 1:
        subset = f"a fixed part of test ({params.refine.test_fraction:g} of its images, chosen by hash)"
    threshold = scores.refinement["background_threshold"]
    rule = "none, the data have no background class"
    if threshold is not None:
        rule = f"threshold {threshold:g}, frozen before refinement"
    return (
        f"On {subset}. mIoU: class phrases “{params.data.class_template}”, one confusion matrix at native size; background "
        f"rule: {rule}. The labelling is refined class by class, and each pixel takes the class with the highest refined P. "
        f"AR and boundary IoU: phrases, protocol {scores.refinement['protocol']}. Δ: after minus before, paired bootstrap over "
        "images, jointly for a mean."
    )


def _passes_note(scores: StudyScores) -> str:
    counts = sorted({row["passes"] for row in scores.refinement["rows"] if row["refiner"] == G4SEG})
    return f"Forward passes of the U-Net per mask with G4Seg: {', '.join(map(str, counts))}."


def _best_threshold_notes(scores: StudyScores) -> list[str]:
    """Give the coarse masks' mIoU at the background threshold that is best on the same images.

    The threshold was chosen on the scored images, so this is not a result; it shows what the frozen threshold costs.
    """
    values = [
        f"{row['label']} {100 * row['miou']['best_before']:.1f} at {row['miou']['best_threshold_before']:g}"
        for row in scores.refinement["rows"]
        if row["refiner"] == G4SEG and "best_before" in row["miou"]
    ]
    if not values:
        return []
    return [f"Coarse mIoU at the background threshold that is best on these images: {'; '.join(values)}."]


def _missing_values_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Name the methods that have only class masks or only phrase masks."""
    methods = [
        row["method"] for row in rows if row["kind"] == "method" and (row["ar_before"] is None or row["miou_before"] is None)
    ]
    if not methods:
        return []
    return [f"{', '.join(methods)}: only class masks or only phrase masks were imported; a mean covers the rows with a value."]
