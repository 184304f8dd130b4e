"""IoU of phrases under the three protocols of the literature, whose resizing alone changes AR by many points.

| | `native` | `png-official` | `ppmn` (PPMN, NICE, DiffPNG) |
|---|---|---|---|
| resolution | H x W | 256 x 256 and back, bilinear | 800 / 1333, padded to 32, a quarter, padded to 400 x 400 |
| ground truth | union, binary | soft, no threshold | > 0 after the two resizes (dilates) |
| prediction | unchanged | rounded at 256 x 256, then soft | > 0.5 after the two resizes |
| plural | the table's flag | >= 2 segments | >= 2 segments |

All three protocols take predictions as binary masks at native size. Details that the papers leave open follow their public
code (BCV-Uniandes/PNG `baseline/test_net.py`, dzh19990407/PPMN `train_net.py`).

Oracle ceilings are the IoU of a perfect prediction and of a perfect label latent. They are cached by mask, because the runs of
a study and the narratives of an image share their ground truths. Boundary IoU follows Cheng et al., Boundary IoU: Improving
Object-Centric Image Segmentation Evaluation, CVPR 2021.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from genseg.artifacts.masks import Mask, decode_checked
from genseg.artifacts.resample import area_reduce, bilinear, bilinear_matrix, separable
from genseg.metrics.recall import Flags, Floats, Integers

PROTOCOLS = {"native": 1, "png-official": 1, "ppmn": 1}
"""Protocol -> version of its implementation, increased by every change that affects a number."""


class Pairs(NamedTuple):
    """Masks of ground truth and prediction of N phrases, as canonical codes that fit their images (`masks.measure`).

    The arrays are [N]: height and width of the image, area of both masks and of their intersection (`common`) in pixels.
    """

    truths: list[bytes]
    predictions: list[bytes]
    heights: Integers
    widths: Integers
    truth_area: Integers
    predicted_area: Integers
    common: Integers

    def rows(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        """Yield ground truth, prediction, height and width of each phrase."""
        return zip(self.truths, self.predictions, self.heights.tolist(), self.widths.tolist(), strict=True)


def phrase_ious(protocol: str, pairs: Pairs) -> tuple[Floats, Flags]:
    """Return the IoU [N] in [0, 1], 0 where the union is empty, and whether the union is empty [N]."""
    if protocol == "native":  # directly from the run lengths
        return _ratio(pairs.common, pairs.truth_area + pairs.predicted_area - pairs.common)
    overlap = {"png-official": _official, "ppmn": _ppmn}[protocol]
    rows = tqdm(pairs.rows(), total=len(pairs.truths), desc=protocol, disable=None, leave=False)
    sums = [overlap(decode_checked(truth, *size), decode_checked(prediction, *size)) for truth, prediction, *size in rows]
    return _ratio(*np.array(sums, np.float64).reshape(-1, 2).T)


def _overlap(a: Mask, b: Mask) -> tuple[float, float]:
    return float(np.count_nonzero(a & b)), float(np.count_nonzero(a | b))


def _ratio(intersection: NDArray[np.number], union: NDArray[np.number]) -> tuple[Floats, Flags]:
    empty = union == 0
    return np.divide(intersection, union, out=np.zeros(len(union)), where=~empty), empty


def _official(truth: Mask, prediction: Mask) -> tuple[float, float]:
    """Soft intersection and union of `png-official`: sums of p t and of p + t - p t.

    Both masks are resized to 256 x 256 and back. The ground truth stays soft; the prediction, which has integer type in the
    benchmark, is rounded at 256 x 256 (0.5 becomes 0). The benchmark sums the resized segments of a phrase; they are
    disjoint, so this is the resized union. As in the torchvision of the benchmark's time there is no antialiasing, which
    would lower the ceiling by another three points.
    """
    height, width = truth.shape
    soft = bilinear(bilinear(truth, 256, 256), height, width)
    proposal = bilinear(bilinear(prediction, 256, 256) > 0.5, height, width)
    intersection = float(np.sum(soft * proposal))
    return intersection, float(np.sum(soft)) + float(np.sum(proposal)) - intersection


def _ppmn(truth: Mask, prediction: Mask) -> tuple[float, float]:
    """Intersection and union of `ppmn` on its quarter-size grid; padding it to 400 x 400 with zeros changes neither."""
    rows, columns = ppmn_matrices(*truth.shape)
    return _overlap(separable(truth, rows, columns) > 0, separable(prediction, rows, columns) > 0.5)


def ppmn_size(height: int, width: int) -> tuple[int, int]:
    """Return the size (h, w) after detectron2's `ResizeShortestEdge`: shortest side 800, longest at most 1333."""
    scale = min(800 / min(height, width), 1333 / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@lru_cache(maxsize=256)
def ppmn_matrices(height: int, width: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Return the weights [h, height] and [w, width] of both bilinear resizes of `ppmn` combined.

    The first resize is to `ppmn_size`, zero-padded to multiples of 32; the second is to a quarter of that.
    """

    def combine(side: int, resized: int) -> sparse.csr_array:
        padded = -(-resized // 32) * 32
        return bilinear_matrix(padded, padded // 4)[:, :resized] @ bilinear_matrix(side, resized)  # The padding is zero.

    resized_height, resized_width = ppmn_size(height, width)
    return combine(height, resized_height), combine(width, resized_width)


def plural_flags(protocol: str, phrases: pd.DataFrame) -> tuple[Flags, int]:
    """Return which phrases [N] are plural under a protocol, and the number of rows that lack `segment_ids`.

    For such rows the flag `is_plural` of the table is used under every protocol.
    """
    flag = phrases["is_plural"].to_numpy(bool)
    if protocol == "native":
        return flag, 0
    known = phrases["segment_ids"].notna().to_numpy(bool)
    is_plural = [ids is not None and np.ndim(ids) == 1 and len(set(ids)) >= 2 for ids in phrases["segment_ids"]]
    return np.where(known, np.array(is_plural, bool), flag), int((~known).sum())


def protocol_ceiling(protocol: str, pairs: Pairs) -> Floats:
    """Return the IoU [N] of predictions that equal the ground truth; with `native`, 1, or 0 for an empty mask."""
    if protocol == "native":
        return (pairs.truth_area > 0).astype(np.float64)
    return np.array([_perfect(protocol, truth, *size) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _perfect(protocol: str, truth: bytes, height: int, width: int) -> float:
    numbers = [np.array([number]) for number in (height, width, 0, 0, 0)]
    return float(phrase_ious(protocol, Pairs([truth], [truth], *numbers))[0][0])


def latent_ceiling(pairs: Pairs, latent: tuple[int, int]) -> Floats:
    """Return the native IoU [N] of the ground truth reduced to latent size (h, w) and read back.

    The mask is averaged over the area of each cell, up-sampled bilinearly and cut at 0.5.
    """
    return np.array([_through_latent(truth, *size, *latent) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _through_latent(truth: bytes, height: int, width: int, latent_height: int, latent_width: int) -> float:
    mask = decode_checked(truth, height, width)
    upsampled = bilinear(area_reduce(mask, latent_height, latent_width), height, width)
    restored = upsampled >= 0.5 - 1e-6  # The tolerance includes values of 0.5 that were rounded down.
    intersection, union = _overlap(mask, restored)
    return intersection / union if union else 0.0


def boundary_ious(pairs: Pairs, ratio: float) -> Floats:
    """Return the IoU [N] of the bands inside the contours of ground truth and prediction; 0 where both masks are empty.

    `ratio` is the width of the band as a fraction of the image's diagonal.
    """
    sums = []
    for truth, prediction, height, width in pairs.rows():
        distance = band_width(height, width, ratio)
        truth_band = boundary_band(decode_checked(truth, height, width), distance)
        predicted_band = boundary_band(decode_checked(prediction, height, width), distance)
        sums.append(_overlap(truth_band, predicted_band))
    return _ratio(*np.array(sums, np.float64).reshape(-1, 2).T)[0]


def band_width(height: int, width: int, ratio: float) -> int:
    """Return the width of the band in pixels: `ratio` (0.02 in the paper) times the image's diagonal, at least 1."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_band(mask: Mask, distance: int) -> Mask:
    """Return the pixels of a mask [H, W] that erosion by a square of side 2 * distance + 1 removes.

    As in the authors' `mask_to_boundary`, the outside of the image counts as background, so a mask that touches the image
    border has a band there.
    """
    side = 2 * distance + 1
    return mask & ~_all_in_window(_all_in_window(np.pad(mask, distance), side).T, side).T


def _all_in_window(mask: Mask, side: int) -> Mask:
    """Logical "and" over windows of `side` rows, by doubling the window: [H, W] -> [H - side + 1, W]."""
    rows = mask.shape[0] - side + 1
    width = 1
    while 2 * width <= side:
        mask = mask[:-width] & mask[width:]
        width *= 2
    shift = side - width
    return mask[:rows] & mask[shift : shift + rows]
