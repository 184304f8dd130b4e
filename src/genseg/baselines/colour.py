"""The colour control: segment by colour alone. How far it gets says how much of the data colour explains.

For every word of the training phrases a colour histogram inside and outside the phrases' masks is learned; a pixel's
score is the mean log-likelihood ratio of the phrase's words, its threshold is chosen on val.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.data.images import load_image

LEVELS = 8
"""Histogram levels per channel."""
SIDE = 128
"""Longest side at which colours are looked at; masks are read out at native size."""
MAX_TRAIN_IMAGES = 1500
THRESHOLDS = np.linspace(-1.0, 2.0, 31)


def words_of(phrase: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", phrase.lower())


def colour_bins(picture: Image.Image) -> NDArray[np.int64]:
    """Histogram bin of every pixel [h, w] of a picture reduced to at most `SIDE` pixels a side."""
    scale = min(1.0, SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    levels = np.asarray(picture.resize(size, Image.Resampling.BOX), np.int64) * LEVELS // 256
    return (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


def fit_colours(train: pd.DataFrame, seed: int) -> dict[str, NDArray[np.float32]]:
    """Log-likelihood ratio [LEVELS ** 3] of inside against outside for every word of the training phrases."""
    size = LEVELS**3
    inside: dict[str, NDArray[np.float64]] = {}
    outside: dict[str, NDArray[np.float64]] = {}
    nothing = np.zeros(size)
    ids = sorted(train["image_id"].unique(), key=lambda image_id: derive_seed(seed, "colour", image_id))[:MAX_TRAIN_IMAGES]
    for bins, rows in _by_image(train[train["image_id"].isin(ids)]):
        everything = np.bincount(bins.ravel(), minlength=size).astype(float)
        for row in rows.itertuples():
            mask = _reduced(row, bins.shape)
            within = np.bincount(bins.ravel(), weights=mask.ravel(), minlength=size)
            for word in set(words_of(str(row.phrase))):
                inside[word] = inside.get(word, nothing) + within
                outside[word] = outside.get(word, nothing) + everything - within
    prior = 1.0 / size
    return {
        word: (np.log((inside[word] + 50 * prior) / (inside[word].sum() + 50))
               - np.log((outside[word] + 50 * prior) / (outside[word].sum() + 50))).astype(np.float32)
        for word in inside
    }  # fmt: skip


def predict_colours(model: dict[str, NDArray[np.float32]], rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Predictions for phrases; a phrase with no known word gets an empty mask with score 0."""
    found = []
    for ratio, row in _ratios(model, rows):
        height, width = int(row.height), int(row.width)
        mask = bilinear(ratio[None], height, width)[0] >= threshold
        score = float(1 / (1 + np.exp(-ratio[ratio >= threshold].mean()))) if (ratio >= threshold).any() else 0.0
        found.append((*(getattr(row, name) for name in KEY), masks.encode(mask), score))
    return pd.DataFrame(found, columns=[*KEY, "mask", "score"])


def choose_threshold(model: dict[str, NDArray[np.float32]], val: pd.DataFrame) -> float:
    """The threshold with the highest mean IoU on val phrases."""
    total = np.zeros(len(THRESHOLDS))
    for ratio, row in _ratios(model, val):
        truth = _reduced(row, ratio.shape) >= 0.5
        for position, threshold in enumerate(THRESHOLDS):
            mask = ratio >= threshold
            total[position] += (mask & truth).sum() / max(1, (mask | truth).sum())
    return float(THRESHOLDS[int(total.argmax())])


def _ratios(model: dict[str, NDArray[np.float32]], rows: pd.DataFrame) -> Iterator[tuple[NDArray[np.float32], Any]]:
    for bins, group in _by_image(rows):
        for row in group.itertuples():
            known = [model[word][bins] for word in words_of(str(row.phrase)) if word in model]
            yield (np.mean(known, axis=0) if known else np.full(bins.shape, -np.inf, np.float32)), row


def _by_image(rows: pd.DataFrame) -> Iterator[tuple[NDArray[np.int64], pd.DataFrame]]:
    for _, group in rows.groupby("image_id", sort=True):
        yield colour_bins(load_image(group["file_name"].iloc[0])), group


def _reduced(row: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return area_reduce(row_mask(pd.Series(row._asdict())), *shape)
