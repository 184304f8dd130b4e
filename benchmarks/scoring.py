"""Scoring many phrases at COCO's size against brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.harness import Effort, Row, interleaved, versus
from genseg.artifacts.masks import decode_checked, encode, measure
from genseg.metrics.scoring import score_run

HEIGHT, WIDTH = 480, 640
THRESHOLDS = np.arange(0, 1, 1e-5)
"""Those of the Panoptic Narrative Grounding benchmark."""


def some_mask(rng: np.random.Generator) -> np.ndarray:
    """One to three overlapping ellipses with wavy borders, radii of 15 to 200 pixels, log-uniform."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(rng.integers(1, 4)):
        down, across = rows - rng.uniform(0, HEIGHT), columns - rng.uniform(0, WIDTH)
        high, wide = np.exp(rng.uniform(np.log(15), np.log(200), 2))
        wave = 1 + 0.2 * np.sin(np.arctan2(down, across) * rng.integers(3, 9))
        mask |= (down / high) ** 2 + (across / wide) ** 2 < wave
    return mask


def tables(count: int, distinct: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A phrase table and predictions of `count` phrases, nine an image, whose pairs of masks repeat after `distinct`."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(distinct):
        truth = some_mask(rng)
        pairs.append((encode(truth), encode(np.roll(truth, rng.integers(-20, 21, 2), (0, 1)))))
    number = np.arange(count)
    phrases = pd.DataFrame(
        {
            "image_id": number // 9,
            "narrative_id": (number // 9).astype(str),
            "phrase_id": number % 9,
            "split": "test",
            "height": HEIGHT,
            "width": WIDTH,
            "is_thing": number % 2 == 0,
            "is_plural": number % 3 == 0,
            "segment_ids": None,
            "tags": None,
            "mask": [pairs[k % distinct][0] for k in range(count)],
        }
    )
    predictions = phrases[["image_id", "narrative_id", "phrase_id"]].assign(
        mask=[bytes(bytearray(pairs[k % distinct][1])) for k in range(count)], score=np.float32(0.5)
    )
    return phrases, predictions


def brute_ious(phrases: pd.DataFrame, predictions: pd.DataFrame) -> np.ndarray:
    """IoU by definition: both masks decoded, dense and / or."""
    ious = []
    for truth_code, code in zip(phrases["mask"], predictions["mask"], strict=True):
        truth, prediction = decode_checked(truth_code, HEIGHT, WIDTH), decode_checked(code, HEIGHT, WIDTH)
        ious.append((truth & prediction).sum() / (truth | prediction).sum())
    return np.array(ious)


def brute_recall(iou: np.ndarray) -> float:
    """AR by definition: every threshold compared with every IoU."""
    return float(np.mean([(iou >= threshold).mean() for threshold in THRESHOLDS]))


def scoring(effort: Effort) -> list[Row]:
    """Scoring 100,000 phrases at 480 x 640, seconds per phrase: `score_run` (checks, IoU, AR of all splits, no bootstrap)
    against brute force: both masks decoded, dense and / or, every threshold compared. Brute force decodes every 50th phrase,
    its time times 50; its thresholds are compared with all phrases."""
    count = effort(100_000, 200)
    every = effort(50, 2)
    phrases, predictions = tables(count, distinct=effort(400, 20))
    some = slice(None, count // every)
    iou: list[np.ndarray] = []
    recall: list[float] = []
    found: list[dict] = []
    calls = {
        "ours": lambda: found.append(score_run(phrases, predictions, replicates=0)[1]),
        "decoding": lambda: iou.append(brute_ious(phrases[some], predictions[some])),
        "thresholds": lambda: recall.append(brute_recall(np.tile(iou[-1], every))),
    }
    seconds = interleaved(calls, effort(3, 1))
    brute = [every * a + b for a, b in zip(seconds["decoding"], seconds["thresholds"], strict=True)]
    ours, theirs = found[-1]["ar"]["overall"], recall[-1]
    if abs(ours - theirs) > 2e-5:
        raise AssertionError(f"AR {ours} is not brute force's {theirs}")
    length = float(np.mean([len(code) for code in phrases["mask"].head(len(iou[-1]))]))
    area = float(measure(phrases["mask"].head(len(iou[-1])).tolist()).foreground.mean() / (HEIGHT * WIDTH))
    facts = {"ar": ours, "brute_ar": theirs, "bytes_per_mask": length, "area_share": area}
    return [versus(f"{count} phrases", seconds["ours"], brute, count, 50.0, **facts)]
