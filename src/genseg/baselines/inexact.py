"""Inexact masks made from ground truth: coarse masks with errors of known kind and size, for testing refiners.

Each kind degrades a mask by an *amount*; `find_amount` finds the amount that gives the target mean IoU with the ground truth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from genseg.artifacts import masks
from genseg.artifacts.masks import Mask
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import hash_unit, row_mask
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.params.baselines import Inexact

SEARCH_PHRASES = 500
"""Maximum number of phrases, chosen by hash, on which the amount is searched."""
MAX_POINTS = 64.0
"""Largest number of pixels of a scribble."""
TOLERANCE = 1e-3
"""Accepted difference of the mean IoU from its target."""

Degrade = Callable[[float], Mask]


@dataclass(frozen=True)
class Kind:
    """A way to degrade masks. `best` and `worst` are the amounts with the highest and the lowest mean IoU."""

    prepare: Callable[[Mask, int], Degrade]
    """(mask, seed) -> a function from the amount to the degraded mask. What does not depend on the amount is computed once."""
    best: float = 0.0
    worst: float = 4.0


def _box(mask: Mask, seed: int) -> Degrade:
    """The bounding box, enlarged on every side by `amount` times its height or width."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))

    def degrade(amount: float) -> Mask:
        box = np.zeros_like(mask)
        if mask.any():
            spans = []
            for lines, side in ((rows, mask.shape[0]), (columns, mask.shape[1])):
                margin = amount * (lines[-1] - lines[0] + 1)
                spans.append(slice(max(0, round(lines[0] - margin)), min(side, round(lines[-1] + 1 + margin))))
            box[tuple(spans)] = True
        return box

    return degrade


def _dilated(mask: Mask, seed: int) -> Degrade:
    """All pixels within a distance of `amount` times the square root of the mask's area."""
    distance = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    return lambda amount: distance <= amount * np.sqrt(mask.sum())


def _eroded(mask: Mask, seed: int) -> Degrade:
    """Pixels farther from the outside than `amount` times the square root of the area; the deepest ones always remain."""
    # The area beyond the edge of the image does not count as outside the mask.
    distance = distance_transform_edt(mask) if not mask.all() else np.where(mask, np.inf, 0.0)
    deepest = distance.max()
    return lambda amount: mask & (distance >= min(1 + amount * np.sqrt(mask.sum()), deepest))


