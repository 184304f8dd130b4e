"""Oracle ceilings: the score of a perfect prediction, and of a perfect label latent of a given size.

Values are cached by mask, because the runs of a study and the narratives of an image share their ground truths.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.masks import decode_checked
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.metrics.protocols import Pairs, phrase_ious

Floats = NDArray[np.float64]


def protocol_ceiling(protocol: str, pairs: Pairs) -> Floats:
    """Return the IoU [N] of predictions that equal the ground truth; with `native` 1, or 0 for an empty mask."""
    if protocol == "native":
        return (pairs.truth_area > 0).astype(np.float64)
    return np.array([_perfect(protocol, truth, *size) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _perfect(protocol: str, truth: bytes, height: int, width: int) -> float:
    numbers = [np.array([number]) for number in (height, width, 0, 0, 0)]
    return float(phrase_ious(protocol, Pairs([truth], [truth], *numbers))[0][0])


def latent_ceiling(pairs: Pairs, latent: tuple[int, int]) -> Floats:
    """Return the native IoU [N] of the ground truth reduced to latent size and read back.

    Args:
        latent: (h, w). The mask is averaged over the area of each cell, up-sampled bilinearly and cut at 0.5.
    """
    return np.array([_through_latent(truth, *size, *latent) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _through_latent(truth: bytes, height: int, width: int, latent_height: int, latent_width: int) -> float:
    mask = decode_checked(truth, height, width)
    upsampled = bilinear(area_reduce(mask, latent_height, latent_width), height, width)
    restored = upsampled >= 0.5 - 1e-6  # The tolerance includes values of 0.5 that were rounded down.
    union = np.count_nonzero(mask | restored)
    return np.count_nonzero(mask & restored) / union if union else 0.0
