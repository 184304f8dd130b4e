"""Tables of the refinement: every baseline before and after G4Seg (ours), beside its controls, and how sensitive it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from genseg.params import Params
from genseg.report.render import Column, Table
from genseg.report.study import StudyScores
from genseg.report.tables import SHORT, data, points

G4SEG = "g4seg"
OVER = {"all": "mean of all", "real": "mean of the real ones"}
ORDER = ("method", "real", "miou_before", "miou_after", "delta", "ci_low", "ci_high")
CONTROLS = {
    "alpha_zero": "generated without the mask's injection (alpha = 0), and so without the choice",
    "gate": "updates weighed by the discrepancy",
    "no_gate": "updates not weighed by the discrepancy",
    "no_choice": "the evidence cut at 0, not where the generated image says",
    "no_generation": "nothing generated: features of the original alone (F_g := F_o), cut at 0",
    "upsampling_only": "no iteration, edge-aware read-out alone",
    "unconditioned": "compared with an image generated without a mask instead of the original",
    "random": "what G4Seg changed, dealt anew at random in the same area",
    "crf": "dense CRF instead of G4Seg",
    "g4seg_crf": "dense CRF on G4Seg's masks",
    "trained": "a small network trained on the training phrases' ground truth made inexact",
}
"""What a control changes, in words."""

_SIDES = [
    *(Column(f"miou_{side}", side, over="mIoU") for side in ("before", "after")),
    Column("delta", "Δ", "signed", over="mIoU"),
    Column("ci", "95 % CI", "interval", over="mIoU"),
    *(Column(f"ar_{side}", side, over="AR") for side in ("before", "after")),
    Column("ar_delta", "Δ", "signed", over="AR"),
]
_BOUNDARY = [*(Column(f"boundary_iou_{side}", side, over="Boundary IoU") for side in ("before", "after"))]
_BOUNDARY_DELTA = Column("boundary_iou_delta", "B. IoU Δ", "signed")
_REAL = Column("real", "Real", "flag")


def refinement_tables(params: Params, scores: StudyScores) -> list[Table]:
    """`refinement`, and where the study has some, `refinement_controls` and `refinement_sensitivity`."""
    names = [row["refiner"] for row in scores.refinement["rows"]]
    tables = [refinement(params, scores)]
    if set(names) & CONTROLS.keys():
        tables.append(refinement_controls(params, scores))
    if any("=" in name for name in names):
        tables.append(refinement_sensitivity(params, scores))
    return tables


def refinement(params: Params, scores: StudyScores) -> Table:
    rows = _rows(scores, G4SEG)
    return Table(
        name="refinement",
        caption=f"Coarse masks before and after G4Seg (ours, a reimplementation): mIoU, average recall and boundary IoU "
        f"(points), measured here on {_subset(params, scores)}.",
        frame=_frame(rows, list(ORDER)),
        columns=[Column("shown", "Coarse masks", "text"), _REAL, *_SIDES, *_BOUNDARY],
        group_by="kind",
        notes=[
            _protocol(params, scores),
            f"Real: the ground truth was not looked at. {study_passes(scores, G4SEG)} Rows of the G4Seg paper cannot be "
            "given: of its numbers only gains of +0.77 to +1.00 mIoU on three benchmarks (published) are known, on other data "
            "and coarse masks.",
            *_swept(scores),
            *_lacking(rows),
        ],
        small=True,
    )


def refinement_controls(params: Params, scores: StudyScores) -> Table:
    """All rows in the CSV; the means in print."""
    names = [name for name in dict.fromkeys(row["refiner"] for row in scores.refinement["rows"]) if name in CONTROLS]
    rows = [{"control": name, **row} for name in names for row in _rows(scores, name)]
    frame = _frame(rows, ["control", *ORDER])
    own = "; ".join(
        f"{OVER[mean['over']]} {_signed(mean['miou'])}" for mean in scores.refinement["means"] if mean["refiner"] == G4SEG
    )
    return Table(
        name="refinement_controls",
        caption=f"What refines as well: the controls of G4Seg (ours), mean over the coarse masks (points), measured here on "
        f"{_subset(params, scores)}.",
        frame=frame,
        columns=[
            Column("control", "Control", "text"),
            Column("shown", "Mean", "text"),
            Column("baselines", "of", "count"),
            Column("passes", "Passes", "count"),
            *_SIDES,
            _BOUNDARY_DELTA,
        ],
        group_by="control",
        printed=frame["kind"] == "mean",
        notes=[
            f"G4Seg itself, Δ mIoU: {own}. {_protocol(params, scores)} Every coarse mask by itself: refinement_controls.csv.",
            " ".join(f"{name}: {CONTROLS[name]}." for name in names),
            "Mean of: how many of the methods, or of the real ones, a control was run on. Passes: of the U-Net, a mask; the "
            f"seconds that were measured: {costs_dir(params) / 'refinement_costs.md'}.",
        ],
        small=True,
    )


def refinement_costs(params: Params, scores: StudyScores, refined: dict[str, Any]) -> Table:
    """Seconds that refining an image took, beside the gain, by the times in the manifest `refined`; what has none has an
    empty cell, as the random control where it came of G4Seg's own passes.

    The other tables are the same bytes in every run that makes the same masks; times are not, so this one stands apart, in
    `costs_dir`."""
    timing, rows = refined.get("timing", {}), []
    for row in scores.refinement["rows"]:
        own = _measured(timing, row["refiner"], row["baseline"])
        gain = {"delta": points(row["miou"]["difference"]), "passes": row["passes"], "kind": "method", "baselines": 1}
        rows.append({"refiner": row["refiner"], "method": row["label"], "baseline": row["baseline"], **own, **gain})
    frame = pd.DataFrame(rows)
    means = []
    for refiner, members in frame.groupby("refiner", sort=False):
        told = members.dropna(subset="seconds")
        mean = {
            "refiner": refiner,
            "method": "mean",
            "kind": "mean",
            "baselines": len(told),
            "passes": members["passes"].iloc[0],
        }
        mean |= {name: told[name].mean() if len(told) else None for name in ("seconds", "images", "masks", "delta")}
        means.append(mean | {"device": ", ".join(dict.fromkeys(told["device"])), "batch": told["batch"].max()})
    frame = pd.concat([frame, pd.DataFrame(means)], ignore_index=True)
    for name, whole in (("seconds_per_image", "seconds"), ("masks_per_image", "masks")):
        each = pd.to_numeric(frame[whole]) / pd.to_numeric(frame["images"])
        frame[name] = [None if pd.isna(value) else float(f"{value:.3g}") for value in each]
    frame["scores"] = str(params.results_dir / "refined" / "manifest.json")
    where = frame[(frame["kind"] == "mean") & (frame["baselines"] > 0)].groupby(["device", "batch"], sort=False)["refiner"]
    return Table(
        name="refinement_costs",
        caption=f"What refinement by G4Seg (ours), its controls and variants costs and gains, mean over the coarse masks: "
        f"seconds, and Δ mIoU (points), measured here on {_subset(params, scores)}.",
        frame=frame,
        columns=[
            Column("refiner", "Refiner", "text"),
            Column("baselines", "of", "count"),
            Column("passes", "Passes a mask", "count"),
            Column("masks_per_image", "Masks an image", "number"),
            Column("seconds_per_image", "Seconds an image", "number"),
            Column("delta", "Δ mIoU", "signed"),
        ],
        printed=frame["kind"] == "mean",
        notes=[
            "Measured "
            + "; ".join(f"on {device} in blocks of {batch:g}: {', '.join(names)}" for (device, batch), names in where)
            + ". What is made already keeps the time of its making. All masks of an image, of its phrases and class phrases; "
            "reading and writing of masks included, loading of networks not. g4seg_crf: G4Seg and the CRF together. of: the "
            "coarse masks that have a time. —: no time, as of random where it is dealt from G4Seg's own passes."
        ],
    )


def _measured(timing: dict[str, Any], refiner: str, baseline: str) -> dict[str, Any]:
    """Seconds, masks, images, device and batch of one refiner's work on a baseline; all null where a part was not timed."""
    names = (G4SEG, refiner) if refiner == "g4seg_crf" else (refiner,)
    parts = [part for name in names if (part := timing.get(f"{name}/{baseline}"))]
    if len(parts) < len(names):
        return dict.fromkeys(("seconds", "images", "masks", "device", "batch"))
    return parts[0] | {"seconds": sum(part["seconds"] for part in parts)}


