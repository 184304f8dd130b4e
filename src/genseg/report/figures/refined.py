"""Masks before and after refinement by G4Seg, with the discrepancy that guided it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask, decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.predictions import read_maps, read_predictions
from genseg.report.figures import canvas

_HEADS = ("image", "coarse", "discrepancy", "refined", "ground truth")
_CAPTION = 1.4
"""Width of the phrase beside its pictures, in inches."""


@dataclass(frozen=True)
class RefinedExample:
    method: str
    phrase: str
    image: canvas.Image
    """[H, W, 3]"""
    coarse: Mask
    refined: Mask
    truth: Mask
    """[H, W], like the other two masks."""
    discrepancy: NDArray[np.float32]
    """[h, w] in [0, 1]."""


def load_refined(entries: list[dict[str, Any]], folder: Path, phrases: pd.DataFrame) -> list[RefinedExample]:
    """Load the examples that refinement stored in `folder` for the figure.

    Args:
        entries: the `refined` of the manifest of refinement; only phrase masks refined by G4Seg are loaded.
    """
    phrase_rows = phrases.set_index(KEY)
    examples = []
    for entry in entries:
        if entry["refiner"] != "g4seg" or entry["coarse"] is None:
            continue
        path = folder / f"{entry['baseline']}.parquet"
        coarse_masks = read_predictions(entry["coarse"]).set_index(KEY)["mask"]
        for (_, refined), discrepancy in zip(read_predictions(path).iterrows(), read_maps(path), strict=True):
            key = tuple(refined[name] for name in KEY)
            row = phrase_rows.loc[key]
            size = int(row["height"]), int(row["width"])
            coarse, after = decode(coarse_masks.loc[key], *size), decode(refined["mask"], *size)
            image, phrase = canvas.load_phrase_image(row), str(row["phrase"])
            examples.append(RefinedExample(entry["label"], phrase, image, coarse, after, row_mask(row), discrepancy))
    return examples


def refined_caption() -> str:
    return (
        "G4Seg (ours): coarse mask, discrepancy of the first iteration, refined mask and ground truth of phrases chosen by "
        "hash from the refined part of test."
    )


def draw_refined(examples: list[RefinedExample], path: Path, dpi: int) -> None:
    """Draw a row per phrase: image, coarse mask, G4Seg's discrepancy, refined mask, ground truth."""
    # 1. Lay out the columns and rows; lengths in inches.
    columns = len(_HEADS)
    width = min(1.0, (canvas.WIDTH - _CAPTION - canvas.GAP * columns) / columns)
    lefts = [_CAPTION + index * (width + canvas.GAP) for index in range(columns)]
    heights = [width / canvas.drawn_aspect(example.image.shape[1], example.image.shape[0]) for example in examples]
    head = 1.6 * canvas.LINE
    total_height = head + sum(heights) + canvas.GAP * len(heights)

    # 2. Draw the heads and the rows.
    with canvas.open_figure(_CAPTION + columns * (width + canvas.GAP), total_height, path, dpi) as figure:
        for x, name in zip(lefts, _HEADS, strict=True):
            canvas.add_text(figure, x + width / 2, total_height - head / 2, name)
        y = total_height - head
        for example, height in zip(examples, heights, strict=True):
            boxes = [canvas.add_box(figure, x, y - height, width, height) for x in lefts]
            caption = "\n".join([*canvas.wrap(example.method, _CAPTION, 3), *canvas.wrap(f"“{example.phrase}”", _CAPTION, 3)])
            canvas.add_text(figure, 0.03, y - height / 2, caption, ha="left")
            boxes[0].imshow(example.image, aspect="auto")
            boxes[1].imshow(canvas.overlay(example.image, example.coarse, canvas.PREDICTION_COLOUR), aspect="auto")
            boxes[2].imshow(example.discrepancy, cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            boxes[3].imshow(canvas.overlay(example.image, example.refined, canvas.PREDICTION_COLOUR), aspect="auto")
            boxes[4].imshow(canvas.overlay(example.image, example.truth, canvas.TRUTH_COLOUR), aspect="auto")
            y -= height + canvas.GAP
