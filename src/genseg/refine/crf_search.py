"""Search for the dense CRF's constants on val: the best of ten settings on the same coarse masks."""

import sys
import time

import numpy as np
import pandas as pd
import yaml

from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.parts import PROGRESS_SECONDS
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.inexact import find_amount, inexact_masks
from genseg.baselines.registry import INEXACT
from genseg.errors import UserError
from genseg.params import Params
from genseg.params.refine import Crf
from genseg.refine.crf import Kernels, refine_masks
from genseg.refine.inputs import iterate_images
from genseg.sampling.runs import Run, predictions_path

SETTINGS = [
    Crf(gaussian_weight=weight, bilateral_sxy=sxy, bilateral_srgb=srgb, confidence=confidence)
    for weight, sxy, srgb, confidence in (
        (3.0, 67.0, 3.0, 0.9),
        (3.0, 67.0, 3.0, 0.6),
        (3.0, 67.0, 10.0, 0.6),
        (3.0, 40.0, 5.0, 0.6),
        (3.0, 40.0, 10.0, 0.6),
        (3.0, 20.0, 5.0, 0.6),
        (3.0, 20.0, 10.0, 0.6),
        (1.0, 20.0, 5.0, 0.6),
        (1.0, 20.0, 10.0, 0.6),
        (1.0, 20.0, 10.0, 0.75),
    )
]
"""Compared settings; the first one, and the constants that all share (the defaults), are those of CLIP-ES."""


def val_masks(params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the phrases of val on which the study's operating points were compared, and their coarse masks.

    Each phrase has a mask by GS at the main point and one for each kind of `baselines.inexact`, made from the ground truth;
    the column `coarse` names the kind. Raises UserError if the main point was not sampled on val, or if a target of
    `baselines.inexact` cannot be reached there.
    """
    manifest = params.results_dir / "predictions" / "manifest.json"
    if not manifest.exists():
        raise UserError(f"{manifest}: no such file; run `genseg sample` first; its masks of val are needed")
    runs = [Run.model_validate(run) for run in read_manifest(manifest)["runs"]]
    main = next((run for run in runs if run.role == "val" and run.point == params.sample.main), None)
    if main is None:
        raise UserError(f"{manifest.parent}: no masks of val; add val to sample.runs and run `genseg sample`")
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    sampled = read_predictions(predictions_path(params, main))
    table = phrases[phrases["split"] == "val"].merge(sampled[KEY], on=KEY).sort_values(KEY, ignore_index=True)
    predictions = [sampled.merge(table[KEY], on=KEY).assign(coarse="gs")]
    for kind, target in params.baselines.inexact.items():
        amount, _ = find_amount(table, kind, target, params.seed)
        predictions.append(inexact_masks(table, kind, amount, params.seed).assign(coarse=INEXACT + kind))
    return table, pd.concat(predictions, ignore_index=True)


def mean_ious(phrases: pd.DataFrame, predictions: pd.DataFrame, settings: list[Crf]) -> pd.DataFrame:
    """Return the mean IoU of masks, each refined alone, with the ground truth; phrases with empty ground truth are left out.

    The column `coarse` of the predictions names the kind of the coarse mask. The result has one row for the coarse masks and
    one per setting, a column `mean` over the kinds, and one column per kind; values are in [0, 1].
    """
    ious_by_image, last_log, count = [], time.monotonic(), predictions["image_id"].nunique()
    for number, (image, rows, coarse) in enumerate(iterate_images(phrases, predictions), start=1):
        truth = np.stack([decode(mask, *image.shape[:2]) for mask in rows["truth"]])
        kernels: dict[tuple[float, ...], Kernels] = {}  # shared by settings with the same standard deviations
        refined = [coarse]
        for crf in settings:
            deviations = (crf.gaussian_sxy, crf.bilateral_sxy, crf.bilateral_srgb)
            if deviations not in kernels:
                kernels[deviations] = Kernels(image, crf)
            refined.append(refine_masks(coarse, image, crf, False, kernels[deviations]))
        present = truth.any((1, 2))
        ious = [(masks & truth)[present].sum((1, 2)) / (masks | truth)[present].sum((1, 2)) for masks in refined]
        ious_by_image.append(pd.DataFrame(np.stack(ious, 1)).assign(coarse=rows["coarse"].to_numpy()[present]))
        if time.monotonic() - last_log > PROGRESS_SECONDS:
            last_log = time.monotonic()
            print(f"refine: {len(settings)} CRF settings, image {number} of {count}", file=sys.stderr, flush=True)
    means = pd.concat(ious_by_image).groupby("coarse").mean().T[predictions["coarse"].unique()]
    means.insert(0, "mean", means.mean(axis=1))
    return means.reset_index(drop=True)


def tune_crf(params: Params) -> None:
    """Compare `SETTINGS` on val; print a table and, as YAML of `refine.crf`, the best setting (the first on a tie)."""
    phrases, predictions = val_masks(params)
    ious = mean_ious(phrases, predictions, SETTINGS)
    best = SETTINGS[int(ious["mean"].iloc[1:].to_numpy().argmax())]
    data = f"{len(phrases)} phrases, {phrases['image_id'].nunique()} images of val"
    print(f"mean IoU (points) on {data}: {len(SETTINGS)} settings, each on the same {len(predictions)} masks")
    print(_table(ious, best, params.refine.crf))
    print()
    print(yaml.safe_dump({"refine": {"crf": best.model_dump()}}, sort_keys=False).rstrip())


def _table(ious: pd.DataFrame, best: Crf, current: Crf) -> str:
    """Return `mean_ious` of `SETTINGS` as text, with notes on the coarse masks, the best setting and that of the params."""
    constants = [[f"{value:g}" for value in crf.model_dump().values()] for crf in SETTINGS]
    table = pd.DataFrame([[""] * len(Crf.model_fields), *constants], columns=list(Crf.model_fields))
    table = table.join((100 * ious).map("{:.1f}".format))
    notes = [[note for note, setting in (("best", best), ("params", current)) if crf == setting] for crf in SETTINGS]
    return table.assign(note=["coarse", *map(", ".join, notes)]).rename(columns={"note": ""}).to_string(index=False)
