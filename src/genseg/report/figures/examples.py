"""Figure of example phrases, chosen by IoU."""

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
class _Strip:
    """Examples drawn side by side at equal height, in inches. Each has the columns `iou` and `prediction`."""

    examples: list[pd.Series]
    picture_height: float

    @property
    def widths(self) -> list[float]:
        return [self.picture_height * canvas.drawn_aspect(row) for row in self.examples]

    @property
    def captions(self) -> list[list[str]]:
        widths = zip(self.examples, self.widths, strict=True)
        return [canvas.wrap(row["phrase"], width, 3) for row, width in widths]

    @property
    def width(self) -> float:
        return _LABEL + sum(self.widths) + canvas.GAP * (len(self.examples) - 1)

    @property
    def height(self) -> float:
        caption_lines = max(map(len, self.captions))
        return caption_lines * canvas.LINE + 3 * self.picture_height + 4 * canvas.GAP + 1.3 * canvas.LINE


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
    examples = [row for _, row in rows.iterrows()]

    # Divide the examples into strips and lay them out.
    count = -(-len(examples) // _PER_STRIP)
    parts = [[examples[index] for index in part] for part in np.array_split(np.arange(len(examples)), count)]
    fitting_heights = [
        (canvas.WIDTH - _LABEL - canvas.GAP * (len(part) - 1)) / sum(map(canvas.drawn_aspect, part)) for part in parts
    ]
    max_height = 1.15 * min(_MAX_HEIGHT, *fitting_heights)
    strips = [_Strip(part, min(max_height, height)) for part, height in zip(parts, fitting_heights, strict=True)]
    total_height = sum(strip.height for strip in strips) + _STRIP_GAP * (count - 1)

    with canvas.open_figure(max(strip.width for strip in strips), total_height, path, dpi) as figure:
        top = total_height
        for strip in strips:
            _draw_strip(figure, strip, top)
            top -= strip.height + _STRIP_GAP
    return (
        f"Test phrases at {len(examples)} equidistant quantiles of the main row's IoU, best to worst: image, ground truth, and "
        "prediction of GS with the outline of the ground truth (dashed)."
    )


def _draw_strip(figure: Figure, strip: _Strip, top: float) -> None:
    height = strip.picture_height
    y = top - max(map(len, strip.captions)) * canvas.LINE - 1.5 * canvas.GAP
    bottoms = [y - index * (height + canvas.GAP) - height for index in range(3)]
    for bottom, name in zip(bottoms, ("image", "ground truth", "prediction"), strict=True):
        canvas.add_text(figure, 0.08, bottom + height / 2, name, rotation=90)
    x = _LABEL
    for row, width, caption in zip(strip.examples, strip.widths, strip.captions, strict=True):
        canvas.add_text(figure, x + width / 2, y + 1.2 * canvas.GAP, "\n".join(caption), va="baseline")
        image, truth = canvas.load_phrase_image(row), row_mask(row)
        prediction = None if pd.isna(row["prediction"]) else decode(row["prediction"], *truth.shape)
        truth_picture = canvas.overlay(image, truth, canvas.TRUTH_COLOUR)
        pictures = [image, truth_picture, canvas.overlay(image, prediction, canvas.PREDICTION_COLOUR)]
        boxes = [canvas.add_picture(figure, x, bottoms[index], width, height, pictures[index]) for index in range(3)]
        if prediction is None:
            boxes[2].text(0.5, 0.5, "no prediction", transform=boxes[2].transAxes, ha="center", va="center", color="white")
        if truth.any() and not truth.all():
            boxes[2].contour(truth.astype(float), levels=[0.5], colors=["white"], linewidths=0.7, linestyles="dashed")
        canvas.add_text(figure, x + width / 2, y - 3 * height - 3 * canvas.GAP, f"IoU {row['iou']:.2f}", va="top")
        x += width + canvas.GAP
