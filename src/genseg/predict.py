"""Segmentation of image files with a trained model: masks, soft maps, and a picture of the coloured phrases."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts import masks as rle
from genseg.artifacts.files import atomic_path, write_json
from genseg.artifacts.resample import bilinear
from genseg.data.images import load_image
from genseg.diffusion.pipeline import GSOutput, GSPipeline, load_pipeline
from genseg.errors import UserError
from genseg.models.device import DTYPES
from genseg.params.base import Precision
from genseg.params.sample import Sample
from genseg.report.figures.prediction import draw_prediction


def predict(
    source: Path,
    phrases: Sequence[str],
    caption: str | None,
    out: Path,
    pipeline: GSPipeline,
    soft_maps: bool,
    **options: Any,
) -> list[Path]:
    """Segment an image, or each image of a folder, by phrases, and return the folders that were written.

    An image is written to `out`, the images of a folder to `out/<name without suffix>`.

    Args:
        caption: text in which the phrases are coloured; None: the phrases alone.
        soft_maps: whether to write the soft maps, too.
        options: arguments of `GSPipeline.__call__`.

    Raises UserError if an image cannot be read, a folder has none, an option is invalid, or the network output is not finite.
    """
    folders = {source: out}
    if source.is_dir():
        suffixes = Image.registered_extensions()
        images = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes and path.is_file())
        folders = {path: out / path.stem for path in images}
        if not folders:
            raise UserError(f"{source}: no images in this folder; pass an image or a folder of images")
        if len(set(folders.values())) < len(folders):
            raise UserError(f"{source}: two images differ only in their suffix; rename one of them")
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="predict", leave=len(folders) == 1)
    for path, folder in folders.items():
        image = load_image(path)
        try:
            output = pipeline(image, phrases, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        assert isinstance(output, GSOutput)
        _write(folder, image, phrases, caption, output, soft_maps)
    return list(folders.values())


def open_model(
    model: str, device: torch.device, sample: Sample | None, precision: Precision | None
) -> tuple[GSPipeline, dict[str, Any]]:
    """Load a model and the arguments of `GSPipeline.__call__` with which a study samples its main row.

    Args:
        model: folder or hub id of the trained model.
        sample: section of a study's params, for its main point, threshold, sampler settings and precision. If None, the
            defaults are those of the model, threshold 0.5 and fp32.

    Raises UserError if the model cannot be loaded, or the study's read-out is not bilinear.
    """
    pipeline = load_pipeline(model, DTYPES[precision or (sample.precision if sample else "fp32")]).to(device)
    if sample is None:
        return pipeline, {}
    if sample.readout != "bilinear":
        raise UserError(f"sample.readout {sample.readout}: only bilinear read-out is available for single images")
    pipeline.configure_sampling(sample.timestep_spacing, sample.clip_sample)
    point = sample.main.model_dump(exclude={"size"})
    return pipeline, point | {"processing_resolution": sample.main.size, "threshold": sample.threshold}


def _write(
    folder: Path, image: Image.Image, phrases: Sequence[str], caption: str | None, output: GSOutput, soft_maps: bool
) -> None:
    """Write `mask_<k>.png` (0 or 255), `map_<k>.png` (0 to 255) with `soft_maps`, `overlay.png` and `predictions.json`.

    They replace an earlier prediction. The JSON is written last, so a folder without it is incomplete. It lists the phrase,
    file, run-length code and score of each mask. The score is the mean of the soft map inside the mask, 0 for an empty mask.
    """
    (folder / "predictions.json").unlink(missing_ok=True)
    for path in (*folder.glob("mask_*.png"), *folder.glob("map_*.png")):
        if path.stem.split("_", 1)[1].isdigit():
            path.unlink()
    entries = []
    for number, (phrase, mask, soft) in enumerate(zip(phrases, output.masks, output.maps, strict=True)):
        _save_png(mask.astype(np.uint8) * 255, folder / f"mask_{number}.png")
        upsampled = bilinear(soft[None], image.height, image.width)[0]
        if soft_maps:
            _save_png(np.rint(upsampled * 255).astype(np.uint8), folder / f"map_{number}.png")
        entries.append(
            {
                "phrase": phrase,
                "file": f"mask_{number}.png",
                "score": float(upsampled[mask].mean()) if mask.any() else 0.0,
                "segmentation": {"size": [image.height, image.width], "counts": rle.encode(mask).decode()},
            }
        )
    draw_prediction(np.asarray(image), output.masks, phrases, caption, folder / "overlay.png")
    write_json(folder / "predictions.json", entries)


def _save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
