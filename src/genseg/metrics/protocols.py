"""IoU of phrases under the three protocols of the literature, which differ by many points in geometry alone.

| | `native` | `png-official` | `ppmn` (PPMN, NICE, DiffPNG) |
|---|---|---|---|
| resolution | H x W | 256 x 256 and back, bilinear | 800 / 1333, padded to 32, a quarter, padded to 400 x 400 |
| ground truth | union, binary | soft, no threshold | > 0 after the two resizes (dilates) |
| prediction | as it is | rounded at 256 x 256, soft after | > 0.5 after the two resizes |
| plural | the table's flag | >= 2 segments | >= 2 segments |

Predictions reach all three as binary masks at native size. Where the evaluators' papers are silent, their public code
decides (BCV-Uniandes/PNG `baseline/test_net.py`, dzh19990407/PPMN `train_net.py`); what this means is told below.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from genseg.artifacts.masks import Mask, decode_checked
from genseg.artifacts.resample import bilinear, bilinear_matrix, separable

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

PROTOCOLS = {"native": 1, "png-official": 1, "ppmn": 1}
"""Protocol -> version of its implementation here; a change that moves a number raises it."""


class Pairs(NamedTuple):
    """N phrases' ground truth and prediction as codes, which are canonical and fit their images (`masks.measure`)."""

    truths: list[bytes]
    predictions: list[bytes]
    heights: Integers
    """[N], of the images."""
    widths: Integers
    truth_area: Integers
    """[N], pixels of the ground truth."""
    predicted_area: Integers
    common: Integers
    """[N], pixels of both."""

    def rows(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        return zip(self.truths, self.predictions, self.heights.tolist(), self.widths.tolist(), strict=True)


def phrase_ious(protocol: str, pairs: Pairs) -> tuple[Floats, Flags]:
    """IoU [N] in [0, 1], 0 where the union is empty; and where it is empty [N]."""
    if protocol == "native":
        return _native(pairs)
    overlap = {"png-official": _official, "ppmn": _ppmn}[protocol]
    shown = tqdm(pairs.rows(), total=len(pairs.truths), desc=protocol, disable=None, leave=False)
    sums = [overlap(decode_checked(truth, *size), decode_checked(prediction, *size)) for truth, prediction, *size in shown]
    return _ratio(*np.array(sums, np.float64).reshape(-1, 2).T)


def _native(pairs: Pairs) -> tuple[Floats, Flags]:
    """Union mask at H x W, straight from the run lengths."""
    return _ratio(pairs.common, pairs.truth_area + pairs.predicted_area - pairs.common)


def _ratio(intersection: NDArray[np.number], union: NDArray[np.number]) -> tuple[Floats, Flags]:
    empty = union == 0
    return np.divide(intersection, union, out=np.zeros(len(union)), where=~empty), empty


def _official(truth: Mask, prediction: Mask) -> tuple[float, float]:
    """Soft intersection and union of `png-official`: sums of p t and of p + t - p t.

    Both masks are resized to 256 x 256 and back. The ground truth stays soft on the way; the prediction, a proposal of
    integer type there, is rounded at 256 x 256 (a half goes to 0). The benchmark sums the resized segments of a phrase,
    which for its disjoint segments is the resized union. No antialiasing, as in the benchmark's time: torchvision's later
    default would lower the ceiling by another three points.
    """
    height, width = truth.shape
    soft = bilinear(bilinear(truth, 256, 256), height, width)
    proposal = bilinear(bilinear(prediction, 256, 256) > 0.5, height, width)
    intersection = float(np.sum(soft * proposal))
    return intersection, float(np.sum(soft)) + float(np.sum(proposal)) - intersection


def _ppmn(truth: Mask, prediction: Mask) -> tuple[float, float]:
    """Intersection and union of `ppmn` on its quarter-size grid; the zeros that pad it to 400 x 400 change neither."""
    rows, columns = ppmn_matrices(*truth.shape)
    target, found = separable(truth, rows, columns) > 0, separable(prediction, rows, columns) > 0.5
    return float(np.count_nonzero(target & found)), float(np.count_nonzero(target | found))


def ppmn_size(height: int, width: int) -> tuple[int, int]:
    """Size of the resized image: shortest side 800, longest at most 1333 (`ResizeShortestEdge` of detectron2)."""
    scale = min(800 / min(height, width), 1333 / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@lru_cache(maxsize=256)
def ppmn_matrices(height: int, width: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Weights [h, height] and [w, width] of both bilinear resizes at once: to `ppmn_size`, zero-padded to multiples of 32,
    then to a quarter."""
    resized_height, resized_width = ppmn_size(height, width)
    return _resize_pad_quarter(height, resized_height), _resize_pad_quarter(width, resized_width)


def _resize_pad_quarter(side: int, resized: int) -> sparse.csr_array:
    padded = -(-resized // 32) * 32
    return bilinear_matrix(padded, padded // 4)[:, :resized] @ bilinear_matrix(side, resized)  # what lies beyond is zero


def plural_flags(protocol: str, phrases: pd.DataFrame) -> tuple[Flags, int]:
    """Which phrases are plural under a protocol, and for how many rows without `segment_ids` the table's flag had to do."""
    flag = phrases["is_plural"].to_numpy(bool)
    if protocol == "native":
        return flag, 0
    known = phrases["segment_ids"].notna().to_numpy(bool)
    several = np.array(
        [found is not None and np.ndim(found) == 1 and len(set(found)) >= 2 for found in phrases["segment_ids"]], bool
    )
    return np.where(known, several, flag), int((~known).sum())
