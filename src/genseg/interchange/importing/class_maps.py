"""Formats with one file per image for all its classes: maps of IRN, CLIP-ES and mmsegmentation, and index masks.

`FORMATS` in `importing` states the names and contents of the files; {name} is the stem of the image's file name.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from genseg.artifacts import masks
from genseg.artifacts.parquet import KEY
from genseg.artifacts.resample import bilinear
from genseg.data.index_masks import read_indices
from genseg.errors import UserError
from genseg.interchange.importing.source import Row, Source, check_size
from genseg.interchange.labels import IGNORE, NO_CLASS, Background, ClassList, Labels, iterate_images
from genseg.interchange.unpickle import read_array, read_dict

Maps = NDArray[np.floating]
ROUNDING = 1e-3
"""How far probabilities that were stored in half precision may lie outside [0, 1]."""


# ------------------------------------------------------------------------------------------------------------- formats
def read_irn(source: Source) -> Iterator[Row]:
    """Yield predictions from class activation maps of IRN: {name}.npy, where `np.save` pickled a dict with `high_res`."""
    return _read_activation_maps(source, "high_res", Background("constant", 0.15))


def read_clip_es(source: Source) -> Iterator[Row]:
    """Yield predictions from class activation maps of CLIP-ES, whose files are those of IRN with `attn_highres`."""
    return _read_activation_maps(source, "attn_highres", Background("power", 1.0))


def _read_activation_maps(source: Source, array: str, rule: Background) -> Iterator[Row]:
    """Read dicts of `keys` [K], the classes counted from 0 without background, and floating-point maps [K, h, w]."""
    array, rule, classes = source.options.array or array, source.options.background or rule, source.classes
    source.settings |= {"array": array, "background": str(rule)}

    def read_labels(path: Path, height: int, width: int) -> tuple[Labels, Maps]:
        arrays = read_dict(path)
        for name in ("keys", array):
            if name not in arrays:
                raise UserError(f"{path}: the dict has no {name!r}, only {', '.join(arrays)}; choose the maps with --array")
        keys, maps, count = arrays["keys"], arrays[array], len(classes.foreground)
        if keys.ndim != 1 or keys.dtype.kind not in "iu":
            raise UserError(f"{path}: keys have shape {list(keys.shape)} and type {keys.dtype}; save one integer per class")
        if maps.ndim != 3 or len(maps) != len(keys):
            raise UserError(f"{path}: {array} has shape {list(maps.shape)}, expected [{len(keys)}, h, w], a map per key")
        unknown = keys[(keys < 0) | (keys >= count)]
        if len(unknown):
            raise UserError(f"{path}: key {unknown[0]} is not one of the study's {count} foreground classes, counted from 0")
        if len(np.unique(keys)) != len(keys):
            raise UserError(f"{path}: duplicate class in keys {keys.tolist()}; keep one map per class")
        maps = _to_native_size(path, maps, height, width)
        if rule.kind == "power":
            _check_range(path, maps, f"--background {rule}")
        return _label_pixels(rule, maps, [classes.foreground[key] for key in keys], classes)

    return _read_image_files(source, [".npy"], read_labels)


def read_mmseg(source: Source) -> Iterator[Row]:
    """Yield predictions from logits or probabilities, as test loops of mmsegmentation save them.

    {name}.npy or {name}.npz has one array [C, h, w] of floating-point numbers for the study's foreground classes in their
    order, or [C + 1, h, w] with background first.
    """
    options, classes, count = source.options, source.classes, len(source.classes.foreground)
    source.settings |= {"background": str(options.background or "channel"), "probabilities": options.probabilities}

    def read_labels(path: Path, height: int, width: int) -> tuple[Labels, Maps]:
        maps = read_array(path)
        if maps.ndim != 3 or len(maps) not in (count, count + 1):
            expected = (
                f"[{count}, height, width] for the foreground classes, or [{count + 1}, height, width] with background first"
            )
            raise UserError(f"{path}: shape {list(maps.shape)}, expected {expected}")
        maps = _to_native_size(path, maps, height, width).astype(np.float32, copy=False)
        if options.probabilities:
            _check_range(path, maps, "--probabilities")
        else:
            maps = np.exp(maps - maps.max(0))
            maps /= maps.sum(0)
        if len(maps) == count + 1:
            if options.background is not None:
                raise UserError(f"{path}: has a background channel; leave out --background")
            return _label_pixels(Background("none"), maps, [classes.background_label, *classes.foreground], classes)
        if options.background is None:
            raise UserError(f"{path}: no background channel; give the producer's rule with --background, or --background none")
        return _label_pixels(options.background, maps, classes.foreground, classes)

    return _read_image_files(source, [".npy", ".npz"], read_labels)


def read_index_masks(source: Source) -> Iterator[Row]:
    """Yield predictions with score 1 from index masks.

    {name}.png has native size. Each pixel is the number of a class, 0 for background, or 255 for ignored, as 8-bit grey,
    palette index (the colours do not matter), 1-bit or 16-bit grey.
    """
    numbering = source.options.numbering or "class_id"
    source.settings |= {"numbering": numbering}
    # A class that has the number 0 or 255 takes precedence over background and ignored pixels.
    labels_by_value = {0: source.classes.background_label, IGNORE: NO_CLASS} | source.classes.indices_by_number(numbering)

    def read_labels(path: Path, height: int, width: int) -> tuple[Labels, None]:
        indices = read_indices(path)
        check_size(path, indices.shape, height, width)
        values = np.unique(indices).tolist()
        unknown = [value for value in values if value not in labels_by_value]
        if unknown:
            meaning = "a class of the study (--numbering gives the meaning of values), 0 or 255"
            raise UserError(f"{path}: value {unknown[0]} is not {meaning}; relabel it")
        labels = np.full(max(values) + 1, NO_CLASS, np.int64)
        labels[values] = [labels_by_value[value] for value in values]
        return labels[indices], None

    return _read_image_files(source, [".png"], read_labels)


# --------------------------------------------------------------------------------------------------------- shared steps
def _read_image_files(
    source: Source, suffixes: Sequence[str], read_labels: Callable[[Path, int, int], tuple[Labels, Maps | None]]
) -> Iterator[Row]:
    """Yield predictions for the class phrases of every image that has a file, and list the other images as missing.

    Args:
        suffixes: possible suffixes of the file name; UserError is raised if several files exist for an image.
        read_labels: (path, height, width) -> labels [H, W], and the scores [H, W] of the pixels or None (see `class_rows`).
    """
    for _, name, height, width, rows in tqdm(list(iterate_images(source.class_phrases)), desc="import", disable=None):
        paths = [path for path in (source.path / f"{name}{suffix}" for suffix in suffixes) if path.exists()]
        if not paths:
            source.missing.append(f"{name}{suffixes[0]}")
            continue
        if len(paths) > 1:
            raise UserError(f"{paths[0]}: {paths[1].name} exists too; keep one of them")
        yield from class_rows(rows, *read_labels(paths[0], height, width))


def class_rows(rows: pd.DataFrame, labels: Labels, values: Maps | None) -> Iterator[Row]:
    """Yield a prediction for every class phrase of an image.

    The mask is the pixels of `labels` [H, W] with the phrase's label. The score is the mean of `values` [H, W] over the mask,
    clipped to [0, 1]; 1 without values, 0 for an empty mask.
    """
    for row in rows.itertuples():
        mask = labels == row.phrase_id
        score = 0.0
        if mask.any():
            score = 1.0 if values is None else float(np.clip(values[mask].mean(dtype=np.float64), 0, 1))
        yield *(getattr(row, name) for name in KEY), masks.encode(mask), score


def _to_native_size(path: Path, maps: NDArray[Any], height: int, width: int) -> Maps:
    """Resize maps [K, h, w]. Maps of native size keep their precision, so ties are the same as for the producer."""
    if maps.dtype.kind != "f":
        raise UserError(f"{path}: maps have type {maps.dtype}; save floating-point numbers")
    with np.errstate(over="ignore"):
        finite = np.isfinite(maps.astype(np.float32, copy=False)).all()
    if not finite:
        raise UserError(f"{path}: maps have values that are NaN or infinite in single precision; make them again")
    if maps.shape[1:] == (height, width):
        return maps
    if maps.shape[1:] == (width, height) or 0 in maps.shape[1:]:
        size = f"{maps.shape[1]} x {maps.shape[2]}"
        raise UserError(f"{path}: {size} pixels, but the image has {height} x {width}; save maps as [K, height, width]")
    return bilinear(maps, height, width)


def _check_range(path: Path, maps: Maps, option: str) -> None:
    low, high = float(maps.min(initial=0)), float(maps.max(initial=0))
    if low < -ROUNDING or high > 1 + ROUNDING:
        values = f"values from {low:g} to {high:g}"
        raise UserError(f"{path}: {values}, but {option} expects values in [0, 1]; leave it out or scale them")


def _label_pixels(rule: Background, maps: Maps, indices: Sequence[int], classes: ClassList) -> tuple[Labels, Maps]:
    """Return the label [H, W] of every pixel, and the maximum of the maps [K, H, W] there; `indices` are the maps' labels."""
    labels = np.array([*indices, classes.background_label], np.int64)[rule.winner(maps)]  # NO_CLASS selects the last
    return labels, maps.max(0) if len(maps) else np.zeros(labels.shape)