def _shifted(mask: Mask, seed: int) -> Degrade:
    """The mask shifted by `amount` times the square root of the area in a random direction, cut off at the image's edge."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)

    def degrade(amount: float) -> Mask:
        length = amount * np.sqrt(mask.sum())
        shifted = np.zeros_like(mask)
        target, source = [], []
        for step, side in zip((round(length * np.sin(angle)), round(length * np.cos(angle))), mask.shape, strict=True):
            target.append(slice(min(side, max(0, step)), max(0, min(side, side + step))))
            source.append(slice(min(side, max(0, -step)), max(0, min(side, side - step))))
        shifted[tuple(target)] = mask[tuple(source)]
        return shifted

    return degrade


def _scribble(mask: Mask, seed: int) -> Degrade:
    """Convex hull of `amount` random pixels of the mask; a fractional part is the probability of one more pixel."""
    rng, inside = np.random.default_rng(seed), np.argwhere(mask)
    chance = rng.random()
    points = inside[rng.integers(len(inside), size=int(MAX_POINTS) + 1)] if len(inside) else inside

    def degrade(amount: float) -> Mask:
        scribble = points[: int(amount) + (chance < amount % 1)]
        return _hull(scribble, mask.shape) if len(scribble) else np.zeros_like(mask)

    return degrade


def _hull(points: NDArray[np.int64], shape: tuple[int, ...]) -> Mask:
    """Return the pixels whose centres lie in the convex hull of pixels [n, 2] (row, column), in exact arithmetic."""
    low, high = points.min(0), points.max(0)
    rows, columns = np.ogrid[low[0] : high[0] + 1, low[1] : high[1] + 1]
    inside = np.ones((high - low + 1).tolist(), bool)
    ordered = sorted(set(map(tuple, points.tolist())))
    for chain in (ordered, ordered[::-1]):  # Andrew's monotone chain; pixels right of an edge are outside
        corners: list[tuple[int, int]] = []
        for point in chain:
            while len(corners) > 1 and _side(corners[-2], corners[-1], *point) <= 0:
                corners.pop()
            corners.append(point)
        for start, end in pairwise(corners):
            inside &= _side(start, end, rows, columns) >= 0
    hull = np.zeros(shape, bool)
    hull[low[0] : high[0] + 1, low[1] : high[1] + 1] = inside
    return hull


def _side(start: tuple[int, int], end: tuple[int, int], row: Any, column: Any) -> Any:
    """Return a positive number left of the edge and a negative one right of it (a cross product)."""
    return (end[0] - start[0]) * (column - start[1]) - (end[1] - start[1]) * (row - start[0])


KINDS = {
    "box": Kind(_box),
    "dilated": Kind(_dilated),
    "eroded": Kind(_eroded),
    "shifted": Kind(_shifted),
    "scribble": Kind(_scribble, best=MAX_POINTS, worst=1.0),
}


def _prepare(rows: pd.DataFrame, kind: Inexact, seed: int) -> Iterator[tuple[Mask, Degrade]]:
    """Yield every phrase's ground truth, and the function that degrades it."""
    for (_, row), key in zip(rows.iterrows(), rows[KEY].itertuples(index=False, name=None), strict=True):
        truth = row_mask(row)
        yield truth, KINDS[kind].prepare(truth, derive_seed(seed, "inexact", kind, *key))


def _mean_iou(pairs: Sequence[tuple[Mask, Degrade]], amount: float) -> float:
    total = 0.0
    for mask, degrade in pairs:
        degraded = degrade(amount)
        total += (mask & degraded).sum() / max(1, (mask | degraded).sum())
    return total / len(pairs)


def find_amount(rows: pd.DataFrame, kind: Inexact, target: float, seed: int) -> tuple[float, float]:
    """Find the amount whose mean IoU is `target` by bisection, and return it with the mean IoU that it reaches.

    The mean is over at most `SEARCH_PHRASES` of the phrases. Raises UserError if the target is outside the reachable range.
    """
    keys = list(rows[KEY].itertuples(index=False, name=None))
    order = sorted(range(len(rows)), key=lambda i: hash_unit(seed, "inexact search", *keys[i]))
    pairs = list(_prepare(rows.iloc[sorted(order[:SEARCH_PHRASES])], kind, seed))
    best, worst = KINDS[kind].best, KINDS[kind].worst
    highest, lowest = _mean_iou(pairs, best), _mean_iou(pairs, worst)
    if not lowest - TOLERANCE <= target <= highest + TOLERANCE:
        remedy = f"choose one between {lowest:.2f} and {highest:.2f}"
        raise UserError(f"baselines.inexact.{kind}: a mean IoU of {target} is out of reach on these phrases; {remedy}")
    for _ in range(20):
        amount = (best + worst) / 2
        iou = _mean_iou(pairs, amount)
        if abs(iou - target) < TOLERANCE:
            break
        if iou > target:
            best = amount
        else:
            worst = amount
    return amount, iou


def inexact_masks(rows: pd.DataFrame, kind: Inexact, amount: float, seed: int) -> pd.DataFrame:
    """Return predictions for phrases: their degraded ground truth. Scores are 1, or 0 for an empty mask."""
    codes, scores = [], []
    for _, degrade in _prepare(rows, kind, seed):
        mask = degrade(amount)
        codes.append(masks.encode(mask))
        scores.append(float(mask.any()))
    return rows[KEY].assign(mask=codes, score=np.array(scores, np.float32))
