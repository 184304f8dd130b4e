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
from genseg.metrics.recall import SPLITS, means, recall_values, size_members, split_members, threshold_grid


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
    """IoU of every phrase of a split, and the summary of a scores file.

    AR is the exact limit, the mean IoU, unless another threshold grid is named (`recall.threshold_grid`). A phrase without
    a prediction has IoU 0 and is counted as `missing`; an empty union is a miss and is counted.

    Args:
        phrases: phrase table of any splits, in file order (`artifacts.phrases.read_phrases`).
        predictions: for phrases of any splits; those of other splits are counted and not scored.
        boundary_ratio: width of the band of boundary IoU as a part of the image's diagonal; None: not computed.
        latent: (h, w) of the label latent whose ceiling is wanted; None: not computed.
        replicates: of the bootstrap over images; 0: no intervals.
        only_predicted: leave out (and count) the phrases without a prediction: grids and derangements run on a part.
        origins: what messages call the two tables, e.g. their paths.

    Returns:
        The table of `artifacts.scores.SCHEMA`, and the summary: `protocol`, `ar`, `interval`, `ceiling`, ... as JSON values.

    Raises:
        UserError: no phrase of the split, a prediction for an unknown phrase, a score that is no number, or a mask that
            does not fit its image; the message names the table and the row.
    """
    chosen, counts = match(phrases, predictions, split, only_predicted, origins)
    pairs = fitting_pairs(chosen, origins)
    iou, empty_union = phrase_ious(protocol, pairs)
    plural, by_flag = plural_flags(protocol, chosen)
    per_phrase = chosen[[*KEY, "is_thing"]].assign(
        is_plural=plural,
        iou=iou,
        boundary_iou=np.nan if boundary_ratio is None else boundary_ious(pairs, boundary_ratio),
        area=pairs.truth_area,
    )

    members = split_members(per_phrase)
    values = recall_values(iou, threshold_grid(threshold_grid_name))
    counts |= {
        "empty_union": int(empty_union.sum()),
        "empty_ground_truth": int((pairs.truth_area == 0).sum()),
        "plural_by_flag": by_flag,
    }
    summary = {
        "protocol": protocol,
        "protocol_version": PROTOCOLS[protocol],
        "threshold_grid": threshold_grid_name,
        "split": split,
        "ar": means(values, members),
        "interval": recall_intervals(chosen["image_id"].to_numpy(np.int64), values, members, replicates, seed),
        "ceiling": means(protocol_ceiling(protocol, pairs), members),
        "ceiling_latent": None if latent is None else means(latent_ceiling(pairs, latent), members),
        "ar_by_size": means(values, size_members(pairs.truth_area, pairs.heights * pairs.widths)),
        "boundary_iou": dict.fromkeys(SPLITS)
        if boundary_ratio is None
        else means(per_phrase["boundary_iou"].to_numpy(), members),
        "miou": None,
        "counts": counts,
        "tags": _by_tag(chosen["tags"], values),
    }
    return per_phrase, summary