def costs_dir(params: Params) -> Path:
    return params.work_dir / "tables"


def refinement_sensitivity(params: Params, scores: StudyScores) -> Table:
    """One constant of G4Seg changed at a time."""
    every = scores.refinement["rows"]
    names = [name for name in dict.fromkeys(row["refiner"] for row in every) if "=" in name]
    some = dict.fromkeys(row["baseline"] for row in every if row["refiner"] in names)
    rows = []
    for baseline in some:
        for row in every:
            if row["baseline"] == baseline and row["refiner"] in (G4SEG, *names):
                changed = "as it is" if row["refiner"] == G4SEG else row["refiner"].replace("=", " = ")
                rows.append({"changed": changed, **_row(scores, row)})
    refine = params.refine
    return Table(
        name="refinement_sensitivity",
        caption=f"Sensitivity of G4Seg (ours) to its constants (points), measured here on {_subset(params, scores)}.",
        frame=_frame(rows, ["changed", *ORDER]),
        columns=[Column("changed", "Changed", "text"), Column("passes", "Passes", "count"), *_SIDES, _BOUNDARY_DELTA],
        group_by="method",
        groups={row["method"]: row["method"] for row in rows},
        notes=[
            f"As it is: alpha = {refine.alpha:g}, beta = {refine.beta:g}, timesteps {refine.timesteps}, {refine.iterations} "
            f"iterations, layers {refine.layers}, cuts at 0 and the quantiles {refine.levels}. {_protocol(params, scores)}"
        ],
        small=True,
    )


