"""The dense CRF's constants, chosen on val as G4Seg's are: the best of ten settings, all on the same coarse masks."""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd

from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.inexact import find_amount, inexact_masks
from genseg.baselines.registry import INEXACT
from genseg.errors import UserError
from genseg.params import Cell, Crf, Params
from genseg.refine.crf import Kernels, images_of, refine

_TRIED = (
    *((3.0, 67.0, 3.0, 0.9), (3.0, 67.0, 3.0, 0.6), (3.0, 67.0, 10.0, 0.6), (3.0, 40.0, 5.0, 0.6), (3.0, 40.0, 10.0, 0.6)),
    *((3.0, 20.0, 5.0, 0.6), (3.0, 20.0, 10.0, 0.6), (1.0, 20.0, 5.0, 0.6), (1.0, 20.0, 10.0, 0.6), (1.0, 20.0, 10.0, 0.75)),
)
"""(gaussian_weight, bilateral_sxy, bilateral_srgb, confidence), those of CLIP-ES first; what else there is, is CLIP-ES'."""
TRIED = [
    Crf(
        iterations=10,
        gaussian_sxy=1.0,
        gaussian_weight=weight,
        bilateral_sxy=sxy,
        bilateral_srgb=srgb,
        bilateral_weight=4.0,
        confidence=confidence,
    )
    for weight, sxy, srgb, confidence in _TRIED
]
COARSE = "coarse"
LOG_SECONDS = 10


def val_masks(params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The phrases of val that the study's operating points were compared on, and coarse masks for every one of them: those of
    GS at the main point, and the ground truth made inexact in each way of `baselines.inexact`; column `coarse` says which.

    Raises:
        UserError: the main point was not sampled on val, or a target of `baselines.inexact` is out of reach there.
    """
    folder = params.results_dir / "predictions"
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder / 'manifest.json'}: no such file; run `genseg sample`, its masks of val are needed")
    runs = read_manifest(folder / "manifest.json")["runs"]
    main = [run["name"] for run in runs if run["role"] == "val" and Cell.of(run) == params.sample.main]
    if not main:
        raise UserError(f"{folder}: no masks of val; add val to sample.runs and run `genseg sample`")
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    phrases = phrases[phrases["split"] == "val"]
    sampled = read_predictions(folder / main[0] / "predictions.parquet")
    table = phrases.merge(sampled[KEY], on=KEY).sort_values(KEY, ignore_index=True)
    found = [sampled.merge(table[KEY], on=KEY).assign(coarse="gs")]
    for kind, target in params.baselines.inexact.items():
        amount, _ = find_amount(table, kind, target, params.seed)
        found.append(inexact_masks(table, kind, amount, params.seed).assign(coarse=INEXACT + kind))
    return table, pd.concat(found, ignore_index=True)


def mean_ious(phrases: pd.DataFrame, predictions: pd.DataFrame, tried: list[Crf]) -> pd.DataFrame:
    """Mean IoU with the ground truth of the masks that each setting refines: one row a setting, after a first one of the coarse
    masks as they are; one column a kind of coarse masks (`coarse` of the predictions), before them `mean`, that of the kinds.

    Phrases without a pixel of ground truth are left out. Each mask is refined alone; settings share the kernels they agree in.
    """
    rows_, last, count = [], time.monotonic(), predictions["image_id"].nunique()
    for done, (image, rows, coarse) in enumerate(images_of(phrases, predictions), start=1):
        truth = np.stack([decode(mask, *image.shape[:2]) for mask in rows["truth"]])
        shared: dict[tuple[float, ...], Kernels] = {}
        refined = [coarse]
        for crf in tried:
            setting = (crf.gaussian_sxy, crf.bilateral_sxy, crf.bilateral_srgb)
            if setting not in shared:
                shared[setting] = Kernels(image, crf)
            refined.append(refine(coarse, image, crf, False, shared[setting]))
        there = truth.any((1, 2))
        ious = [(masks & truth)[there].sum((1, 2)) / (masks | truth)[there].sum((1, 2)) for masks in refined]
        rows_.append(pd.DataFrame(np.stack(ious, 1)).assign(coarse=rows[COARSE].to_numpy()[there]))
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            print(f"refine: {len(tried)} settings of the CRF, image {done} of {count}", file=sys.stderr, flush=True)
    kinds = list(dict.fromkeys(predictions[COARSE]))
    found = pd.concat(rows_).groupby(COARSE).mean().T[kinds]
    found.insert(0, "mean", found.mean(axis=1))
    return found.reset_index(drop=True)


def tune_crf(params: Params) -> tuple[Crf, str]:
    """The setting with the highest mean IoU, the first of equals, and a table of all that were tried.

    Raises:
        UserError: as `val_masks`.
    """
    table, predictions = val_masks(params)
    ious = mean_ious(table, predictions, TRIED)
    best = TRIED[int(ious["mean"].iloc[1:].to_numpy().argmax())]
    lines = [[*Crf.model_fields, *ious.columns, ""]]
    for crf, values in zip([None, *TRIED], ious.to_numpy(), strict=True):
        notes = ["coarse"] if crf is None else ["best"] * (crf == best) + ["params"] * (crf == params.refine.crf)
        constants = ["" for _ in Crf.model_fields] if crf is None else [f"{value:g}" for value in crf.model_dump().values()]
        lines.append([*constants, *(f"{100 * value:.1f}" for value in values), ", ".join(notes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    what = f"mean IoU (points) on {len(table)} phrases, {table['image_id'].nunique()} images of val: {len(TRIED)} settings"
    return best, "\n".join([f"{what}, each on the same {len(predictions)} masks", *shown])
