"""Oracle ceilings: what a perfect prediction scores, and what any label latent of a size can.

Values are remembered by mask, because the runs of a study and the narratives of an image share their ground truths.
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
    """IoU [N] of a prediction that equals the ground truth. `native` gives 1, or 0 for a mask without a pixel."""
    if protocol == "native":
        return (pairs.truth_area > 0).astype(np.float64)
    return np.array([_perfect(protocol, truth, *size) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _perfect(protocol: str, truth: bytes, height: int, width: int) -> float:
    numbers = [np.array([number]) for number in (height, width, 0, 0, 0)]
    return float(phrase_ious(protocol, Pairs([truth], [truth], *numbers))[0][0])


def latent_ceiling(pairs: Pairs, latent: tuple[int, int]) -> Floats:
    """`native` IoU [N] of the ground truth reduced by area to latent (h, w) and read back: bilinear, >= 0.5."""
    return np.array([_through_latent(truth, *size, *latent) for truth, _, *size in pairs.rows()], np.float64)


@lru_cache(maxsize=65536)
def _through_latent(truth: bytes, height: int, width: int, latent_height: int, latent_width: int) -> float:
    mask = decode_checked(truth, height, width)
    read = (
        bilinear(area_reduce(mask, latent_height, latent_width), height, width) >= 0.5 - 1e-6
    )  # one half, however it is rounded
    union = np.count_nonzero(mask | read)
    return np.count_nonzero(mask & read) / union if union else 0.0
