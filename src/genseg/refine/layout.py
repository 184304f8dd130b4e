"""What of a study is refined, by what, and where it lies.

`results/<study>/refined/<refiner>/<baseline>.parquet` holds the refined masks of the phrases and
`<baseline>_class_phrases.parquet` those of the class phrases, with soft maps beside them where the baseline has some.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from genseg.artifacts.phrases import choose_images
from genseg.baselines.registry import CLASSES, Baseline
from genseg.params import Params, Refine
from genseg.refine.files import CODE
from genseg.refine.g4seg import RANDOM, passes, sensitivity, variants

G4SEG = "g4seg"
MADE_WITH_G4SEG = (RANDOM, "g4seg_crf")
"""Refiners that start from what G4Seg's own passes gave, and cost the study none of their own."""
CODE_HERE = (*CODE, "baselines/registry.py", "interchange/labels.py")
KEYS = ("seed", *(f"refine.{name}" for name in Refine.model_fields if name != "shards"), "score.background_threshold")


def coarse_paths(params: Params, baseline: Baseline) -> dict[bool, Path]:
    """A baseline's predictions files by whether they are of class phrases; an imported one may lack one of them."""
    paths = {False: baseline.predictions(params), True: baseline.class_predictions(params)}
    return {classes: path for classes, path in paths.items() if baseline.family != "imported" or path.exists()}


def refined_dir(params: Params) -> Path:
    return params.results_dir / "refined"


def refined_path(params: Params, refiner: str, baseline: str, classes: bool) -> Path:
    return refined_dir(params) / refiner / f"{baseline}{CLASSES if classes else ''}.parquet"


def discrepancy_path(params: Params, baseline: str) -> Path:
    """Predictions file of the phrases that the figure may show, with G4Seg's discrepancy as their soft maps."""
    return refined_dir(params) / "discrepancy" / f"{baseline}.parquet"


def timing_path(params: Params, refiner: str, baseline: str) -> Path:
    return params.work_dir / "refine_seconds" / refiner / f"{baseline}.json"


def shard_marker(params: Params, shard: int, shards: int) -> Path:
    return params.work_dir / "refined" / f"shard={shard}-of-{shards}.json"


def refiners(params: Params, baseline: str) -> list[str]:
    """What refines a baseline: G4Seg, the controls, and its sensitivity where the params name the baseline."""
    refine = params.refine
    chosen = [*refine.controls, *(refine.sensitivity.controls if baseline in refine.sensitivity.baselines else [])]
    known = [G4SEG, *(name for name in chosen if name not in ("gate", "no_gate") or name in variants(refine))]
    if baseline in refine.sensitivity.baselines:
        known += sensitivity(refine)
    return list(dict.fromkeys(known))


def refiner_passes(refine: Refine, refiner: str) -> int:
    """U-Net passes for one mask."""
    if refiner in ("crf", "trained"):
        return 0
    return passes(variants(refine)[G4SEG if refiner == "g4seg_crf" else refiner])


def test_images(params: Params, phrases: pd.DataFrame) -> list[int]:
    """The fixed part of test that is refined: images chosen by hash."""
    test = phrases.loc[phrases["split"] == "test", "image_id"].to_numpy()
    return sorted(choose_images(test, params.refine.test_fraction, params.seed, "refine"))


def refined_tables(
    params: Params, phrases: pd.DataFrame, class_phrases: pd.DataFrame, background: int | None
) -> dict[bool, pd.DataFrame]:
    """The rows that every refiner of every baseline answers: phrases (False) and class phrases without background (True)."""
    images = test_images(params, phrases)
    tables = {False: phrases, True: class_phrases[class_phrases["phrase_id"] != (-1 if background is None else background)]}
    return {classes: table[(table["split"] == "test") & table["image_id"].isin(images)] for classes, table in tables.items()}
