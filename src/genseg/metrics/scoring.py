"""Score one set of predictions against a phrase table: a pure function of two tables."""

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from genseg.artifacts.masks import Measures, compare, decode_checked, encode, misfit
from genseg.artifacts.parquet import KEY
from genseg.errors import UserError
from genseg.metrics.bootstrap import recall_intervals
from genseg.metrics.ious import PROTOCOLS, Pairs, boundary_ious, latent_ceiling, phrase_ious, plural_flags, protocol_ceiling
from genseg.metrics.recall import Integers, group_means, group_members, recall_values, size_members, threshold_grid

ROW_BYTES = 1300
"""Memory of `score_run` and its tables for each phrase, in bytes, measured on 726,445 masks. Other memory does not grow."""


def score_run(
    phrases: pd.DataFrame,
    predictions: pd.DataFrame,
    protocol: str = "native",
    *,
    split: str = "test",
    threshold_grid_name: str = "exact",
    boundary_ratio: float | None = None,
    latent: tuple[int, int] | None = None,
    replicates: int = 1000,
    seed: int = 0,
    only_predicted: bool = False,
    origins: tuple[str, str] = ("phrase table", "predictions"),
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the scores of every phrase of a split (the table of `artifacts.scores.SCHEMA`) and the summary of a scores file.

    A phrase without a prediction has IoU 0 and is counted as `missing`; an empty union has IoU 0 and is counted as
    `empty_union`. Raises UserError, naming the table and the row, if there is nothing to score, a prediction has no
    phrase, a score is not finite, or a mask does not fit its image.

    Args:
        phrases: phrase table of any splits, in file order (`artifacts.phrases.read_phrases`).
        predictions: predictions for phrases of any splits; those of other splits are counted but not scored.
        threshold_grid_name: name of AR's thresholds (`recall.threshold_grid`).
        boundary_ratio: width of the band of boundary IoU as a fraction of the image's diagonal; None to omit boundary IoU.
        latent: (h, w) of the label latent whose ceiling is reported; None to omit it.
        replicates: bootstrap replicates over images; 0 to omit the intervals.
        only_predicted: leave out phrases without a prediction and count them as `left_out`, for runs on part of a split.
        origins: names of the two tables in error messages, e.g. their paths.
    """
    # 1. Join predictions to phrases and compute IoU.
    rows, counts = match(phrases, predictions, split, only_predicted, origins)
    pairs = mask_pairs(rows, origins)
    iou, empty_union = phrase_ious(protocol, pairs)
    is_plural, plural_by_flag = plural_flags(protocol, rows)
    per_phrase = rows[[*KEY, "is_thing"]].assign(
        is_plural=is_plural,
        iou=iou,
        boundary_iou=np.nan if boundary_ratio is None else boundary_ious(pairs, boundary_ratio),
        area=pairs.truth_area,
    )
    counts |= {
        "empty_union": int(empty_union.sum()),
        "empty_ground_truth": int((pairs.truth_area == 0).sum()),
        "plural_by_flag": plural_by_flag,
    }

    # 2. Aggregate.
    members = group_members(per_phrase)
    values = recall_values(iou, threshold_grid(threshold_grid_name))
    boundary_iou = per_phrase["boundary_iou"].to_numpy()
    by_tag = pd.DataFrame({"tag": rows["tags"].tolist(), "value": values}).explode("tag").dropna(subset="tag").groupby("tag")
    return per_phrase, {
        "protocol": protocol,
        "protocol_version": PROTOCOLS[protocol],
        "threshold_grid": threshold_grid_name,
        "split": split,
        "ar": group_means(values, members),
        "interval": recall_intervals(rows["image_id"].to_numpy(np.int64), values, members, replicates, seed),
        "ceiling": group_means(protocol_ceiling(protocol, pairs), members),
        "ceiling_latent": None if latent is None else group_means(latent_ceiling(pairs, latent), members),
        "ar_by_size": group_means(values, size_members(pairs.truth_area, pairs.heights * pairs.widths)),
        "boundary_iou": dict.fromkeys(members) if boundary_ratio is None else group_means(boundary_iou, members),
        "miou": None,
        "counts": counts,
        "tags": {str(tag): {"n": len(group), "overall": float(group.mean())} for tag, group in by_tag["value"]},
    }


def match(
    phrases: pd.DataFrame, predictions: pd.DataFrame, split: str, only_predicted: bool, origins: tuple[str, str]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Join the phrases of a split to their predictions. For the arguments and errors see `score_run`.

    Returns the phrases with the additional columns `row` and, from the predictions, `predicted_row` (-1 without a prediction),
    `predicted_mask` and `score`; and counts of phrases, images, narratives, and of missing, left-out and other-split rows.
    """
    # 1. Check the predictions.
    infinite = ~np.isfinite(predictions["score"].to_numpy(np.float64))
    if infinite.any():
        row = int(infinite.argmax())
        score = predictions["score"].iloc[row]
        raise UserError(
            f"{origins[1]}: {_row_name(predictions, row)}: expected a finite score, got {score}; give a confidence in [0, 1]"
        )
    unknown = ~pd.MultiIndex.from_frame(predictions[KEY]).isin(pd.MultiIndex.from_frame(phrases[KEY]))
    if unknown.any():
        raise UserError(
            f"{origins[1]}: {_row_name(predictions, int(unknown.argmax()))}: no such phrase in {origins[0]} "
            f"({unknown.sum()} of {len(predictions)} rows); give predictions and phrases of the same data"
        )

    # 2. Join.
    in_split = phrases.assign(row=np.arange(len(phrases)))[(phrases["split"] == split).to_numpy()]
    if in_split.empty:
        splits = ", ".join(sorted(phrases["split"].unique())) or "none"
        raise UserError(f"{origins[0]}: no phrase has split {split!r}; splits in the table: {splits}; choose one with --split")
    columns = predictions[[*KEY, "score"]].assign(predicted_row=np.arange(len(predictions)), predicted_mask=predictions["mask"])
    rows = in_split.merge(columns, on=KEY, how="left", sort=False)

    # 3. Count, and leave out phrases without a prediction.
    missing = int(rows["predicted_row"].isna().sum())
    if only_predicted:
        rows = rows.dropna(subset="predicted_row", ignore_index=True)
        if rows.empty:
            raise UserError(f"{origins[1]}: no prediction for split {split!r} of {origins[0]}; give predictions of that split")
    counts = {
        "phrases": len(rows),
        "images": rows["image_id"].nunique(),
        "narratives": len(rows[["image_id", "narrative_id"]].drop_duplicates()),
        "missing": 0 if only_predicted else missing,
        "left_out": missing if only_predicted else 0,
        "other_split": len(predictions) - (len(in_split) - missing),
    }
    return rows.assign(predicted_row=rows["predicted_row"].fillna(-1).astype(np.int64)), counts


def mask_pairs(rows: pd.DataFrame, origins: tuple[str, str]) -> Pairs:
    """Return the ground-truth and predicted masks of rows from `match`; a missing prediction becomes an empty mask.

    Raises UserError, with the name of the row, if a code does not fit its image.
    """
    heights, widths = (rows[side].to_numpy(np.int64) for side in ("height", "width"))
    truths, predictions = rows["mask"].tolist(), rows["predicted_mask"].tolist()
    predicted_rows = rows["predicted_row"].to_numpy()
    for row in np.flatnonzero(predicted_rows < 0).tolist():
        predictions[row] = _empty_code(int(heights[row]), int(widths[row]))
    truth, predicted, common = compare(truths, predictions)

    def make_canonical(codes: list[bytes], measures: Measures, numbers: Integers, origin: str) -> None:
        """Check that codes [N] fit their images and make them canonical; `numbers` [N] are their rows in `origin`."""
        misfits = np.flatnonzero(measures.pixels != heights * widths)
        if len(misfits):
            first = int(misfits[0])
            raise UserError(
                f"{origin}: {_row_name(rows, first, numbers[first])}: {misfit(int(heights[first]), int(widths[first]))} "
                f"({len(misfits)} of {len(rows)} rows); encode masks at their image's native height and width"
            )
        for row in np.flatnonzero(~measures.canonical).tolist():
            codes[row] = encode(decode_checked(codes[row], int(heights[row]), int(widths[row])))

    make_canonical(truths, truth, rows["row"].to_numpy(), origins[0])
    make_canonical(predictions, predicted, predicted_rows, origins[1])
    return Pairs(truths, predictions, heights, widths, truth.foreground, predicted.foreground, common)


def _row_name(rows: pd.DataFrame, position: int, number: int | None = None) -> str:
    """Name of a row in error messages; `number` is its row in the file, `position` if None."""
    image, narrative, phrase = rows[KEY].iloc[position]
    return f"row {position if number is None else number} (image_id {image}, narrative_id {narrative!r}, phrase_id {phrase})"


@lru_cache(maxsize=4096)
def _empty_code(height: int, width: int) -> bytes:
    return encode(np.zeros((max(0, height), max(0, width)), bool))
