"""The colour control: segmentation by colour alone. Its score shows how much of the task is solved by colour.

For every word of the training phrases, colour histograms inside and outside the phrases' masks are learned. The score of a
pixel is the mean log-likelihood ratio of the phrase's words; the threshold is chosen on val.
"""

import re
from collections import defaultdict
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
"""Longest side to which images are reduced; predicted masks have native size."""
MAX_TRAIN_IMAGES = 1500
THRESHOLDS = np.linspace(-1.0, 2.0, 31)
"""Candidates for the threshold of log-likelihood ratios."""
PSEUDOCOUNT = 50
"""Weight of the uniform prior of a histogram, in pixels."""

Ratios = dict[str, NDArray[np.float32]]
"""Log-likelihood ratios [LEVELS ** 3] by word."""


def words_of(phrase: str) -> list[str]:
    """Return the words of a phrase in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", phrase.lower())


def colour_bins(picture: Image.Image) -> NDArray[np.int64]:
    """Return the histogram bin of every pixel [h, w] of a picture, reduced to at most `SIDE` pixels a side."""
    scale = min(1.0, SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    levels = np.asarray(picture.resize(size, Image.Resampling.BOX), np.int64) * LEVELS // 256
    return (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


def fit_colours(train: pd.DataFrame, seed: int) -> Ratios:
    """Return log p(colour inside) / p(colour outside) for every word of the training phrases."""
    size = LEVELS**3
    inside: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(size))
    outside: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(size))
    ids = sorted(train["image_id"].unique(), key=lambda image_id: derive_seed(seed, "colour", image_id))[:MAX_TRAIN_IMAGES]
    for bins, rows in _by_image(train[train["image_id"].isin(ids)]):
        total = np.bincount(bins.ravel(), minlength=size).astype(float)
        for row in rows.itertuples():
            within = np.bincount(bins.ravel(), weights=_reduced(row, bins.shape).ravel(), minlength=size)
            for word in set(words_of(str(row.phrase))):
                inside[word] = inside[word] + within
                outside[word] = outside[word] + total - within
    return {word: (_log_density(inside[word]) - _log_density(outside[word])).astype(np.float32) for word in inside}


def _log_density(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    prior = 1.0 / len(histogram)
    return np.log((histogram + PSEUDOCOUNT * prior) / (histogram.sum() + PSEUDOCOUNT))


def predict_colours(model: Ratios, rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return predictions for phrases; a phrase without a known word gets an empty mask with score 0."""
    predictions = []
    for ratio, row in _ratios(model, rows):
        height, width = int(row.height), int(row.width)
        mask = bilinear(ratio[None], height, width)[0] >= threshold
        score = float(1 / (1 + np.exp(-ratio[ratio >= threshold].mean()))) if (ratio >= threshold).any() else 0.0
        predictions.append((*(getattr(row, name) for name in KEY), masks.encode(mask), score))
    return pd.DataFrame(predictions, columns=[*KEY, "mask", "score"])


def choose_threshold(model: Ratios, val: pd.DataFrame) -> float:
    """Return the threshold with the highest mean IoU on val phrases; on a tie the lowest one."""
    total = np.zeros(len(THRESHOLDS))
    for ratio, row in _ratios(model, val):
        truth = _reduced(row, ratio.shape) >= 0.5
        for position, threshold in enumerate(THRESHOLDS):
            mask = ratio >= threshold
            total[position] += (mask & truth).sum() / max(1, (mask | truth).sum())
    return float(THRESHOLDS[int(total.argmax())])


def _ratios(model: Ratios, rows: pd.DataFrame) -> Iterator[tuple[NDArray[np.float32], Any]]:
    """Yield (log-likelihood ratio [h, w], row) for every phrase."""
    for bins, group in _by_image(rows):
        for row in group.itertuples():
            known = [model[word][bins] for word in words_of(str(row.phrase)) if word in model]
            yield (np.mean(known, axis=0) if known else np.full(bins.shape, -np.inf, np.float32)), row


def _by_image(rows: pd.DataFrame) -> Iterator[tuple[NDArray[np.int64], pd.DataFrame]]:
    """Yield (colour bins [h, w], rows) for every image."""
    for _, group in rows.groupby("image_id", sort=True):
        yield colour_bins(load_image(group["file_name"].iloc[0])), group


def _reduced(row: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the ground-truth mask of a row as foreground shares [h, w]."""
    return area_reduce(row_mask(pd.Series(row._asdict())), *shape)
