"""IoU of phrases under the three protocols of the literature, whose geometry alone changes AR by many points.

| | `native` | `png-official` | `ppmn` (PPMN, NICE, DiffPNG) |
|---|---|---|---|
| resolution | H x W | 256 x 256 and back, bilinear | 800 / 1333, padded to 32, a quarter, padded to 400 x 400 |
| ground truth | union, binary | soft, no threshold | > 0 after the two resizes (dilates) |
| prediction | unchanged | rounded at 256 x 256, then soft | > 0.5 after the two resizes |
| plural | the table's flag | >= 2 segments | >= 2 segments |

All three protocols take predictions as binary masks at native size. Details that the papers leave open follow their public
code (BCV-Uniandes/PNG `baseline/test_net.py`, dzh19990407/PPMN `train_net.py`).
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
"""Protocol -> version of its implementation, increased by every change that affects a number."""


class Pairs(NamedTuple):
    """Masks of ground truth and prediction of N phrases, as canonical codes that fit their images (`masks.measure`)."""

    truths: list[bytes]
    predictions: list[bytes]
    heights: Integers
    """[N], of the images."""
    widths: Integers
    """[N], of the images."""
    truth_area: Integers
    """[N], in pixels."""
    predicted_area: Integers
    """[N], in pixels."""
    common: Integers
    """[N], pixels that belong to both masks."""

    def rows(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        """Yield ground truth, prediction, height and width of each phrase."""
        return zip(self.truths, self.predictions, self.heights.tolist(), self.widths.tolist(), strict=True)


def phrase_ious(protocol: str, pairs: Pairs) -> tuple[Floats, Flags]:
    """Return the IoU [N] in [0, 1], 0 where the union is empty, and whether the union is empty [N]."""
    if protocol == "native":
        return _native(pairs)
    overlap = {"png-official": _official, "ppmn": _ppmn}[protocol]
    rows = tqdm(pairs.rows(), total=len(pairs.truths), desc=protocol, disable=None, leave=False)
    sums = [overlap(decode_checked(truth, *size), decode_checked(prediction, *size)) for truth, prediction, *size in rows]
    return _ratio(*np.array(sums, np.float64).reshape(-1, 2).T)


def _native(pairs: Pairs) -> tuple[Floats, Flags]:
    """IoU at H x W, directly from the run lengths."""
    return _ratio(pairs.common, pairs.truth_area + pairs.predicted_area - pairs.common)


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
    target, predicted = separable(truth, rows, columns) > 0, separable(prediction, rows, columns) > 0.5
    return float(np.count_nonzero(target & predicted)), float(np.count_nonzero(target | predicted))


def ppmn_size(height: int, width: int) -> tuple[int, int]:
    """Return the size (h, w) of the resized image: shortest side 800, longest at most 1333.

    Source: `ResizeShortestEdge` of detectron2.
    """
    scale = min(800 / min(height, width), 1333 / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@lru_cache(maxsize=256)
def ppmn_matrices(height: int, width: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Return the weights [h, height] and [w, width] of both bilinear resizes of `ppmn` combined.

    The first resize is to `ppmn_size`, zero-padded to multiples of 32; the second is to a quarter of that.
    """
    resized_height, resized_width = ppmn_size(height, width)
    return _resize_pad_quarter(height, resized_height), _resize_pad_quarter(width, resized_width)


def _resize_pad_quarter(side: int, resized: int) -> sparse.csr_array:
    padded = -(-resized // 32) * 32
    return bilinear_matrix(padded, padded // 4)[:, :resized] @ bilinear_matrix(side, resized)  # The padding is zero.


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
