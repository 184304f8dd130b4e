"""Drawing functions for all figures. Positions are in inches from the lower left; equal inputs give equal bytes."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from genseg.artifacts.files import atomic_path
from genseg.artifacts.masks import Mask
from genseg.data.images import load_image
from genseg.errors import UserError

WIDTH = 7.0  # width of a figure in inches: two columns of a conference page
FONT = 7.0  # font size in points
LINE = 1.25 * FONT / 72  # height of a line of text in inches
GAP = 0.05  # space between pictures in inches
TRUTH_COLOUR, PREDICTION_COLOUR = "#009E73", "#E69F00"
PALETTE = ("#E69F00", "#56B4E9", "#D55E00", "#F0E442", "#009E73", "#CC79A7", "#0072B2")
"""Colours that colour-blind readers can tell apart (Okabe and Ito 2008). Black text is readable on all but the last."""

_STYLE = {
    "font.size": FONT,
    "axes.linewidth": 0.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "legend.frameon": False,
}


@contextmanager
def open_figure(width: float, height: float, path: Path, dpi: int) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches and save it as a PNG without dates or versions."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def add_plot(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes whose lower left corner is (x, y)."""
    figure_width, figure_height = figure.get_size_inches()
    return figure.add_axes((x / figure_width, y / figure_height, width / figure_width, height / figure_height))


def add_picture(figure: Figure, x: float, y: float, width: float, height: float, picture: ArrayLike, **options: Any) -> Axes:
    """Add a picture, stretched to its box, with `options` of matplotlib's `imshow`."""
    axes = add_plot(figure, x, y, width, height)
    axes.set_axis_off()
    axes.imshow(picture, aspect="auto", **options)
    return axes


def add_text(figure: Figure, x: float, y: float, text: str, **options: Any) -> None:
    """Add text, centred at a point by default. Dollar signs start a formula only with `parse_math`."""
    width, height = figure.get_size_inches()
    defaults: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.1, "parse_math": False}
    figure.text(x / width, y / height, text, **defaults | options)


def wrap(text: str, width: float, max_lines: int) -> list[str]:
    """Wrap text into lines of `width` inches; text beyond `max_lines` is replaced by an ellipsis."""
    characters = max(4, int(width * 72 / (0.55 * FONT)))
    return textwrap.wrap(text, characters, max_lines=max_lines, placeholder="…") or [""]


def load_phrase_image(row: pd.Series) -> NDArray[np.uint8]:
    """Load the image [H, W, 3] of one row of the phrase table. Raises UserError if the row's file or size is wrong."""
    if not isinstance(row["file_name"], str):
        raise UserError(f"phrase {row['phrase']!r}: the phrase table has no file_name for its image; run `genseg data` again")
    image = np.asarray(load_image(row["file_name"]), dtype=np.uint8)
    if image.shape[:2] != (row["height"], row["width"]):
        raise UserError(
            f"{row['file_name']}: the image is {image.shape[0]} x {image.shape[1]} pixels, the phrase table says "
            f"{row['height']} x {row['width']}; run `genseg data` again"
        )
    return image


def drawn_aspect(row: pd.Series) -> float:
    """Return the aspect ratio (width over height) at which a phrase's image is drawn, clipped to [0.6, 2]."""
    return min(max(row["width"] / row["height"], 0.6), 2.0)


def overlay(image: NDArray[np.uint8], mask: Mask | None, colour: str) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] in dark grey, tinted with `colour` where the mask [H, W] is set; None: no tint."""
    picture = _darken(image)
    if mask is not None:
        tint = 255 * np.array(matplotlib.colors.to_rgb(colour), np.float32)
        picture[mask] = np.rint(0.45 * image[mask] + 0.55 * tint).astype(np.uint8)
    return picture


def overlay_all(image: NDArray[np.uint8], masks: list[tuple[Mask, str]]) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] in dark grey in which each mask [H, W] has its colour; smaller masks are above larger ones."""
    picture = _darken(image)
    shade = picture[..., :1].astype(np.float32) / 137.5  # 137.5 is the grey of a white pixel
    for mask, colour in sorted(masks, key=lambda pair: -np.count_nonzero(pair[0])):
        tint = 255 * np.array(matplotlib.colors.to_rgb(colour), np.float32)
        picture[mask] = np.rint((0.65 + 0.35 * shade[mask]).clip(max=1) * tint).astype(np.uint8)
    return picture


def _darken(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(np.rint(10 + 0.5 * grey).astype(np.uint8)[..., None], 3, axis=2)


def outline(axes: Axes, mask: Mask, colour: str = "white", style: str = "dashed") -> None:
    """Draw the outline of a mask [H, W] on its picture; a mask without an outline draws nothing."""
    if mask.any() and not mask.all():
        axes.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=0.7, linestyles=style)
