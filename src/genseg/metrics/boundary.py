"""Boundary IoU (Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask, decode_checked
from genseg.metrics.protocols import Pairs


def boundary_ious(pairs: Pairs, ratio: float) -> NDArray[np.float64]:
    """Return the IoU [N] of the bands inside the contours of ground truth and prediction; 0 where both masks are empty.

    Args:
        ratio: width of the band as a fraction of the image's diagonal.
    """
    return np.array([_boundary_iou(*row, ratio) for row in pairs.rows()], np.float64)


def _boundary_iou(truth: bytes, prediction: bytes, height: int, width: int, ratio: float) -> float:
    distance = band_width(height, width, ratio)
    truth_band = boundary_band(decode_checked(truth, height, width), distance)
    predicted_band = boundary_band(decode_checked(prediction, height, width), distance)
    union = np.count_nonzero(truth_band | predicted_band)
    return np.count_nonzero(truth_band & predicted_band) / union if union else 0.0


def band_width(height: int, width: int, ratio: float) -> int:
    """Return the width of the band in pixels: `ratio` (0.02 in the paper) times the image's diagonal, at least 1."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_band(mask: Mask, distance: int) -> Mask:
    """Return the pixels of a mask [H, W] that erosion by a square of side 2 * distance + 1 removes.

    As in the authors' `mask_to_boundary`, the outside of the image counts as background, so a mask that touches the image
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
    """Logical "and" over windows of `side` rows, by doubling the window: [H, W] -> [H - side + 1, W]."""
    rows = mask.shape[0] - side + 1
    width = 1
    while 2 * width <= side:
        mask = mask[:-width] & mask[width:]
        width *= 2
    shift = side - width
    return mask[:rows] & mask[shift : shift + rows]
