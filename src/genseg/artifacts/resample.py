"""Area reduction and interpolation of maps without torch: masks to label latents and back.

Area reduction and bilinear interpolation are separable, `out = R x C^T`, with sparse matrices R and C that are cached by size.
The result for a map does not depend on the other maps of the batch or on the number of threads.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genseg.artifacts.masks import Mask

Map = NDArray[np.float32]


def area_reduce(maps: Map | Mask, height: int, width: int) -> Map:
    """Reduce maps [..., H, W] to float32 [..., height, width] by exact area averaging, for any ratio of the sides.

    The value of a cell is the mean of the map over the cell's rectangle, with pixels that its border cuts weighted by the
    covered fraction. Equal to `torch.nn.functional.interpolate(mode="area")` for integer ratios.
    """
    return separable(maps, area_matrix(maps.shape[-2], height), area_matrix(maps.shape[-1], width))


def bilinear(maps: Map | Mask, height: int, width: int) -> Map:
    """Interpolate maps [..., h, w] bilinearly to float32 [..., height, width], with pixel centres at half-integers.

    Equal to `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`, so down-sampling is not antialiased.
    """
    return separable(maps, bilinear_matrix(maps.shape[-2], height), bilinear_matrix(maps.shape[-1], width))


def nearest(maps: Map, height: int, width: int) -> Map:
    """Up-sample maps [..., h, w] to [..., height, width] by nearest neighbours, with pixel centres at half-integers."""
    rows = ((np.arange(height) + 0.5) * maps.shape[-2] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * maps.shape[-1] / width).astype(int)
    return maps[..., rows[:, None], columns[None, :]]


def separable(maps: Map | Mask, rows: sparse.csr_array, columns: sparse.csr_array) -> Map:
    """Return R x C^T for every map x [..., H, W], with R [H', H] and C [W', W]: float32 [..., H', W']."""
    source = np.ascontiguousarray(maps, dtype=np.float32)
    result = np.empty((*source.shape[:-2], rows.shape[0], columns.shape[0]), np.float32)
    layers = source.reshape(-1, *source.shape[-2:])
    for layer, out in zip(layers, result.reshape(-1, *result.shape[-2:]), strict=True):
        if rows.shape[0] <= rows.shape[1]:  # compute the smaller product first
            out[:] = (columns @ np.ascontiguousarray((rows @ layer).T)).T
        else:
            out[:] = rows @ np.ascontiguousarray((columns @ np.ascontiguousarray(layer.T)).T)
    return result


@lru_cache(maxsize=1024)
def area_matrix(source: int, target: int) -> sparse.csr_array:
    """Return the weights [target, source] of area averaging along one axis. Every row sums to 1."""
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return sparse.csr_array((np.clip(overlap, 0, None) * (target / source)).astype(np.float32))


@lru_cache(maxsize=1024)
def bilinear_matrix(source: int, target: int) -> sparse.csr_array:
    """Return the weights [target, source] of bilinear interpolation along one axis. Every row sums to 1."""
    scale = np.float32(source) / np.float32(target)  # single precision, as in torch
    target_index = np.arange(target)
    position = np.clip((target_index.astype(np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0, source - 1)
    low = position.astype(np.int64)
    fraction = position - low.astype(np.float32)
    weights = np.zeros((target, source), np.float32)
    weights[target_index, np.minimum(low + 1, source - 1)] = fraction
    weights[target_index, low] += 1 - fraction
    return sparse.csr_array(weights)
