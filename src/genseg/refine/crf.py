"""The dense-CRF control: mean field in a fully connected CRF (Krähenbühl & Koltun 2011, Algorithm 1), in numpy and scipy.

Every pair of pixels is connected by two Gaussian kernels with Potts compatibility, k_1 of positions and k_2 of positions and
colours, both normalised symmetrically: K~ = N^-1/2 K N^-1/2, N = diag(K 1). They are approximated on the permutohedral lattice
(Adams, Baek & Davis 2010). Lattice, normalisation and order of the features are those of pydensecrf, whose constants the
literature uses: results agree with it within 1e-3. pydensecrf itself has no wheels for the Python versions supported here.
"""

from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax

from genseg.artifacts.masks import Integers, Mask, encode
from genseg.artifacts.parquet import KEY
from genseg.errors import UserError
from genseg.params.refine import Crf
from genseg.refine.inputs import iterate_images

Floats = NDArray[np.float32]
_MIN_PROBABILITY = 1e-5
"""Lower bound of probabilities in logarithms, as in pydensecrf's `unary_from_softmax`."""


class Kernels:
    """Normalised kernels K~_1 and K~_2 of one image [H, W, 3] uint8, set up once for all of its masks."""

    def __init__(self, image: NDArray[np.uint8], crf: Crf) -> None:
        height, width = image.shape[:2]
        colours = image.reshape(-1, 3) / crf.bilateral_srgb
        self.gaussian = _gaussian(height, width, crf.gaussian_sxy)
        self.bilateral = Lattice(np.concatenate([_positions(height, width, crf.bilateral_sxy), colours], 1))

    def energy(self, messages: Floats, crf: Crf) -> Floats:
        """Return w_1 K~_1 m + w_2 K~_2 m [N, K] for messages m [N, K], N = H * W."""
        gaussian, bilateral = self.gaussian.filter(messages), self.bilateral.filter(messages)
        return np.float32(crf.gaussian_weight) * gaussian + np.float32(crf.bilateral_weight) * bilateral


def dense_crf(probability: Floats, image: NDArray[np.uint8], crf: Crf, kernels: Kernels | None = None) -> Floats:
    """Return the mean-field marginals [K, H, W] of K mutually exclusive labels of an image [H, W, 3].

    The unary potential is the negative logarithm of `probability` [K, H, W] in [0, 1], whose sum over the labels is 1.
    `kernels` are `Kernels(image, crf)`, to share them between calls.
    """
    kernels = kernels or Kernels(image, crf)
    unary = np.log(np.maximum(probability, _MIN_PROBABILITY, dtype=np.float32)).reshape(len(probability), -1).T
    marginals = softmax(unary, axis=1)
    for _ in range(crf.iterations):
        marginals = softmax(unary + kernels.energy(marginals, crf), axis=1)
    return np.ascontiguousarray(marginals.T).reshape(probability.shape)


def binary_crf(foreground: Floats, image: NDArray[np.uint8], crf: Crf, kernels: Kernels | None = None) -> Floats:
    """Return the marginals [K, H, W] of the foreground of K masks, each mask alone.

    Equal to `dense_crf` of (1 - p, p) for every p of `foreground` [K, H, W] in [0, 1], at the cost of one label per mask.
    """
    kernels = kernels or Kernels(image, crf)
    flat = foreground.reshape(len(foreground), -1).T.astype(np.float32)
    logit = np.log(np.maximum(flat, _MIN_PROBABILITY)) - np.log(np.maximum(1 - flat, _MIN_PROBABILITY))
    total = kernels.energy(np.ones((len(flat), 1), np.float32), crf)  # energy of foreground and background together
    marginals = _sigmoid(logit)
    for _ in range(crf.iterations):
        marginals = _sigmoid(logit + 2 * kernels.energy(marginals, crf) - total)
    return np.ascontiguousarray(marginals.T).reshape(foreground.shape)


def refine_masks(coarse: Mask, image: NDArray[np.uint8], crf: Crf, disjoint: bool, kernels: Kernels | None = None) -> Mask:
    """Return refined masks [K, H, W] of coarse masks [K, H, W] of an image [H, W, 3]; an empty mask stays empty.

    If `disjoint`, the masks are classes and are refined together, with a background label for uncovered pixels, as CLIP-ES
    does (a pixel of several masks belongs to the first). Otherwise each mask is refined alone.
    """
    refined = np.zeros_like(coarse)
    present = np.flatnonzero(coarse.any((1, 2)))
    if not len(present):
        return refined
    if disjoint:
        label = np.where(coarse[present].any(0), coarse[present].argmax(0) + 1, 0)
        one_hot = label == np.arange(len(present) + 1)[:, None, None]
        probability = np.where(one_hot, crf.confidence, (1 - crf.confidence) / len(present)).astype(np.float32)
        winner = dense_crf(probability, image, crf, kernels).argmax(0)
        refined[present] = winner == np.arange(1, len(present) + 1)[:, None, None]
    else:
        probability = np.where(coarse[present], crf.confidence, 1 - crf.confidence).astype(np.float32)
        refined[present] = binary_crf(probability, image, crf, kernels) > 0.5
    return refined