# --------------------------------------------------------------------------------------------------------------- rows
def _rows(scores: StudyScores, refiner: str) -> list[dict[str, Any]]:
    """One row a baseline, then the means over all and over the real ones."""
    rows = [_row(scores, row) for row in scores.refinement["rows"] if row["refiner"] == refiner]
    for mean in scores.refinement["means"]:
        if mean["refiner"] == refiner:
            told = {
                "label": OVER[mean["over"]],
                "baseline": mean["over"],
                "real": mean["over"] == "real",
                "passes": rows[0]["passes"],
            }
            rows.append(_row(scores, mean | told) | {"kind": "mean", "baselines": len(mean["baselines"])})
    return rows


def _row(scores: StudyScores, found: dict[str, Any]) -> dict[str, Any]:
    shown = SHORT.get(found["baseline"], found["label"])
    row: dict[str, Any] = {"method": found["label"], "real": found["real"], "shown": shown}
    for name in ("miou", "ar", "boundary_iou"):
        value, prefix = found[name], "" if name == "miou" else f"{name}_"
        row |= {f"{name}_{side}": points(value[side]) for side in ("before", "after")}
        row |= {f"{prefix}delta": points(value["difference"])}
        row |= {f"{prefix}ci_low": points(value["ci_low"]), f"{prefix}ci_high": points(value["ci_high"])}
    best = {"miou_best_before": points(found["miou"].get("best_before"))}
    counts = scores.refinement["counts"]
    origin = {"source": "measured", "n": counts["phrases"], "images": counts["images"], "scores": str(scores.refinement_path)}
    return row | best | {"baseline": found["baseline"], "passes": found["passes"], "kind": "method", "baselines": 1} | origin


def _frame(rows: list[dict[str, Any]], first: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    frame = frame[first + [name for name in frame.columns if name not in first]]
    return frame.drop(columns="miou_best_before") if frame["miou_best_before"].isna().all() else frame


# ----------------------------------------------------------------------------------------------------- captions, notes
def _subset(params: Params, scores: StudyScores) -> str:
    counts = scores.refinement["counts"]
    return f"{data(params)}, {counts['images']} images of test with {counts['phrases']} phrases"


def _protocol(params: Params, scores: StudyScores) -> str:
    part = f"a fixed part of test ({params.refine.test_fraction:g} of its images, chosen by hash)"
    whole = "all of test" if params.refine.test_fraction == 1 else part
    threshold = scores.refinement["background_threshold"]
    rule = (
        "none, the data have no background class" if threshold is None else f"threshold {threshold:g}, frozen before refinement"
    )
    return (
        f"On {whole}. mIoU: class phrases “{params.data.class_template}”, one confusion matrix at native size; background "
        f"rule: {rule}. What is refined is the labelling, a class at a time; the highest refined P wins. AR and boundary "
        f"IoU: phrases, protocol "
        f"{scores.refinement['protocol']}. Δ: after minus before, paired bootstrap over images, jointly in a mean."
    )


def study_passes(scores: StudyScores, refiner: str) -> str:
    found = {row["passes"] for row in scores.refinement["rows"] if row["refiner"] == refiner}
    return f"G4Seg takes {', '.join(map(str, sorted(found)))} U-Net passes a mask."


def _swept(scores: StudyScores) -> list[str]:
    """The coarse masks' best threshold, chosen on the very images: no result, but it shows what the frozen rule hides."""
    told = []
    for row in scores.refinement["rows"]:
        value = row["miou"]
        if row["refiner"] == G4SEG and "best_before" in value:
            told.append(f"{row['label']} {100 * value['best_before']:.1f} at {value['best_threshold_before']:g}")
    return [f"Coarse mIoU at the background threshold that is best on these images: {'; '.join(told)}."] if told else []


def _lacking(rows: list[dict[str, Any]]) -> list[str]:
    lacking = [
        row["method"] for row in rows if row["kind"] == "method" and (row["ar_before"] is None or row["miou_before"] is None)
    ]
    told = "only class masks or only masks of phrases were imported; a mean is over the rows that have its number"
    return [f"{', '.join(lacking)}: {told}."] if lacking else []


def _signed(value: dict[str, Any]) -> str:
    if value["difference"] is None:
        return "—"
    around = "" if value["ci_low"] is None else f" [{100 * value['ci_low']:.1f}, {100 * value['ci_high']:.1f}]"
    return f"{100 * value['difference']:+.1f}{around}".replace("-", "−")
