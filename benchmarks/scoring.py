"""Time of scoring many phrases at COCO's image size compared with brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.harness import Effort, Row, interleaved, versus
from genseg.artifacts.masks import decode_checked, encode, measure
from genseg.metrics.scoring import score_run

HEIGHT, WIDTH = 480, 640
THRESHOLDS = np.arange(0, 1, 1e-5)
"""Thresholds of the Panoptic Narrative Grounding benchmark."""


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Return one to three overlapping ellipses with wavy borders; their radii are log-uniform in 15 to 200 pixels."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(rng.integers(1, 4)):
        y, x = rows - rng.uniform(0, HEIGHT), columns - rng.uniform(0, WIDTH)
        radius_y, radius_x = np.exp(rng.uniform(np.log(15), np.log(200), 2))
        wave = 1 + 0.2 * np.sin(np.arctan2(y, x) * rng.integers(3, 9))
        mask |= (y / radius_y) ** 2 + (x / radius_x) ** 2 < wave
    return mask


def random_tables(count: int, distinct: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a phrase table and predictions of `count` phrases, nine per image; mask pairs repeat after `distinct` rows."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(distinct):
        truth = random_mask(rng)
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


def brute_force_ious(phrases: pd.DataFrame, predictions: pd.DataFrame) -> np.ndarray:
    """Return the IoUs by definition, from decoded masks."""
    ious = []
    for truth_code, code in zip(phrases["mask"], predictions["mask"], strict=True):
        truth, prediction = decode_checked(truth_code, HEIGHT, WIDTH), decode_checked(code, HEIGHT, WIDTH)
        ious.append((truth & prediction).sum() / (truth | prediction).sum())
    return np.array(ious)


def brute_force_recall(iou: np.ndarray) -> float:
    """Return AR by definition: the mean recall over all thresholds."""
    return float(np.mean([(iou >= threshold).mean() for threshold in THRESHOLDS]))


def scoring(effort: Effort) -> list[Row]:
    """Scoring of 100,000 phrases at 480 x 640, seconds per phrase: `score_run` (checks, IoU, and AR of all splits, without
    bootstrap) compared with brute force: decoding both masks, a dense IoU, and a comparison with every threshold. Brute force
    decodes only the first 1/50 of the phrases, and this time is multiplied by 50; thresholds are applied to all phrases."""
    # 1. Generate the tables.
    count = effort(100_000, 200)
    factor = effort(50, 2)
    phrases, predictions = random_tables(count, distinct=effort(400, 20))
    decoded = slice(None, count // factor)
    ious: list[np.ndarray] = []
    recalls: list[float] = []
    summaries: list[dict] = []

    # 2. Measure.
    calls = {
        "ours": lambda: summaries.append(score_run(phrases, predictions, replicates=0)[1]),
        "decoding": lambda: ious.append(brute_force_ious(phrases[decoded], predictions[decoded])),
        "thresholds": lambda: recalls.append(brute_force_recall(np.tile(ious[-1], factor))),
    }
    seconds = interleaved(calls, effort(3, 1))
    brute_force = [factor * a + b for a, b in zip(seconds["decoding"], seconds["thresholds"], strict=True)]

    # 3. Compare the results.
    ar, brute_ar = summaries[-1]["ar"]["overall"], recalls[-1]
    if abs(ar - brute_ar) > 2e-5:
        raise AssertionError(f"score_run gives AR {ar}, but brute force gives {brute_ar}")
    masks = phrases["mask"].head(len(ious[-1])).tolist()
    length = float(np.mean([len(code) for code in masks]))
    area = float(measure(masks).foreground.mean() / (HEIGHT * WIDTH))
    facts = {"ar": ar, "brute_ar": brute_ar, "bytes_per_mask": length, "area_share": area}
    return [versus(f"{count} phrases", seconds["ours"], brute_force, count, 50.0, **facts)]
