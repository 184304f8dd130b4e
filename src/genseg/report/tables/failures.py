"""Failures of the main row by kind: which phrases have a low IoU, and why."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import compare, encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import is_background
from genseg.params import Params
from genseg.report.render import Column, Table
from genseg.report.scores import SPLITS, StudyScores
from genseg.report.tables import parts

FAILURE_IOU = 0.5
"""IoU with the own ground truth below which a phrase is a failure."""
FOUND_IOU = 0.1
"""IoU with any ground truth of the image below which a mask has found nothing."""
KINDS = {
    "wrong object": f"the mask has a higher IoU with another ground truth of the image, at least {FOUND_IOU:g}",
    "boundary": f"the object is found, at least in part: its own ground truth has the highest IoU, at least {FOUND_IOU:g}",
    "missing": f"the mask is empty, or its IoU with every ground truth of the image is below {FOUND_IOU:g}",
}
"""Kind -> definition. Each failure has exactly one kind."""


def find_failures(
    scored: pd.DataFrame, phrases: pd.DataFrame, class_phrases: pd.DataFrame, predictions: pd.DataFrame
) -> pd.DataFrame:
    """Return the scored phrases whose native IoU is below `FAILURE_IOU`, lowest first, as rows of the phrase table.

    Further columns: `prediction` (null if missing), `iou`, `kind`, and `other` and `other_iou`, the phrase with the highest IoU
    among the ground truths of the image that differ from the phrase's own: those of phrases and of classes.
    """
    # 1. Compute the IoU of every phrase.
    rows = scored[KEY].merge(phrases, on=KEY)
    rows = rows.merge(predictions[[*KEY, "mask"]].rename(columns={"mask": "prediction"}), on=KEY, how="left")
    failures = rows.assign(iou=_ious(rows, "mask"))
    failures = failures[failures["iou"] < FAILURE_IOU].sort_values(["iou", *KEY], ignore_index=True)

    # 2. Find the other ground truth that is most like the prediction.
    truths = pd.concat([phrases, class_phrases[~is_background(class_phrases)]])[["image_id", "phrase", "mask"]]
    truths = truths.drop_duplicates(["image_id", "mask"]).rename(columns={"phrase": "other", "mask": "other_mask"})
    pairs = failures.merge(truths, on="image_id")
    pairs = pairs[pairs["mask"] != pairs["other_mask"]]
    pairs = pairs.assign(other_iou=_ious(pairs, "other_mask")).sort_values("other_iou", ascending=False, kind="stable")
    failures = failures.merge(pairs.drop_duplicates(KEY)[[*KEY, "other", "other_iou"]], on=KEY, how="left")

    # 3. Decide the kind.
    other_iou = failures["other_iou"].fillna(0.0).to_numpy(float)
    own_iou = failures["iou"].to_numpy(float)
    is_missing, is_wrong = np.maximum(own_iou, other_iou) < FOUND_IOU, other_iou > own_iou
    return failures.assign(other_iou=other_iou, kind=np.select([is_missing, is_wrong], ["missing", "wrong object"], "boundary"))


def _ious(rows: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """Return the IoU [N] of `prediction` and another column of masks; 0 without a prediction or with an empty union."""
    empty = [encode(np.zeros(shape, bool)) for shape in rows[["height", "width"]].itertuples(index=False)]
    predictions = [rle if isinstance(rle, bytes) else blank for rle, blank in zip(rows["prediction"], empty, strict=True)]
    own, other, common = compare(predictions, rows[column].tolist())
    union = own.foreground + other.foreground - common
    return np.divide(common, union, out=np.zeros(len(rows)), where=union > 0)


def failures(params: Params, scores: StudyScores, scored: pd.DataFrame, failed: pd.DataFrame) -> Table:
    """Count failures (from `find_failures`) by kind and split; `scored` are the scores of all phrases."""
    groups = {kind: failed[failed["kind"] == kind] for kind in KINDS} | {"all failures": failed, "all phrases": scored}
    rows = []
    for kind, members in groups.items():
        thing, plural = members["is_thing"].astype(bool), members["is_plural"].astype(bool)
        counts = [len(members), thing.sum(), (~thing).sum(), (~plural).sum(), plural.sum()]
        row = {"kind": kind, **dict(zip(SPLITS, counts, strict=True)), "source": "measured", "scores": str(scores.main.path)}
        rows.append(row | {"group": "kind" if kind in KINDS else "total"})
    caption = (
        f"Failures of GS: phrases with a native IoU below {FAILURE_IOU:g}, counted by kind, measured here on "
        f"{parts.describe_study(params)}."
    )
    columns = [Column("kind", "Kind", "text"), *(Column(split, split, "count", over="Phrases") for split in SPLITS)]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}.",
        " ".join(f"{kind}: {text}." for kind, text in KINDS.items())
        + " The ground truths of an image are those of its phrases, in all narratives, and of its classes.",
    ]
    return Table("failures", caption, parts.build_frame(rows), columns, notes, group_by="group")
