"""Figure of the evolution of a mask over t, as in Fig. 5 of the GS paper."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.errors import UserError
from genseg.report.figures import canvas
from genseg.report.render import plural

PAPER_TIMESTEPS = (999, 759, 519, 279)  # in Fig. 5 of the GS paper

_SPLIT = 0.16  # space between ground truth and maps, in inches
_ROW_GAP = 0.1


@dataclass(frozen=True)
class Evolution:
    """Maps of K phrases at the base point, as recorded by the sample phase; 0 is background, 255 foreground."""

    timesteps: list[int]
    """T timesteps."""
    keys: list[Any]
    """K keys (image_id, narrative_id, phrase_id)."""
    xt: NDArray[np.uint8]
    """Noisy label latents x_t [K, T, h, w]."""
    x0: NDArray[np.uint8]
    """Estimates of x_0 [K, T, h, w] made from them."""
    unguided: NDArray[np.uint8]
    """x_0 [K, h, w] sampled without guidance."""
    decoded: NDArray[np.uint8] | None
    """VAE decoding [K, H, W] of the raw x_0; None for VAE labels, whose maps are decoded already."""

    @property
    def selection(self) -> str:
        """Describe the phrases, which `sampling.evolution` chooses."""
        count = plural(len(self.keys), "phrase")
        return f"{count}: by image id, the first thing and the first stuff of each image in the grid's part of test."

    def rows(self, phrases: pd.DataFrame) -> list[pd.Series]:
        """Return the rows of the phrase table. Raises UserError if a phrase is not in it."""
        table = phrases.set_index(KEY)
        for key in self.keys:
            if key not in table.index:
                raise UserError(f"phrase {key} of the evolution figure is not in the phrase table; run `genseg sample` again")
        return [table.loc[key] for key in self.keys]


def read_evolution(path: Path) -> Evolution:
    """Read the record. Raises UserError if the file is missing or truncated, or its tensors and its header disagree."""
    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = json.loads((handle.metadata() or {})["evolution"])
            x0, xt, unguided = (handle.get_tensor(name) for name in ("x0", "xt", "unguided"))
            decoded = handle.get_tensor("decoded") if "decoded" in handle.keys() else None  # noqa: SIM118
        timesteps = [int(value) for value in metadata["timesteps"]]
        keys = [(int(image), str(narrative), int(phrase)) for image, narrative, phrase in metadata["keys"]]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `genseg sample` with this study's params") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable record of the evolution over t ({error}); remove it and run `genseg sample`"
        ) from None
    if x0.shape != xt.shape or x0.ndim != 4 or x0.shape[:2] != (len(keys), len(timesteps)):
        raise UserError(
            f"{path}: expected x0 and xt for {len(keys)} keys and {len(timesteps)} timesteps, got {x0.shape} and {xt.shape}; "
            "remove it and run `genseg sample`"
        )
    return Evolution(timesteps, keys, xt, x0, unguided, decoded)


def choose_timesteps(timesteps: list[int], max_count: int = 6) -> list[int]:
    """Return the indices of the drawn timesteps: all if they fit, else those nearest to the paper's and the last one."""
    if len(timesteps) <= max_count:
        return list(range(len(timesteps)))
    nearest = [min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - paper)) for paper in PAPER_TIMESTEPS]
    return sorted({*nearest, len(timesteps) - 1})


def draw_evolution(record: Evolution, phrases: pd.DataFrame, path: Path, dpi: int) -> str:
    """Draw for each phrase its image and ground truth and, over t, the noisy label x_t above the estimate of x_0.

    Raises UserError if a phrase is not in the phrase table, or its image is missing or has another size.
    """
    timesteps, phrase_rows = record.timesteps, record.rows(phrases)

    # Lay out the columns (image, ground truth, timesteps) and rows; lengths in inches.
    indices = choose_timesteps(timesteps)
    columns = 2 + len(indices)
    width = min(1.1, (canvas.WIDTH - canvas.GAP * (columns - 1) - _SPLIT - 0.04) / columns)
    heights = [width / canvas.drawn_aspect(row) for row in phrase_rows]
    lefts = [0.02 + index * (width + canvas.GAP) + (_SPLIT if index >= 2 else 0) for index in range(columns)]
    head = 1.6 * canvas.LINE
    total_width = columns * width + canvas.GAP * (columns - 1) + _SPLIT + 0.04
    total_height = head + sum(2 * height + canvas.GAP for height in heights) + _ROW_GAP * (len(heights) - 1)

    with canvas.open_figure(total_width, total_height, path, dpi) as figure:
        names = ["image", "ground truth", *(f"t = {timesteps[index]}" for index in indices)]
        for x, name in zip(lefts, names, strict=True):
            canvas.add_text(figure, x + width / 2, total_height - head / 2, name)

        # Draw two lines of maps per phrase, x_t and the estimate of x_0.
        y = total_height - head
        for k, (row, height) in enumerate(zip(phrase_rows, heights, strict=True)):
            image = canvas.load_phrase_image(row)
            canvas.add_picture(figure, lefts[0], y - height, width, height, image)
            truth = canvas.overlay(image, row_mask(row), canvas.TRUTH_COLOUR)
            canvas.add_picture(figure, lefts[1], y - height, width, height, truth)
            caption = "\n".join(canvas.wrap(f"“{row['phrase']}”", 2 * width, 4))
            canvas.add_text(figure, lefts[0], y - height - 1.5 * canvas.GAP, caption, ha="left", va="top")
            for line, (name, maps) in enumerate((("$x_t$", record.xt), (r"$\hat{x}_0$", record.x0))):
                bottom = y - height - line * (height + canvas.GAP)
                canvas.add_text(figure, lefts[2] - _SPLIT / 2, bottom + height / 2, name, parse_math=True)
                for x, index in zip(lefts[2:], indices, strict=True):
                    options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
                    canvas.add_picture(figure, x, bottom, width, height, maps[k, index], **options)
            y -= 2 * height + canvas.GAP + _ROW_GAP
    return (
        "Sampling over t (the paper's Fig. 5): the noisy label x_t and the estimate of x_0 made from it, at the base point. "
        f"{record.selection}"
    )