def refine_predictions(phrases: pd.DataFrame, predictions: pd.DataFrame, crf: Crf, disjoint: bool = False) -> pd.DataFrame:
    """Return predictions with refined masks and unchanged scores, in key order. Raises UserError as `iterate_images` does."""
    refined = []
    for image, rows, coarse in iterate_images(phrases, predictions):
        masks = refine_masks(coarse, image, crf, disjoint)
        columns = rows[[*KEY, "score"]].itertuples(index=False)
        refined += [(*row, encode(mask)) for row, mask in zip(columns, masks, strict=True)]
    return pd.DataFrame(refined, columns=[*KEY, "score", "mask"])


class Lattice:
    """Approximate K~ of features [N, d] in units of their standard deviations: splat, blur, slice, and normalise."""

    def __init__(self, features: NDArray[np.floating]) -> None:
        self._splat, self._axes = permutohedral(features)
        self._slice = self._splat.T.tocsr()
        norm = self._apply(np.ones((len(features), 1), np.float32))
        self._norm = 1 / np.sqrt(norm + np.float32(1e-20))

    def filter(self, messages: Floats) -> Floats:
        """Return K~ m [N, K] for messages m [N, K]."""
        return self._norm * self._apply(self._norm * messages)

    def _apply(self, messages: Floats) -> Floats:
        values = np.zeros((self._splat.shape[0] + 1, messages.shape[1]), np.float32)  # last row, always 0: missing neighbour
        values[:-1] = self._splat @ messages
        for before, after in self._axes:
            values[:-1] += np.float32(0.5) * (values[before] + values[after])
        return np.asarray(self._slice @ values[:-1])


def permutohedral(features: NDArray[np.floating]) -> tuple[sparse.csr_array, list[tuple[Integers, Integers]]]:
    """Build the permutohedral lattice, of M points, for features [N, d] (Adams et al. 2010, section 3).

    Returns:
        The splat matrix S [M, N], with the barycentric weights of each feature on the d + 1 corners of its simplex, and for
        each of the d + 1 axes the indices [M] of the neighbours before and after the points, M for a missing one. With blurs
        B of (1/2, 1, 1/2), S^T B_d ... B_0 S approximates c exp(-|f_i - f_j|^2 / 2).

    Raises UserError if the features span more lattice cells than a 63-bit key can distinguish.
    """
    # 1. Embed the features in the hyperplane of coordinates with sum 0.
    count, d = features.shape
    axis = np.arange(1, d + 1)
    scaled = features * (np.sqrt(2 / 3) * (d + 1) / np.sqrt(axis * (axis + 1)))
    elevated = np.zeros((count, d + 1))
    elevated[:, :d] = np.cumsum(scaled[:, ::-1], 1)[:, ::-1]
    elevated[:, 1:] -= axis * scaled

    # 2. Find the enclosing simplex and the barycentric weights.
    nearest = np.rint(elevated / (d + 1)) * (d + 1)
    surplus = np.rint(nearest.sum(1) / (d + 1))[:, None]
    rank = np.argsort(np.argsort(nearest - elevated, 1, kind="stable"), 1, kind="stable") + surplus
    shift = (rank < 0).astype(float) - (rank > d)  # back onto the hyperplane, where rounding moved farthest
    nearest, rank = nearest + shift * (d + 1), (rank + shift * (d + 1)).astype(np.int64)
    remainder = np.sort((elevated - nearest) / (d + 1), 1)  # ascending, so rank d is first
    weights = np.diff(remainder, axis=1, prepend=remainder[:, -1:] - 1)

    # 3. Number the corners of all simplices.
    corner = np.arange(d + 1)[:, None]
    steps = np.where(np.arange(d + 1) <= d - corner, corner, corner - (d + 1))  # (corner, rank)
    keys = nearest.astype(np.int64)[:, None, :d] + steps[:, rank[:, :d]].transpose(1, 0, 2)  # (N, d + 1, d)
    keys -= keys.min((0, 1)) - (d + 1)
    spans = [int(span) for span in keys.max((0, 1)) + d + 2]
    strides = [1]
    for span in spans[:-1]:
        strides.append(strides[-1] * span)
    if strides[-1] * spans[-1] >= 2**63:
        raise UserError("refine.crf: the standard deviations are too small for this image; choose larger ones")
    points, index = np.unique(keys.reshape(-1, d) @ np.array(strides), return_inverse=True)

    # 4. Assemble the splat matrix and the neighbours.
    pixels = np.repeat(np.arange(count), d + 1)
    splat = sparse.csr_array((weights.ravel().astype(np.float32), (index.ravel(), pixels)), (len(points), count))
    axes = []
    for direction in range(d + 1):
        step = int(np.where(np.arange(d) == direction, d, -1) @ np.array(strides))
        axes.append((_find(points, points - step), _find(points, points + step)))
    return splat, axes


def _find(points: Integers, keys: Integers) -> Integers:
    """Return the index of each key in the sorted `points`, or len(points) if it is missing."""
    index = np.minimum(np.searchsorted(points, keys), len(points) - 1)
    return np.where(points[index] == keys, index, len(points))


@lru_cache(maxsize=8)
def _gaussian(height: int, width: int, deviation: float) -> Lattice:
    return Lattice(_positions(height, width, deviation))


def _positions(height: int, width: int, deviation: float) -> NDArray[np.float64]:
    """Return (x, y) / deviation of all pixels [H * W, 2]; the error of the lattice depends on the order of x and y."""
    return np.asarray(np.mgrid[:height, :width][::-1].reshape(2, -1).T / deviation)


def _sigmoid(logit: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logit))
