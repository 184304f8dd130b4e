"""Examples at equidistant quantiles of the IoU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genseg.artifacts.masks import Mask, decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.errors import UserError
from genseg.report.figures import canvas

_LABEL = 0.2
_STRIP_GAP = 0.15
_PER_STRIP = 6
_MAX_HEIGHT = 1.5
_MAX_LINES = 3


@dataclass(frozen=True)
class Example:
    phrase: str
    iou: float
    image: canvas.Image
    """[H, W, 3]"""
    truth: Mask
    """[H, W]"""
    prediction: Mask | None
    """[H, W]; None if the phrase has no prediction."""


@dataclass(frozen=True)
class _Strip:
    """A row of examples with pictures of equal height; lengths in inches."""

    examples: list[Example]
    picture_height: float
    widths: list[float]
    caption_lines: int

    @property
    def width(self) -> float:
        return _LABEL + sum(self.widths) + canvas.GAP * (len(self.widths) - 1)

    @property
    def height(self) -> float:
        return self.caption_lines * canvas.LINE + 3 * self.picture_height + 4 * canvas.GAP + 1.3 * canvas.LINE


def choose_examples(per_phrase: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return rows at equidistant quantiles of `iou`, best first, worst last; ties are broken by the key.

    If there are fewer than `count` rows, every row is returned once. A single row is the median.
    """
    ranked = per_phrase.sort_values(["iou", *KEY], ascending=[False, True, True, True], ignore_index=True)
    count = min(count, len(ranked))
    quantiles = np.linspace(0, 1, count) if count != 1 else np.array([0.5])
    return ranked.iloc[np.rint(quantiles * (len(ranked) - 1)).astype(int)].reset_index(drop=True)


def load_examples(chosen: pd.DataFrame, phrases: pd.DataFrame, predictions: pd.DataFrame) -> list[Example]:
    """Join the chosen rows with the phrase table and the predictions, and load the images.

    Raises:
        UserError: a phrase is not in the phrase table, or its image is missing or has another size.
    """
    joined = chosen[[*KEY, "iou"]].merge(phrases, on=KEY, how="left", validate="one_to_one")
    masks = predictions.set_index(KEY)["mask"].to_dict()
    examples = []
    for _, row in joined.iterrows():
        key = tuple(row[name] for name in KEY)
        if pd.isna(row["phrase"]):
            raise UserError(
                f"phrase {key} has a score but no row in the phrase table; score again with this study's phrase table"
            )
        counts = masks.get(key)
        prediction = None if counts is None else decode(counts, int(row["height"]), int(row["width"]))
        image = canvas.load_phrase_image(row)
        examples.append(Example(str(row["phrase"]), float(row["iou"]), image, row_mask(row), prediction))
    return examples


def examples_caption(count: int) -> str:
    return (
        f"Test phrases at {count} equidistant quantiles of the main row's IoU, best to worst: image, ground truth, and "
        "prediction of GS with the outline of the ground truth (dashed)."
    )


def draw_examples(examples: list[Example], path: Path, dpi: int) -> None:
    """Draw equal strips of up to six examples: phrase, image, ground truth, prediction with the truth's outline, IoU."""
    # 1. Divide the examples into strips and lay them out.
    count = -(-len(examples) // _PER_STRIP)
    parts = [[examples[index] for index in part] for part in np.array_split(np.arange(len(examples)), count)]
    max_height = min(_MAX_HEIGHT, *(_fitting_height(part) for part in parts))
    strips = [_lay_out(part, max_height) for part in parts]
    total_height = sum(strip.height for strip in strips) + _STRIP_GAP * (count - 1)

    # 2. Draw the strips from top to bottom.
    with canvas.open_figure(max(strip.width for strip in strips), total_height, path, dpi) as figure:
        top = total_height
        for strip in strips:
            _draw_strip(figure, strip, top)
            top -= strip.height + _STRIP_GAP


def _fitting_height(examples: list[Example]) -> float:
    """Return the picture height (inches) at which a strip fills the width."""
    return (canvas.WIDTH - _LABEL - canvas.GAP * (len(examples) - 1)) / sum(map(_aspect, examples))


def _lay_out(examples: list[Example], max_height: float) -> _Strip:
    height = min(max_height * 1.15, _fitting_height(examples))
    widths = [height * _aspect(example) for example in examples]
    lines = max(len(canvas.wrap(example.phrase, width, _MAX_LINES)) for example, width in zip(examples, widths, strict=True))
    return _Strip(examples, height, widths, lines)


def _aspect(example: Example) -> float:
    return canvas.drawn_aspect(example.image.shape[1], example.image.shape[0])


def _draw_strip(figure: Figure, strip: _Strip, top: float) -> None:
    height = strip.picture_height
    y = top - strip.caption_lines * canvas.LINE - 1.5 * canvas.GAP
    for index, name in enumerate(("image", "ground truth", "prediction")):
        canvas.add_text(figure, 0.08, y - index * (height + canvas.GAP) - height / 2, name, rotation=90)
    x = _LABEL
    for example, width in zip(strip.examples, strip.widths, strict=True):
        caption = "\n".join(canvas.wrap(example.phrase, width, _MAX_LINES))
        canvas.add_text(figure, x + width / 2, y + 1.2 * canvas.GAP, caption, va="baseline")
        boxes = [canvas.add_box(figure, x, y - index * (height + canvas.GAP) - height, width, height) for index in range(3)]
        boxes[0].imshow(example.image, aspect="auto")
        boxes[1].imshow(canvas.overlay(example.image, example.truth, canvas.TRUTH_COLOUR), aspect="auto")
        _draw_prediction(boxes[2], example)
        canvas.add_text(figure, x + width / 2, y - 3 * height - 3 * canvas.GAP, f"IoU {example.iou:.2f}", va="top")
        x += width + canvas.GAP


def _draw_prediction(box: Axes, example: Example) -> None:
    if example.prediction is None:
        box.imshow(canvas.darken(example.image), aspect="auto")
        box.text(
            0.5, 0.5, "no prediction", transform=box.transAxes, ha="center", va="center", fontsize=canvas.FONT, color="white"
        )
    else:
        box.imshow(canvas.overlay(example.image, example.prediction, canvas.PREDICTION_COLOUR), aspect="auto")
    if example.truth.any() and not example.truth.all():
        box.contour(example.truth.astype(float), levels=[0.5], colors=["white"], linewidths=0.7, linestyles="dashed")
