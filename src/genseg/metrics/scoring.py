"""Score one set of predictions against a phrase table: a pure function of two tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import Measures, compare, decode_checked, encode, misfit
from genseg.artifacts.parquet import KEY
from genseg.errors import UserError
from genseg.metrics.bootstrap import recall_intervals
from genseg.metrics.boundary import boundary_ious
from genseg.metrics.ceilings import latent_ceiling, protocol_ceiling
from genseg.metrics.protocols import PROTOCOLS, Pairs, phrase_ious, plural_flags
from genseg.metrics.recall import PHRASE_GROUPS, group_means, group_members, recall_values, size_members, threshold_grid

Integers = NDArray[np.int64]


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
    """Compute the IoU of every phrase of a split, and the summary of a scores file.

    AR is the exact limit, the mean IoU, unless another threshold grid is named (`recall.threshold_grid`). A phrase without
    a prediction has IoU 0 and is counted as `missing`; an empty union has IoU 0 and is counted as `empty_union`.

    Args:
        phrases: phrase table of any splits, in file order (`artifacts.phrases.read_phrases`).
        predictions: predictions for phrases of any splits; those of other splits are counted but not scored.
        boundary_ratio: width of the band of boundary IoU as a fraction of the image's diagonal; None to omit boundary IoU.
        latent: (h, w) of the label latent whose ceiling is reported; None to omit it.
        replicates: bootstrap replicates over images; 0 to omit the intervals.
        only_predicted: leave out and count the phrases without a prediction, for runs on part of a split.
        origins: names of the two tables in error messages, e.g. their paths.

    Returns:
        The table of `artifacts.scores.SCHEMA`, and the summary (`protocol`, `ar`, `interval`, `ceiling`, ...) as JSON values.

    Raises:
        UserError: the split has no phrase, a prediction has no phrase, a score is not finite, or a mask does not fit its
            image; the message names the table and the row.
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
    boundary = dict.fromkeys(PHRASE_GROUPS)
    if boundary_ratio is not None:
        boundary = group_means(per_phrase["boundary_iou"].to_numpy(), members)
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
        "boundary_iou": boundary,
        "miou": None,
        "counts": counts,
        "tags": _by_tag(rows["tags"], values),
    }


def match(
    phrases: pd.DataFrame, predictions: pd.DataFrame, split: str, only_predicted: bool, origins: tuple[str, str]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Join the phrases of a split to their predictions.

    Args:
        only_predicted: leave out the phrases without a prediction.
        origins: names of the two tables in error messages.

    Returns:
        The phrases with the additional columns `row` and, from the predictions, `predicted_row` (-1 without a prediction),
        `predicted_mask` and `score`; and counts of phrases, images, narratives, and missing and left-out rows.

    Raises:
        UserError: the split has no phrase or, with `only_predicted`, no prediction; a prediction has no phrase; a score is
            not finite.
    """
    # 1. Check the predictions.
    infinite = ~np.isfinite(predictions["score"].to_numpy(np.float64))
    if infinite.any():
        row = int(infinite.argmax())
        score = predictions["score"].iloc[row]
        raise UserError(
            f"{origins[1]}: {row_name(predictions, row)}: expected a finite score, got {score}; give a confidence in [0, 1]"
        )
    unknown = ~pd.MultiIndex.from_frame(predictions[KEY]).isin(pd.MultiIndex.from_frame(phrases[KEY]))
    if unknown.any():
        raise UserError(
            f"{origins[1]}: {row_name(predictions, int(unknown.argmax()))}: no such phrase in {origins[0]} "
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
    missing = rows["predicted_row"].isna().to_numpy()
    left_out = int(missing.sum()) if only_predicted else 0
    if only_predicted:
        rows, missing = rows[~missing].reset_index(drop=True), missing[~missing]
        if rows.empty:
            raise UserError(f"{origins[1]}: no prediction for split {split!r} of {origins[0]}; give predictions of that split")
    counts = {
        "phrases": len(rows),
        "images": rows["image_id"].nunique(),
        "narratives": len(rows[["image_id", "narrative_id"]].drop_duplicates()),
        "missing": int(missing.sum()),
        "left_out": left_out,
        "other_split": len(predictions) - int((~missing).sum()),
    }
    return rows.assign(predicted_row=rows["predicted_row"].fillna(-1).astype(np.int64)), counts


def mask_pairs(rows: pd.DataFrame, origins: tuple[str, str]) -> Pairs:
    """Return the masks of ground truth and prediction of rows from `match`, as canonical codes.

    A missing prediction becomes an empty mask.

    Raises:
        UserError: a code does not fit its image; the message names the row.
    """
    heights, widths = (rows[side].to_numpy(np.int64) for side in ("height", "width"))
    truths, predictions = rows["mask"].tolist(), rows["predicted_mask"].tolist()
    predicted_rows = rows["predicted_row"].to_numpy()
    for row in np.flatnonzero(predicted_rows < 0).tolist():
        predictions[row] = _empty(max(0, int(heights[row])), max(0, int(widths[row])))
    truth, predicted, common = compare(truths, predictions)
    truths = _canonical_codes(rows, truths, truth, rows["row"].to_numpy(), origins[0])
    predictions = _canonical_codes(rows, predictions, predicted, predicted_rows, origins[1])
    return Pairs(truths, predictions, heights, widths, truth.foreground, predicted.foreground, common)


def _canonical_codes(rows: pd.DataFrame, codes: list[bytes], measures: Measures, numbers: Integers, origin: str) -> list[bytes]:
    """Check that codes [N] fit the images of `rows` and make them canonical; `numbers` [N] are their rows in `origin`."""
    heights, widths = (rows[side].to_numpy(np.int64) for side in ("height", "width"))
    misfits = np.flatnonzero(measures.pixels != heights * widths)
    if len(misfits):
        first = int(misfits[0])
        raise UserError(
            f"{origin}: {row_name(rows, first, numbers[first])}: {misfit(int(heights[first]), int(widths[first]))} "
            f"({len(misfits)} of {len(rows)} rows); encode masks at their image's native height and width"
        )
    for row in np.flatnonzero(~measures.canonical).tolist():
        codes[row] = encode(decode_checked(codes[row], int(heights[row]), int(widths[row])))
    return codes


def row_name(rows: pd.DataFrame, position: int, number: int | None = None) -> str:
    """Return the name of a row in error messages; `number` is its row in the file, `position` if None."""
    image, narrative, phrase = rows[KEY].iloc[position]
    return f"row {position if number is None else number} (image_id {image}, narrative_id {narrative!r}, phrase_id {phrase})"


@lru_cache(maxsize=4096)
def _empty(height: int, width: int) -> bytes:
    return encode(np.zeros((height, width), bool))


def _by_tag(tags: pd.Series, values: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """Number and AR of the phrases with each tag."""
    frame = pd.DataFrame({"tag": tags.tolist(), "value": values}).explode("tag").dropna(subset="tag")
    return {str(tag): {"n": len(group), "overall": float(group.mean())} for tag, group in frame.groupby("tag")["value"]}
