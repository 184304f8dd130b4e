"""Picture of the prediction of one image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask
from genseg.report.figures import canvas
from genseg.report.figures.narratives import LINE, colour_of, draw_words, lay_out, split_caption, text_width

_WIDTH = (canvas.WIDTH - canvas.GAP) / 2  # width of a picture in inches
_DPI = 200


def draw_prediction(
    image: NDArray[np.uint8], masks: Sequence[Mask], phrases: Sequence[str], caption: str | None, path: Path
) -> None:
    """Draw an image [H, W, 3], its masks [H, W], and the phrases, or the caption that contains them, in their colours."""
    height = min(_WIDTH * image.shape[0] / image.shape[1], canvas.WIDTH)
    width = height * image.shape[1] / image.shape[0]
    lines = lay_out(split_caption(caption or ", ".join(phrases), list(phrases)), canvas.WIDTH - 0.1, text_width(_DPI))
    total = height + (len(lines) + 0.7) * LINE
    painted = [(mask, colour_of(number)) for number, mask in enumerate(masks)]
    with canvas.open_figure(canvas.WIDTH, total, path, _DPI) as figure:
        for column, picture in enumerate((image, canvas.overlay_all(image, painted))):
            left = column * (_WIDTH + canvas.GAP) + (_WIDTH - width) / 2
            axes = canvas.add_picture(figure, left, total - height, width, height, picture)
        for mask, colour in painted:
            canvas.outline(axes, mask, colour, "solid")
        for row, line in enumerate(lines):
            draw_words(figure, 0.05, total - height - (row + 1.2) * LINE, line)
