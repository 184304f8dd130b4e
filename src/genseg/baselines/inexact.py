"""Inexact masks made from ground truth: what a refiner is tested on where the error's kind and size are to be known.

Each kind spoils a mask by an *amount*; `find_amount` searches the amount whose mean IoU with the ground truth is the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from genseg.params import Inexact

SEARCH_PHRASES = 500
"""The amount is searched on at most so many phrases, chosen by hash."""
MOST_POINTS = 64.0
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Kind:
    """A way to spoil masks: `prepare(mask, seed)` does once what every amount needs and gives amount -> mask.

    exact, far: amounts between which the IoU runs from its best to its worst.
    """

    prepare: Callable[[Mask, int], Callable[[float], Mask]]
    exact: float
    far: float


def _box(mask: Mask, seed: int) -> Callable[[float], Mask]:
    """The bounding box, grown on every side by `amount` of its own height and width."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))

    def spoil(amount: float) -> Mask:
        box = np.zeros_like(mask)
        if mask.any():
            spans = []
            for places, side in ((rows, mask.shape[0]), (columns, mask.shape[1])):
                margin = amount * (places[-1] - places[0] + 1)
                spans.append(slice(max(0, round(places[0] - margin)), min(side, round(places[-1] + 1 + margin))))
            box[tuple(spans)] = True
        return box

    return spoil


def _dilated(mask: Mask, seed: int) -> Callable[[float], Mask]:
    """All pixels within `amount` of the root of the mask's area."""
    distance = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    return lambda amount: distance <= amount * np.sqrt(mask.sum())


def _eroded(mask: Mask, seed: int) -> Callable[[float], Mask]:
    """Pixels farther than `amount` of the root of the area from the outside; the deepest ones always stay. The picture's
    edge is no outside."""
    distance = distance_transform_edt(mask) if not mask.all() else np.where(mask, np.inf, 0.0)
    deepest = distance.max()
    return lambda amount: mask & (distance >= min(1 + amount * np.sqrt(mask.sum()), deepest))


def _shifted(mask: Mask, seed: int) -> Callable[[float], Mask]:
    """Moved by `amount` of the root of the area in a random direction; what leaves the picture is lost."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)

    def spoil(amount: float) -> Mask:
        length = amount * np.sqrt(mask.sum())
        moved = np.zeros_like(mask)
        target, source = [], []
        for step, side in zip((round(length * np.sin(angle)), round(length * np.cos(angle))), mask.shape, strict=True):
            target.append(slice(min(side, max(0, step)), max(0, min(side, side + step))))
            source.append(slice(min(side, max(0, -step)), max(0, min(side, side - step))))
        moved[tuple(target)] = mask[tuple(source)]
        return moved

    return spoil


def _scribble(mask: Mask, seed: int) -> Callable[[float], Mask]:
    """Convex hull of a scribble through `amount` random pixels of the mask; of a broken amount the part behind the point is
    the chance of one pixel more."""
    rng = np.random.default_rng(seed)
    chance = rng.random()
    inside = np.argwhere(mask)
    points = inside[rng.integers(len(inside), size=int(MOST_POINTS) + 1)] if len(inside) else inside

    def spoil(amount: float) -> Mask:
        drawn = points[: int(amount) + (chance < amount % 1)]
        return _hull(drawn, mask.shape) if len(drawn) else np.zeros_like(mask)

    return spoil


def _hull(points: NDArray[np.int64], shape: tuple[int, ...]) -> Mask:
    """Pixels whose centres lie in the convex hull of pixels [n, 2] (row, column), exactly."""
    low, high = points.min(0), points.max(0)
    rows, columns = np.ogrid[low[0] : high[0] + 1, low[1] : high[1] + 1]
    inside = np.ones((high - low + 1).tolist(), bool)
    ordered = sorted(set(map(tuple, points.tolist())))
    for chain in (ordered, ordered[::-1]):  # Andrew's monotone chain; what lies right of an edge is outside
        corners: list[tuple[int, int]] = []
        for point in chain:
            while len(corners) > 1 and _turn(corners[-2], corners[-1], *point) <= 0:
                corners.pop()
            corners.append(point)
        for start, end in pairwise(corners):
            inside &= _turn(start, end, rows, columns) >= 0
    hull = np.zeros(shape, bool)
    hull[low[0] : high[0] + 1, low[1] : high[1] + 1] = inside
    return hull


def _turn(start: tuple[int, int], end: tuple[int, int], row: Any, column: Any) -> Any:
    """Positive left of the edge, negative right of it."""
    return (end[0] - start[0]) * (column - start[1]) - (end[1] - start[1]) * (row - start[0])


KINDS = {
    "box": Kind(_box, 0.0, 4.0),
    "dilated": Kind(_dilated, 0.0, 4.0),
    "eroded": Kind(_eroded, 0.0, 4.0),
    "shifted": Kind(_shifted, 0.0, 4.0),
    "scribble": Kind(_scribble, MOST_POINTS, 1.0),
}


def _prepared(rows: pd.DataFrame, kind: Inexact, seed: int) -> list[tuple[Mask, Callable[[float], Mask]]]:
    found = []
    for _, row in rows.iterrows():
        mask = row_mask(row)
        found.append((mask, KINDS[kind].prepare(mask, derive_seed(seed, "inexact", kind, *row[KEY].tolist()))))
    return found


def _mean_iou(items: Sequence[tuple[Mask, Callable[[float], Mask]]], amount: float) -> float:
    total = 0.0
    for mask, spoil in items:
        made = spoil(amount)
        total += (mask & made).sum() / max(1, (mask | made).sum())
    return total / len(items)


def find_amount(rows: pd.DataFrame, kind: Inexact, target: float, seed: int) -> tuple[float, float]:
    """The amount whose mean IoU over the phrases of `rows` is `target`, by bisection, and the mean IoU that it reaches.

    Raises:
        UserError: the kind cannot reach this mean IoU; the message names the range that it reaches.
    """
    keys = list(rows[KEY].itertuples(index=False, name=None))
    order = sorted(range(len(rows)), key=lambda i: hash_unit(seed, "inexact search", *keys[i]))
    items = _prepared(rows.iloc[sorted(order[:SEARCH_PHRASES])], kind, seed)
    exact, far = KINDS[kind].exact, KINDS[kind].far
    best, worst = _mean_iou(items, exact), _mean_iou(items, far)
    if not worst - TOLERANCE <= target <= best + TOLERANCE:
        raise UserError(
            f"baselines.inexact.{kind}: a mean IoU of {target} is out of reach on these phrases; choose one between "
            f"{worst:.2f} and {best:.2f}"
        )
    reached = best
    for _ in range(20):
        amount = (exact + far) / 2
        reached = _mean_iou(items, amount)
        if abs(reached - target) < TOLERANCE:
            break
        if reached > target:
            exact = amount
        else:
            far = amount
    return amount, reached


def inexact_masks(rows: pd.DataFrame, kind: Inexact, amount: float, seed: int) -> pd.DataFrame:
    """Predictions for phrases: their ground truth, spoiled. Scores are 1, and 0 for an empty mask."""
    made = [spoil(amount) for _, spoil in _prepared(rows, kind, seed)]
    codes, scores = [masks.encode(mask) for mask in made], [float(mask.any()) for mask in made]
    return rows[KEY].assign(mask=codes, score=np.array(scores, np.float32))
