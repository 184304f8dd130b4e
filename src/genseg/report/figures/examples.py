"""Strips of phrases with their pictures, and the figure of example phrases, chosen by IoU."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.errors import UserError
from genseg.report.figures import canvas

_LABEL = 0.2  # width of the labels, in inches
_STRIP_GAP = 0.15  # space between strips, in inches
_MAX_HEIGHT = 1.5  # maximum height of a picture, in inches
_PER_STRIP = 6


@dataclass(frozen=True)
class Strip:
    """Examples drawn side by side at equal height, in inches: rows of the phrase table with `prediction` and `note`."""

    examples: list[pd.Series]
    picture_height: float
    pictures: tuple[str, ...] = ("image", "ground truth", "prediction")
    heading: str = ""

    @property
    def widths(self) -> list[float]:
        return [self.picture_height * canvas.drawn_aspect(row) for row in self.examples]

    @property
    def captions(self) -> list[list[str]]:
        widths = zip(self.examples, self.widths, strict=True)
        return [canvas.wrap(row["phrase"], width, 3) for row, width in widths]

    @property
    def notes(self) -> list[list[str]]:
        return [canvas.wrap(row["note"], width, 4) for row, width in zip(self.examples, self.widths, strict=True)]

    @property
    def width(self) -> float:
        return _LABEL + sum(self.widths) + canvas.GAP * (len(self.examples) - 1)

    @property
    def height(self) -> float:
        heading = 1.5 * canvas.LINE if self.heading else 0.0
        if not self.examples:
            return heading
        lines = max(map(len, self.captions)) + max(map(len, self.notes)) + 0.3
        return heading + lines * canvas.LINE + len(self.pictures) * (self.picture_height + canvas.GAP) + canvas.GAP


def choose_examples(per_phrase: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return at most `count` rows at equidistant quantiles of `iou`, best first; a single row is the median."""
    ranked = per_phrase.sort_values(["iou", *KEY], ascending=[False, True, True, True], ignore_index=True)
    count = min(count, len(ranked))
    quantiles = np.linspace(0, 1, count) if count != 1 else np.array([0.5])
    return ranked.iloc[np.rint(quantiles * (len(ranked) - 1)).astype(int)].reset_index(drop=True)


def draw_examples(chosen: pd.DataFrame, phrases: pd.DataFrame, predictions: pd.DataFrame, path: Path, dpi: int) -> str:
    """Draw strips of up to six examples: phrase, image, ground truth, prediction with the truth's outline, IoU.

    Raises UserError if a phrase is not in the phrase table, or its image is missing or has another size.
    """
    # Join the chosen rows with the phrase table and the predictions.
    masks = predictions.set_index(KEY)["mask"].rename("prediction")
    rows = chosen[[*KEY, "iou"]].merge(phrases, on=KEY, how="left", validate="one_to_one").join(masks, on=KEY)
    if rows["phrase"].isna().any():
        key = tuple(rows.loc[rows["phrase"].isna(), KEY].iloc[0])
        raise UserError(f"phrase {key} has a score but no row in the phrase table; score again with this study's phrase table")
    examples = [row for _, row in rows.assign(note=[f"IoU {iou:.2f}" for iou in rows["iou"]]).iterrows()]

    # Divide the examples into strips and lay them out.
    count = -(-len(examples) // _PER_STRIP)
    parts = [[examples[index] for index in part] for part in np.array_split(np.arange(len(examples)), count)]
    heights = [fitting_height(part) for part in parts]
    max_height = 1.15 * min(_MAX_HEIGHT, *heights)
    strips = [Strip(part, min(max_height, height)) for part, height in zip(parts, heights, strict=True)]
    draw_strips(strips, max(strip.width for strip in strips), path, dpi)
    return (
        f"Test phrases at {len(examples)} equidistant quantiles of the main row's IoU, best to worst: image, ground truth, and "
        "prediction of GS with the outline of the ground truth (dashed)."
    )


def fitting_height(examples: list[pd.Series]) -> float:
    """Return the height in inches of the pictures of a strip that is as wide as the page."""
    return (canvas.WIDTH - _LABEL - canvas.GAP * (len(examples) - 1)) / sum(map(canvas.drawn_aspect, examples))


def draw_strips(strips: list[Strip], width: float, path: Path, dpi: int) -> None:
    """Draw strips below each other in a figure of `width` inches."""
    top = sum(strip.height for strip in strips) + _STRIP_GAP * (len(strips) - 1)
    with canvas.open_figure(width, top, path, dpi) as figure:
        for strip in strips:
            _draw_strip(figure, strip, top)
            top -= strip.height + _STRIP_GAP


def _draw_strip(figure: Figure, strip: Strip, top: float) -> None:
    if strip.heading:
        canvas.add_text(figure, 0.03, top - 0.03, strip.heading, ha="left", va="top", weight="bold")
        top -= 1.5 * canvas.LINE
    if not strip.examples:
        return
    height = strip.picture_height
    y = top - max(map(len, strip.captions)) * canvas.LINE - 1.5 * canvas.GAP
    bottoms = {name: y - index * (height + canvas.GAP) - height for index, name in enumerate(strip.pictures)}
    for name, bottom in bottoms.items():
        canvas.add_text(figure, 0.08, bottom + height / 2, name, rotation=90)
    x = _LABEL
    for row, width, caption, note in zip(strip.examples, strip.widths, strip.captions, strip.notes, strict=True):
        canvas.add_text(figure, x + width / 2, y + 1.2 * canvas.GAP, "\n".join(caption), va="baseline")
        image, truth = canvas.load_phrase_image(row), row_mask(row)
        prediction = None if pd.isna(row["prediction"]) else decode(row["prediction"], *truth.shape)
        pictures = {
            "image": image,
            "ground truth": canvas.overlay(image, truth, canvas.TRUTH_COLOUR),
            "prediction": canvas.overlay(image, prediction, canvas.PREDICTION_COLOUR),
        }
        for name, bottom in bottoms.items():
            axes = canvas.add_picture(figure, x, bottom, width, height, pictures[name])
            if name == "prediction":
                canvas.outline(axes, truth)
                if prediction is None:
                    axes.text(0.5, 0.5, "no prediction", transform=axes.transAxes, ha="center", va="center", color="white")
        note_top = min(bottoms.values()) - canvas.GAP
        canvas.add_text(figure, x + width / 2, note_top, "\n".join(note), va="top")
        x += width + canvas.GAP