def match(
    phrases: pd.DataFrame, predictions: pd.DataFrame, split: str, only_predicted: bool, origins: tuple[str, str]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Phrases of a split beside their predictions, and the counts of what is there, missing and left out.

    Added columns: `row`, and of the prediction `predicted_row` (-1 where there is none), `predicted_mask` and `score`.
    """
    finite = np.isfinite(predictions["score"].to_numpy(np.float64))
    if not finite.all():
        row = int((~finite).argmax())
        score = predictions["score"].iloc[row]
        raise UserError(
            f"{origins[1]}: {place(predictions, row)}: score {score} is no finite number; give a confidence in [0, 1]"
        )
    unknown = ~pd.MultiIndex.from_frame(predictions[KEY]).isin(pd.MultiIndex.from_frame(phrases[KEY]))
    if unknown.any():
        row = int(unknown.argmax())
        raise UserError(
            f"{origins[1]}: {place(predictions, row)} is no phrase of {origins[0]} ({unknown.sum()} such rows); "
            "give predictions and phrases of the same data"
        )
    wanted = phrases.assign(row=np.arange(len(phrases)))[(phrases["split"] == split).to_numpy()]
    if wanted.empty:
        there = ", ".join(sorted(phrases["split"].unique())) or "none"
        raise UserError(f"{origins[0]}: no phrase of split {split!r}; splits in it: {there}; choose one with --split")
    found = predictions[[*KEY, "score"]].assign(predicted_row=np.arange(len(predictions)), predicted_mask=predictions["mask"])
    chosen = wanted.merge(found, on=KEY, how="left", sort=False)
    absent = chosen["predicted_row"].isna().to_numpy()
    left_out = int(absent.sum()) if only_predicted else 0
    if only_predicted:
        chosen, absent = chosen[~absent].reset_index(drop=True), absent[~absent]
        if chosen.empty:
            raise UserError(f"{origins[1]}: no prediction for split {split!r} of {origins[0]}")
    counts = {
        "phrases": len(chosen),
        "images": chosen["image_id"].nunique(),
        "narratives": len(chosen[["image_id", "narrative_id"]].drop_duplicates()),
        "missing": int(absent.sum()),
        "left_out": left_out,
        "other_split": len(predictions) - int((~absent).sum()),
    }
    return chosen.assign(predicted_row=chosen["predicted_row"].fillna(-1).astype(np.int64)), counts


def fitting_pairs(chosen: pd.DataFrame, origins: tuple[str, str]) -> Pairs:
    """Codes of ground truth and prediction of rows of `match`; an empty mask where there is no prediction.

    Raises:
        UserError: a code does not fit its image; the message names the row.
    """
    heights, widths = (chosen[side].to_numpy(np.int64) for side in ("height", "width"))
    truths, given = chosen["mask"].tolist(), chosen["predicted_mask"].tolist()
    rows = chosen["predicted_row"].to_numpy()
    for row in np.flatnonzero(rows < 0).tolist():
        given[row] = _empty(max(0, int(heights[row])), max(0, int(widths[row])))
    truth, predicted, common = compare(truths, given)
    truths = _fitting(chosen, truths, truth, heights, widths, chosen["row"].to_numpy(), origins[0])
    given = _fitting(chosen, given, predicted, heights, widths, rows, origins[1])
    return Pairs(truths, given, heights, widths, truth.foreground, predicted.foreground, common)


def _fitting(
    chosen: pd.DataFrame,
    codes: list[bytes],
    measures: Measures,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    numbers: NDArray[np.int64],
    origin: str,
) -> list[bytes]:
    """Canonical codes."""
    bad = np.flatnonzero(measures.pixels != heights * widths)
    if len(bad):
        first = int(bad[0])
        fault = misfit(int(heights[first]), int(widths[first]))
        raise UserError(
            f"{origin}: {place(chosen, first, numbers[first])}: {fault} ({len(bad)} such rows); "
            "encode masks at their image's native height and width"
        )
    for row in np.flatnonzero(~measures.canonical).tolist():
        codes[row] = encode(decode_checked(codes[row], int(heights[row]), int(widths[row])))
    return codes


def place(rows: pd.DataFrame, position: int, number: int | None = None) -> str:
    """How messages name a row."""
    image, narrative, phrase = rows[KEY].iloc[position]
    return f"row {position if number is None else number} (image_id {image}, narrative_id {narrative!r}, phrase_id {phrase})"


@lru_cache(maxsize=4096)
def _empty(height: int, width: int) -> bytes:
    return encode(np.zeros((height, width), bool))


def _by_tag(tags: pd.Series, values: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """`n` and AR of the phrases with each tag."""
    marked = pd.DataFrame({"tag": tags.tolist(), "value": values}).explode("tag").dropna(subset="tag")
    return {str(tag): {"n": len(found), "overall": float(found.mean())} for tag, found in marked.groupby("tag")["value"]}
