"""Edge-aware up-sampling of refined maps: the guided filter (He, Sun and Tang, 2013) with the colour image as guide."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

Array = NDArray[np.floating[Any]]


def box_mean(values: Array, radius: int) -> Array:
    """Mean over the (2 r + 1)^2 window about each pixel of [H, W, ...], cut at the picture's border."""
    size = 2 * radius + 1
    total = values
    for axis in (0, 1):
        inside = uniform_filter1d(np.ones(values.shape[axis]), size, mode="constant")
        shape = [1] * values.ndim
        shape[axis] = -1
        total = uniform_filter1d(total, size, axis=axis, mode="constant") / inside.reshape(shape)
    return total


def guided_filter(guide: Array, maps: Array, radius: int, epsilon: float) -> Array:
    """The map that is locally linear in the guide's colours and nearest to `maps`.

    Args:
        guide: colour image [H, W, 3] in [0, 1].
        maps: [H, W, K], any range.
        radius: of the windows, in pixels.
        epsilon: ridge of the local regressions, in squared intensities: colour variance below it counts as flat.

    Returns:
        [H, W, K].
    """
    mean = box_mean(guide, radius)
    spread = box_mean(guide[..., :, None] * guide[..., None, :], radius) - mean[..., :, None] * mean[..., None, :]
    mean_map = box_mean(maps, radius)
    joint = box_mean(guide[..., :, None] * maps[..., None, :], radius) - mean[..., :, None] * mean_map[..., None, :]
    slope = np.linalg.solve(spread + epsilon * np.eye(3), joint)  # (H, W, 3, K)
    offset = mean_map - (slope * mean[..., :, None]).sum(2)
    return (box_mean(slope, radius) * guide[..., :, None]).sum(2) + box_mean(offset, radius)
