"""The fixed subsets of the test and validation phrases that sweeps run on."""

from __future__ import annotations

import pandas as pd

from genseg.artifacts.phrases import choose_images
from genseg.params import Params


def grid_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the fixed subset of test that the grid runs on: all phrases of images chosen by hash. (The paper used about 7 %
    of test.)"""
    test = phrases[phrases["split"] == "test"]
    chosen = choose_images(test["image_id"].to_numpy(), params.sample.grid_fraction, params.seed, "grid")
    return test[test["image_id"].isin(chosen)]


def val_phrases(params: Params, phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the fixed subset of val that operating points are compared on: all phrases of images chosen by hash."""
    val = phrases[phrases["split"] == "val"]
    chosen = choose_images(val["image_id"].to_numpy(), params.sample.select_fraction, params.seed, "operating points")
    return val[val["image_id"].isin(chosen)]
