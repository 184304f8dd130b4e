"""Figure of masks before and after refinement."""

from pathlib import Path

import numpy as np
import pandas as pd

from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.predictions import read_maps, read_predictions
from genseg.report.figures import canvas

_HEADS = ("image", "coarse", "discrepancy", "refined", "ground truth")
_CAPTION = 1.4  # width of the caption next to the pictures, in inches


def load_refined(folder: Path, phrases: pd.DataFrame) -> list[pd.Series]:
    """Load the masks by G4Seg that the refinement in `folder` stored for the figure, as rows of the phrase table.

    The rows also have `method`, `coarse` and `refined` (masks as in the predictions), and `discrepancy` [h, w] in [0, 1].
    """
    phrase_rows = phrases.set_index(KEY)
    examples = []
    for entry in read_manifest(folder / "manifest.json")["refined"]:
        if entry["refiner"] == "g4seg" and entry["coarse"] is not None:
            path = folder / "discrepancy" / f"{entry['baseline']}.parquet"
            refined_masks, maps = read_predictions(path).set_index(KEY)["mask"], read_maps(path)
            rows = phrase_rows.loc[refined_masks.index].assign(refined=refined_masks, discrepancy=list(maps))
            rows["coarse"] = read_predictions(entry["coarse"]).set_index(KEY)["mask"].loc[rows.index]
            examples += [row for _, row in rows.assign(method=entry["label"]).iterrows()]
    return examples


def draw_refined(examples: list[pd.Series], path: Path, dpi: int) -> str:
    """Draw one row per phrase: image, coarse mask, G4Seg's discrepancy, refined mask, ground truth."""
    # Lay out the columns and rows; lengths in inches.
    columns = len(_HEADS)
    width = min(1.0, (canvas.WIDTH - _CAPTION - canvas.GAP * columns) / columns)
    lefts = [_CAPTION + index * (width + canvas.GAP) for index in range(columns)]
    heights = [width / canvas.drawn_aspect(row) for row in examples]
    head = 1.6 * canvas.LINE
    total_height = head + sum(heights) + canvas.GAP * len(heights)

    with canvas.open_figure(_CAPTION + columns * (width + canvas.GAP), total_height, path, dpi) as figure:
        for x, name in zip(lefts, _HEADS, strict=True):
            canvas.add_text(figure, x + width / 2, total_height - head / 2, name)
        y = total_height - head
        for row, height in zip(examples, heights, strict=True):
            caption = "\n".join([*canvas.wrap(row["method"], _CAPTION, 3), *canvas.wrap(f"“{row['phrase']}”", _CAPTION, 3)])
            canvas.add_text(figure, 0.03, y - height / 2, caption, ha="left")
            image, size = canvas.load_phrase_image(row), (int(row["height"]), int(row["width"]))
            coarse, refined = (
                canvas.overlay(image, decode(row[name], *size), canvas.PREDICTION_COLOUR) for name in ("coarse", "refined")
            )
            truth = canvas.overlay(image, row_mask(row), canvas.TRUTH_COLOUR)
            pictures = [image, coarse, np.asarray(row["discrepancy"]), refined, truth]
            for x, name, picture in zip(lefts, _HEADS, pictures, strict=True):
                options = {"cmap": "magma", "vmin": 0, "vmax": 1, "interpolation": "nearest"} if name == "discrepancy" else {}
                canvas.add_picture(figure, x, y - height, width, height, picture, **options)
            y -= height + canvas.GAP
    return (
        "G4Seg (ours): coarse mask, discrepancy of the first iteration, refined mask and ground truth of phrases chosen by "
        "hash from the refined part of test."
    )
