"""The dense-CRF control: mean field in a fully connected CRF (Krähenbühl & Koltun 2011, Algorithm 1), in numpy and scipy.

Every pair of pixels is connected by two Gaussian kernels with Potts compatibility, k_1 on places and k_2 on places and colours,
both normalised symmetrically: K~ = N^-1/2 K N^-1/2, N = diag(K 1). They are applied on the permutohedral lattice (Adams,
Baek & Davis 2010), which is an approximation; lattice, normalisation and order of the features are those of pydensecrf, whose
constants the literature quotes and whose results these are within 1e-3 (it has no wheels for the Pythons used here).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from genseg.artifacts.masks import Mask, decode, encode
from genseg.artifacts.parquet import KEY
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.params import Crf

Floats = NDArray[np.float32]
_LEAST = 1e-5
"""Probabilities are clipped to it before their logarithm, as pydensecrf's `unary_from_softmax`."""


class Kernels:
    """K~_1 and K~_2 of one image [H, W, 3] uint8: set up once, shared by all its masks."""

    def __init__(self, image: NDArray[np.uint8], crf: Crf) -> None:
        height, width = image.shape[:2]
        colours = image.reshape(-1, 3) / crf.bilateral_srgb
        self.gaussian = _gaussian(height, width, crf.gaussian_sxy)
        self.bilateral = Lattice(np.concatenate([_places(height, width, crf.bilateral_sxy), colours], 1))

    def energy(self, messages: Floats, crf: Crf) -> Floats:
        """w_1 K~_1 m + w_2 K~_2 m of messages [N, K], N = H W."""
        gaussian, bilateral = self.gaussian.filter(messages), self.bilateral.filter(messages)
        return np.float32(crf.gaussian_weight) * gaussian + np.float32(crf.bilateral_weight) * bilateral


def dense_crf(probability: Floats, image: NDArray[np.uint8], crf: Crf, kernels: Kernels | None = None) -> Floats:
    """Mean-field marginals [K, H, W] of K labels that exclude each other.

    Args:
        probability: [K, H, W] in [0, 1], summing to 1 over the labels; its negative logarithm is the unary.
        image: [H, W, 3] uint8.
        kernels: `Kernels(image, crf)` where several calls share them.
    """
    kernels = kernels or Kernels(image, crf)
    unary = np.log(np.maximum(probability, _LEAST, dtype=np.float32)).reshape(len(probability), -1).T
    marginals = _softmax(unary)
    for _ in range(crf.iterations):
        marginals = _softmax(unary + kernels.energy(marginals, crf))
    return np.ascontiguousarray(marginals.T).reshape(probability.shape)


def binary_crf(foreground: Floats, image: NDArray[np.uint8], crf: Crf, kernels: Kernels | None = None) -> Floats:
    """Marginals of the foreground [K, H, W] of K masks, each alone against its own background.

    The same as `dense_crf` of (1 - p, p) for every p of `foreground` [K, H, W], at the cost of one label a mask.
    """
    kernels = kernels or Kernels(image, crf)
    flat = foreground.reshape(len(foreground), -1).T.astype(np.float32)
    logit = np.log(np.maximum(flat, _LEAST)) - np.log(np.maximum(1 - flat, _LEAST))
    everything = kernels.energy(np.ones((len(flat), 1), np.float32), crf)
    marginals = _sigmoid(logit)
    for _ in range(crf.iterations):
        marginals = _sigmoid(logit + 2 * kernels.energy(marginals, crf) - everything)
    return np.ascontiguousarray(marginals.T).reshape(foreground.shape)


def refine(coarse: Mask, image: NDArray[np.uint8], crf: Crf, disjoint: bool, kernels: Kernels | None = None) -> Mask:
    """Refined masks [K, H, W] of hard coarse ones; an empty mask stays empty.

    Args:
        disjoint: the masks are classes: one labelling of them and of what none covers (where they overlap, the first), as
            CLIP-ES does with the classes it found. Else each mask alone.
    """
    refined = np.zeros_like(coarse)
    there = np.flatnonzero(coarse.any((1, 2)))
    if not len(there):
        return refined
    if disjoint:
        label = np.where(coarse[there].any(0), coarse[there].argmax(0) + 1, 0)
        hit = label == np.arange(len(there) + 1)[:, None, None]
        probability = np.where(hit, crf.confidence, (1 - crf.confidence) / len(there)).astype(np.float32)
        winner = dense_crf(probability, image, crf, kernels).argmax(0)
        refined[there] = winner == np.arange(1, len(there) + 1)[:, None, None]
    else:
        probability = np.where(coarse[there], crf.confidence, 1 - crf.confidence).astype(np.float32)
        refined[there] = binary_crf(probability, image, crf, kernels) > 0.5
    return refined


def refine_predictions(phrases: pd.DataFrame, predictions: pd.DataFrame, crf: Crf, disjoint: bool = False) -> pd.DataFrame:
    """Predictions with refined masks and unchanged scores; `disjoint` for class phrases.

    Raises:
        UserError: a prediction without a phrase, a mask that does not fit, or an image that is missing or of another size.
    """
    found = []
    for image, rows, coarse in images_of(phrases, predictions):
        masks = refine(coarse, image, crf, disjoint)
        found += [(*row, encode(mask)) for row, mask in zip(rows[[*KEY, "score"]].itertuples(index=False), masks, strict=True)]
    return pd.DataFrame(found, columns=[*KEY, "score", "mask"])


