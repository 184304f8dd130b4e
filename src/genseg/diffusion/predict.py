"""What `genseg predict` leaves behind: masks, an overlay, and a JSON."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from genseg.artifacts import masks
from genseg.artifacts.files import atomic_path, write_json
from genseg.artifacts.resample import bilinear
from genseg.diffusion.pipeline import GSOutput


def write_prediction(folder: Path, image: Image.Image, phrases: Sequence[str], output: GSOutput) -> None:
    """Write `mask_<k>.png` (0 or 255), `overlay.png`, and `predictions.json` (RLE `counts`, score: mean of the soft map
    inside the mask). An earlier prediction in the folder is replaced, the JSON last: without it the folder is not done."""
    (folder / "predictions.json").unlink(missing_ok=True)
    for old in folder.glob("mask_*.png"):
        if old.stem.removeprefix("mask_").isdigit():
            old.unlink()
    overlay = np.asarray(image, np.float32)
    entries = []
    for number, (phrase, mask, soft) in enumerate(zip(phrases, output.masks, output.maps, strict=True)):
        _save(Image.fromarray(mask.astype(np.uint8) * 255), folder / f"mask_{number}.png")
        colour = np.array(colorsys.hsv_to_rgb(number * 0.618 % 1, 0.8, 1.0), np.float32) * 255
        overlay = np.where(mask[..., None], 0.5 * overlay + 0.5 * colour, overlay)
        large = bilinear(soft[None], image.height, image.width)[0]
        entries.append(
            {
                "phrase": phrase,
                "file": f"mask_{number}.png",
                "score": float(large[mask].mean()) if mask.any() else 0.0,
                "segmentation": {"size": [image.height, image.width], "counts": masks.encode(mask).decode()},
            }
        )
    _save(Image.fromarray(overlay.round().astype(np.uint8)), folder / "overlay.png")
    write_json(folder / "predictions.json", entries)


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
