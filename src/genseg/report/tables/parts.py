"""Shared parts of tables: published rows, the columns of measured rows, and text of captions and notes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.params import OperatingPoint, Params
from genseg.report.render import Column, plural, to_points
from genseg.report.scores import SPLITS, ScoredRun

PUBLISHED = {
    "table2": ("method", "citation", "venue", "diffusion", "ps_pretrain", *SPLITS, "source"),
    "table3_size": ("size", *SPLITS, "source"),
    "table4_steps": ("steps", *SPLITS, "source"),
    "table5_guidance": ("guidance", *SPLITS, "source"),
}
"""Published tables by file name without suffix, and the columns of each file; AR is in points, as printed in the paper."""
SOURCES = {  # `data.source` in words
    "scenes": "generated scenes",
    "png": "COCO panoptic with narratives, in the format of the PNG benchmark",
    "index_masks": "images with index masks, class names as phrases",
    "coco_object": "COCO-Object, class names as phrases",
}
SHORT_LABELS = {  # labels of baselines whose full label is too long for a column
    "cross_attention": "Cross-attention",
    "diffpng_cross": "DiffPNG, cross",
    "diffpng_cross_self": "DiffPNG + self",
    "diffpng_sam": "DiffPNG + SAM",
    "diffseg": "DiffSeg (ours)",
    "inexact_scribble": "Hull of a scribble",
}
EVALUATION_NOTE = (
    "An evaluation is one forward pass of the U-Net for one phrase; a step with classifier-free guidance takes two."
)
MIOU_NOT_SCORED = "mIoU is not scored in this study (score.miou is 0)."
DISCRIMINATIVE = "a U-Net of the same size, data and training budget that predicts the mask in one forward pass"

AR_COLUMNS = [Column(split, split, over="Average recall") for split in SPLITS]
DIFFERENCE_COLUMNS = [Column("difference", "Δ", "signed"), Column("difference", "95 % CI", "interval")]


def describe_miou_part(params: Params) -> str:
    """Return the part of the images on which mIoU is scored, as an insertion after "mIoU"; empty for all of them."""
    return "" if params.score.miou == 1 else f" (on at most {params.score.miou:g} of the test images, chosen by hash)"


def published_path(name: str) -> Path:
    """Return the path of a published table."""
    return Path("data/published") / f"{name}.csv"


def read_published(name: str) -> list[dict[str, Any]]:
    """Read the rows of a published table, with the columns `PUBLISHED[name]` and AR in points.

    Raises UserError if the file is missing or unreadable, lacks a column, or contains an AR that is not a number.
    """
    path, columns = published_path(name), list(PUBLISHED[name])
    remedy = f"restore it with `git checkout -- {path}`"
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:  # syntax, no columns, or encoding
        raise UserError(f"{path}: not readable as CSV ({' '.join(str(error).split())}); {remedy}") from None
    for column in columns:
        if column not in frame:
            raise UserError(f"{path}: no column {column}; the columns are {', '.join(map(str, frame.columns))}; {remedy}")
    for column in SPLITS:
        values = pd.to_numeric(frame[column], errors="coerce")
        if values.isna().any():
            row = int(values.isna().to_numpy().argmax())
            value = frame.at[row, column]
            raise UserError(f"{path}: row {row}, column {column}: expected a number, got {value!r}; {remedy}")
        frame[column] = values
    return [dict(zip(columns, row, strict=True)) for row in frame[columns].itertuples(index=False)]


def measured_columns(params: Params, run: ScoredRun) -> dict[str, Any]:
    """Return the columns that every measured row has: the data, AR with interval, boundary IoU and ceilings, in points."""
    summary = run.summary
    low, high = summary["interval"]["overall"] or (None, None)
    return {
        "source": "measured",
        "data": f"{params.study} ({params.data.source})",
        "protocol": summary["protocol"],
        "n": run.phrases,
        "images": run.images,
        "evaluations": None if run.point is None else count_evaluations(run.point),
        **{split: to_points(summary["ar"][split]) for split in SPLITS},
        "ci_low": to_points(low),
        "ci_high": to_points(high),
        "boundary_iou": to_points(summary["boundary_iou"]["overall"]),
        "ceiling": to_points(summary["ceiling"]["overall"]),
        "ceiling_latent": to_points((summary["ceiling_latent"] or {}).get("overall")),
        "scores": str(run.path),
    }


def point_columns(point: OperatingPoint) -> dict[str, Any]:
    """Return the columns of an operating point."""
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "sampler": "rule", "ensemble_size": "ensemble"}
    return {names.get(field, field): value for field, value in point.model_dump().items()}


def difference_columns(comparison: dict[str, Any], name: str = "difference") -> dict[str, Any]:
    """Return the columns `<name>_n`, `<name>`, `<name>_low` and `<name>_high` of a paired difference, in points."""
    return {
        f"{name}_n": comparison["n"],
        name: to_points(comparison["difference"]),
        f"{name}_low": to_points(comparison["ci_low"]),
        f"{name}_high": to_points(comparison["ci_high"]),
    }


def build_frame(rows: list[dict[str, Any]], first: Sequence[str] = ()) -> pd.DataFrame:
    """Build a frame with the columns `first` in front. Counts stay integers where some are missing."""
    frame = pd.DataFrame(rows)
    frame = frame[[*first, *(name for name in frame.columns if name not in first)]]
    for name in frame.columns:
        if name in ("n", "images", "evaluations", "size", "steps") or name.endswith("_n"):
            frame[name] = frame[name].astype("Int64")
    return frame


def describe_study(params: Params) -> str:
    """Return the study's name and the kind of its data, e.g. "study mini (generated scenes)"."""
    return f"study {params.study} ({SOURCES[params.data.source]})"


def describe_phrases(params: Params, run: ScoredRun) -> str:
    """Describe the phrases that a run was scored on: study, split, counts and protocol."""
    counts = f"{plural(run.phrases, 'phrase')} in {plural(run.images, 'image')}"
    return f"{describe_study(params)}, {run.summary['split']} split, {counts}, protocol {run.summary['protocol']}"


def describe_ceilings(run: ScoredRun) -> str:
    """Return the AR of a perfect prediction and of the ground truth at label-latent size, in points."""
    values = {
        "a perfect prediction scores": run.summary["ceiling"]["overall"],
        "the ground truth at label-latent size": (run.summary["ceiling_latent"] or {}).get("overall"),
    }
    return ", ".join(f"{text} {100 * value:.1f}" for text, value in values.items() if value is not None)


def describe_skipped(run: ScoredRun) -> str:
    """Count the phrases that were not scored in the usual way; empty if there are none."""
    reasons = {"missing": "without a prediction (IoU 0)", "empty_union": "with an empty union (a miss)", "left_out": "left out"}
    counts = run.summary["counts"]
    return ", ".join(f"{plural(counts[key], 'phrase')} {text}" for key, text in reasons.items() if counts.get(key))


def comparability_note(params: Params) -> str:
    """Say whether measured and published rows can be compared."""
    if params.data.source == "png":
        return (
            "Comparable with the published rows only if these are the files of the PNG benchmark, under the protocols of its "
            "evaluators (png-official, ppmn) and not under native."
        )
    return "The published rows were measured on other data, so they are not comparable with the measured ones."
