"""Canvas of all figures: measured in inches from the lower left, and saved as the same bytes for the same input."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from genseg.artifacts.files import atomic_path
from genseg.artifacts.masks import Mask
from genseg.data.images import load_image
from genseg.errors import UserError

Image = NDArray[np.uint8]

WIDTH = 7.0
"""Width of a figure in inches: two columns of a conference page."""
FONT = 7.0
"""Font size in points."""
LINE = 1.25 * FONT / 72
"""Height of a line of text in inches."""
GAP = 0.05
"""Space between pictures in inches."""
TRUTH_COLOUR, PREDICTION_COLOUR = "#009E73", "#E69F00"


# ----------------------------------------------------------------------------------------------------------- the canvas
@contextmanager
def open_figure(width: float, height: float, path: Path, dpi: int) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches and save it as a PNG without dates or versions."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def add_box(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes without ticks or frame, for a picture."""
    figure_width, figure_height = figure.get_size_inches()
    box = figure.add_axes((x / figure_width, y / figure_height, width / figure_width, height / figure_height))
    box.set_axis_off()
    return box


def add_plot(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes with ticks and an open frame."""
    axes = add_box(figure, x, y, width, height)
    axes.set_axis_on()
    axes.tick_params(labelsize=FONT, width=0.5)
    for side, line in axes.spines.items():
        line.set_linewidth(0.5)
        line.set_visible(side in ("left", "bottom"))
    return axes


def add_text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    ha: str = "center",
    va: str = "center",
    rotation: float = 0,
    math: bool = False,
) -> None:
    """Add text at a point. Dollar signs start a formula only if `math` is set."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, ha=ha, va=va, rotation=rotation, fontsize=FONT, linespacing=1.1, parse_math=math)


def wrap(text: str, width: float, max_lines: int) -> list[str]:
    """Wrap text into lines of `width` inches; text beyond `max_lines` is replaced by an ellipsis."""
    characters = max(4, int(width * 72 / (0.55 * FONT)))
    return textwrap.wrap(text, characters, max_lines=max_lines, placeholder="…") or [""]


# ------------------------------------------------------------------------------------------------------------- pictures
def load_phrase_image(row: pd.Series) -> Image:
    """Load the image [H, W, 3] of one row of the phrase table.

    Raises:
        UserError: the row has no `file_name`, or the image has another size than the row.
    """
    if not isinstance(row["file_name"], str):
        raise UserError(f"phrase {row['phrase']!r}: the phrase table has no file_name for its image; run `genseg data` again")
    image = np.asarray(load_image(row["file_name"]), dtype=np.uint8)
    if image.shape[:2] != (row["height"], row["width"]):
        raise UserError(
            f"{row['file_name']}: the image is {image.shape[0]} x {image.shape[1]} pixels, the phrase table says "
            f"{row['height']} x {row['width']}; run `genseg data` again"
        )
    return image


def drawn_aspect(width: float, height: float) -> float:
    """Return width over height as drawn: extreme formats are squeezed into [0.6, 2]."""
    return min(max(width / height, 0.6), 2.0)


def darken(image: Image) -> Image:
    """Return a picture [H, W, 3] in dark grey, the background of overlays."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(np.rint(10 + 0.5 * grey).astype(np.uint8)[..., None], 3, axis=2)


def overlay(image: Image, mask: Mask, colour: str) -> Image:
    """Return the darkened picture [H, W, 3], tinted with `colour` where the mask [H, W] is set."""
    tint = 255 * np.array(matplotlib.colors.to_rgb(colour), np.float32)
    tinted = darken(image)
    tinted[mask] = np.rint(0.45 * image[mask] + 0.55 * tint).astype(np.uint8)
    return tinted
