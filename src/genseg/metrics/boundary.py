"""Boundary IoU (Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask, decode_checked
from genseg.metrics.protocols import Pairs


def boundary_ious(pairs: Pairs, ratio: float) -> NDArray[np.float64]:
    """IoU [N] of the bands inside the contours of ground truth and prediction; 0 where both masks are empty."""
    return np.array([_boundary_iou(*row, ratio) for row in pairs.rows()], np.float64)


def _boundary_iou(truth: bytes, prediction: bytes, height: int, width: int, ratio: float) -> float:
    distance = band_width(height, width, ratio)
    first = boundary_band(decode_checked(truth, height, width), distance)
    second = boundary_band(decode_checked(prediction, height, width), distance)
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def band_width(height: int, width: int, ratio: float) -> int:
    """Width of the band in pixels: `ratio` of the image's diagonal (0.02 in the paper), at least one."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_band(mask: Mask, distance: int) -> Mask:
    """Pixels of a mask [H, W] that erosion by a square of side 2 * distance + 1 removes.

    As in the authors' `mask_to_boundary`, what lies outside of the image counts as background, so a mask that touches the
    border has a band there.
    """
    band = mask.copy()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return band
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = 2 * distance + 1
    if bottom - top < side or right - left < side:
        return band
    core = _all_in_window(_all_in_window(mask[top:bottom, left:right], side).T, side).T
    band[top + distance : bottom - distance, left + distance : right - distance] &= ~core
    return band


def _all_in_window(mask: Mask, side: int) -> Mask:
    """Logical and over windows of `side` rows: [H, W] -> [H - side + 1, W], by doubling the window."""
    rows = mask.shape[0] - side + 1
    width = 1
    while 2 * width <= side:
        mask = mask[:-width] & mask[width:]
        width *= 2
    rest = side - width
    return mask[:rows] & mask[rest : rest + rows]
