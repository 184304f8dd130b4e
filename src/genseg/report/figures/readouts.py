"""Figure of the read-outs of the label latent, as in Fig. 4 of the GS paper."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import bilinear, nearest
from genseg.params.sample import Sample
from genseg.report.figures import canvas
from genseg.report.figures.evolution import Evolution
from genseg.report.render import sentence

_ROW_GAP = 0.1


def read_out(record: Evolution, number: int, height: int, width: int) -> dict[str, NDArray[np.float32]]:
    """Return read-out -> map [height, width] in [0, 1] of one phrase of the record."""
    guided, unguided = (maps[None].astype(np.float32) / 255 for maps in (record.x0[number, -1], record.unguided[number]))
    pictures = {"bilinear": bilinear(guided, height, width), "nearest": nearest(guided, height, width)}
    if record.decoded is not None:
        pictures["VAE decoding"] = bilinear(record.decoded[number][None].astype(np.float32) / 255, height, width)
    pictures["bilinear, no CFG"] = bilinear(unguided, height, width)
    return {name: picture[0] for name, picture in pictures.items()}


def draw_readouts(record: Evolution, phrases: pd.DataFrame, sample: Sample, path: Path, dpi: int) -> str:
    """Draw for each phrase of the record its image and ground truth and, for each read-out, the map above the mask.

    Raises UserError if a phrase is not in the phrase table, or its image is missing or has another size.
    """
    rows = record.rows(phrases)
    maps = [read_out(record, number, int(row["height"]), int(row["width"])) for number, row in enumerate(rows)]
    names = ["image", "ground truth", *maps[0]]

    # Lay out the columns and rows; lengths in inches.
    width = 1.0
    heights = [width / canvas.drawn_aspect(row) for row in rows]
    lefts = [index * (width + canvas.GAP) for index in range(len(names))]
    head = 1.6 * canvas.LINE
    total_height = head + sum(2 * height + canvas.GAP for height in heights) + _ROW_GAP * (len(rows) - 1)

    with canvas.open_figure(lefts[-1] + width, total_height, path, dpi) as figure:
        for x, name in zip(lefts, names, strict=True):
            canvas.add_text(figure, x + width / 2, total_height - head / 2, name)
        y = total_height - head
        for row, height, pictures in zip(rows, heights, maps, strict=True):
            image, truth = canvas.load_phrase_image(row), row_mask(row)
            canvas.add_picture(figure, lefts[0], y - height, width, height, image)
            truth_picture = canvas.overlay(image, truth, canvas.TRUTH_COLOUR)
            canvas.add_picture(figure, lefts[1], y - height, width, height, truth_picture)
            caption = "\n".join(canvas.wrap(f"“{row['phrase']}”", 2 * width, 4))
            canvas.add_text(figure, lefts[0] + 0.02, y - height - 2 * canvas.GAP, caption, ha="left", va="top")
            for x, picture in zip(lefts[2:], pictures.values(), strict=True):
                options: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
                canvas.add_picture(figure, x, y - height, width, height, picture, **options)
                mask = picture >= sample.threshold
                mask_picture = canvas.overlay(image, mask, canvas.PREDICTION_COLOUR)
                axes = canvas.add_picture(figure, x, y - 2 * height - canvas.GAP, width, height, mask_picture)
                canvas.outline(axes, truth)
                iou = float((mask & truth).sum()) / max(float((mask | truth).sum()), 1.0)
                label: dict[str, Any] = {"ha": "right", "va": "bottom", "color": "white", "transform": axes.transAxes}
                axes.text(0.97, 0.03, f"IoU {iou:.2f}", bbox={"facecolor": "black", "edgecolor": "none", "pad": 1}, **label)
            y -= 2 * height + canvas.GAP + _ROW_GAP
    decoding = " The VAE decodes the raw x_0 / b, neither softened, clipped nor rounded." if "VAE decoding" in names else ""
    return (
        "Read-outs of the label latent (the paper's Fig. 4): soft map and, below it, mask with the outline of the ground truth "
        f"(dashed). {sentence(str(sample.base))[:-1]}, threshold {sample.threshold:g}; last column: the same without guidance."
        f"{decoding} {record.selection}"
    )