def images_of(phrases: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[tuple[NDArray[np.uint8], pd.DataFrame, Mask]]:
    """(image [H, W, 3], its rows with `mask`, `score` and `truth`, coarse masks [K, H, W]) of predictions, by image."""
    table = phrases[[*KEY, "file_name", "height", "width", "mask"]].rename(columns={"mask": "truth"})
    joined = predictions.merge(table, on=KEY, how="left")
    if joined["truth"].isna().any():
        (key,) = joined.loc[joined["truth"].isna(), KEY].head(1).itertuples(index=False, name=None)
        raise UserError(f"predictions: no phrase {key} (image_id, narrative_id, phrase_id); give the table they were made for")
    for _, rows in joined.sort_values(KEY).groupby("image_id", sort=True):
        name, height, width = rows["file_name"].iloc[0], int(rows["height"].iloc[0]), int(rows["width"].iloc[0])
        image = np.asarray(load_image(name))
        if image.shape[:2] != (height, width):
            raise UserError(f"{name}: {image.shape[0]} x {image.shape[1]} pixels, the phrase table says {height} x {width}")
        yield image, rows, np.stack([decode(mask, height, width) for mask in rows["mask"]])


class _Axes(NamedTuple):
    """Neighbours of the M lattice points along one axis, M where there is none."""

    before: NDArray[np.int64]
    after: NDArray[np.int64]


class Lattice:
    """K~ of features [N, d] in units of their standard deviations, approximately: splat, blur, slice, normalised."""

    def __init__(self, features: NDArray[np.floating]) -> None:
        self._splat, self._axes = permutohedral(features)
        self._slice = self._splat.T.tocsr()
        norm = self._apply(np.ones((len(features), 1), np.float32))
        self._norm = 1 / np.sqrt(norm + np.float32(1e-20))

    def filter(self, messages: Floats) -> Floats:
        """K~ m for messages [N, K]."""
        return self._norm * self._apply(self._norm * messages)

    def _apply(self, messages: Floats) -> Floats:
        values = np.zeros((self._splat.shape[0] + 1, messages.shape[1]), np.float32)  # the last one stands for no neighbour
        values[:-1] = self._splat @ messages
        for before, after in self._axes:
            values[:-1] += np.float32(0.5) * (values[before] + values[after])
        return np.asarray(self._slice @ values[:-1])


def permutohedral(features: NDArray[np.floating]) -> tuple[sparse.csr_array, list[_Axes]]:
    """The permutohedral lattice of features [N, d], with M points.

    Returns:
        The splat [M, N], barycentric weights of each feature on its simplex's d + 1 corners, and each point's neighbours
        along the d + 1 axes. With blurs of (1/2, 1, 1/2), S^T B_d ... B_0 S is about c exp(-|f_i - f_j|^2 / 2).

    Raises:
        UserError: the features span more lattice cells than a 63-bit key can tell apart.
    """
    count, d = features.shape
    axis = np.arange(1, d + 1)
    scaled = features * (np.sqrt(2 / 3) * (d + 1) / np.sqrt(axis * (axis + 1)))
    elevated = np.zeros((count, d + 1))  # in the hyperplane where coordinates sum to 0 (Adams et al., p. 5)
    elevated[:, :d] = np.cumsum(scaled[:, ::-1], 1)[:, ::-1]
    elevated[:, 1:] -= axis * scaled

    nearest = np.rint(elevated / (d + 1)) * (d + 1)
    surplus = np.rint(nearest.sum(1) / (d + 1))[:, None]
    rank = np.argsort(np.argsort(nearest - elevated, 1, kind="stable"), 1, kind="stable") + surplus
    turn = (rank < 0).astype(float) - (rank > d)  # back into the hyperplane, where the rounding was least certain
    nearest, rank = nearest + turn * (d + 1), (rank + turn * (d + 1)).astype(np.int64)
    rest = np.sort((elevated - nearest) / (d + 1), 1)  # ascending: coordinate of rank d first
    weights = np.diff(rest, axis=1, prepend=rest[:, -1:] - 1)

    corner = np.arange(d + 1)[:, None]
    steps = np.where(np.arange(d + 1) <= d - corner, corner, corner - (d + 1))  # (corner, rank)
    keys = nearest.astype(np.int64)[:, None, :d] + steps[:, rank[:, :d]].transpose(1, 0, 2)  # (N, d + 1, d)
    keys -= keys.min((0, 1)) - (d + 1)
    spans = [int(span) for span in keys.max((0, 1)) + d + 2]
    strides = [1]
    for span in spans[:-1]:
        strides.append(strides[-1] * span)
    if strides[-1] * spans[-1] >= 2**63:
        raise UserError("dense CRF: its standard deviations are too small for this picture; choose larger ones")
    points, index = np.unique(keys.reshape(-1, d) @ np.array(strides), return_inverse=True)
    pixels = np.repeat(np.arange(count), d + 1)
    splat = sparse.csr_array((weights.ravel().astype(np.float32), (index.ravel(), pixels)), (len(points), count))
    axes = []
    for direction in range(d + 1):
        step = int(np.where(np.arange(d) == direction, d, -1) @ np.array(strides))
        axes.append(_Axes(_find(points, points - step), _find(points, points + step)))
    return splat, axes


def _find(points: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each wanted key stands among the sorted `points`, or their number."""
    place = np.minimum(np.searchsorted(points, wanted), len(points) - 1)
    return np.where(points[place] == wanted, place, len(points))


@lru_cache(maxsize=8)
def _gaussian(height: int, width: int, deviation: float) -> Lattice:
    return Lattice(_places(height, width, deviation))


def _places(height: int, width: int, deviation: float) -> NDArray[np.float64]:
    """(x, y) / deviation of every pixel: [H W, 2]. The lattice's error depends on the order of the features."""
    return np.asarray(np.mgrid[:height, :width][::-1].reshape(2, -1).T / deviation)


def _softmax(energy: Floats) -> Floats:
    shifted = np.exp(energy - energy.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _sigmoid(logit: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logit))
