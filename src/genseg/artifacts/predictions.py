"""Predictions of any method: one row per phrase with a native-size mask, and optional soft label maps in a second file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from genseg.artifacts.files import atomic_path
from genseg.artifacts.parquet import KEY, KEY_FIELDS, read_table, write_table
from genseg.errors import UserError

VERSION = 1
SCHEMA = pa.schema(
    [
        *KEY_FIELDS,
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""`mask` is a COCO compressed RLE (`counts`) at the native size of the image; `score` is a confidence in [0, 1]."""


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read predictions in file order. Raises UserError as `parquet.read_table` does."""
    return read_table(path, SCHEMA, "predictions", VERSION)


def write_predictions(frame: pd.DataFrame, path: str | Path, **metadata: str) -> None:
    """Write predictions sorted by key, with `metadata` (e.g. hashes of their inputs) in the footer of the file."""
    frame = frame.sort_values(KEY, kind="stable", ignore_index=True)
    write_table(frame, SCHEMA, path, {"kind": "predictions", "version": str(VERSION), **metadata})


def write_with_maps(frame: pd.DataFrame, maps: NDArray[np.float32] | None, path: str | Path, **metadata: str) -> None:
    """Write predictions that are sorted by key, and their soft maps [N, h, w]. If `maps` is None, old maps are removed.

    The predictions file is removed first and written last, so after an interruption it never has maps of another run.
    """
    Path(path).unlink(missing_ok=True)
    maps_path(path).unlink(missing_ok=True)
    if maps is not None:
        write_maps(maps, path)
    write_predictions(frame, path, **metadata)


def maps_path(predictions: str | Path) -> Path:
    """Return the path of the soft maps of a predictions file."""
    return Path(predictions).with_suffix(".safetensors")


def write_maps(maps: NDArray[np.float32], predictions: str | Path) -> None:
    """Write soft label maps [N, h, w] in [0, 1] as uint8 (steps of 1/255). Map i belongs to row i of the predictions."""
    quantised = np.rint(np.clip(maps, 0, 1) * 255).astype(np.uint8)
    with atomic_path(maps_path(predictions)) as temporary:
        save_file({"maps": quantised}, temporary)


def read_maps(predictions: str | Path, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Read soft label maps [N, h, w] in [0, 1], or only some rows. Raises UserError if they are missing or truncated."""
    with _open_maps(predictions) as maps:
        count, height, width = maps.get_shape()
        if not count:  # safetensors cannot slice an empty tensor
            return np.zeros((0, height, width), np.float32)
        return np.asarray(maps[rows] / np.float32(255), dtype=np.float32)


def maps_shape(predictions: str | Path) -> tuple[int, int, int] | None:
    """Return (N, h, w) of the soft maps of a predictions file, None if it has none. Raises UserError if truncated."""
    if not maps_path(predictions).exists():
        return None
    with _open_maps(predictions) as maps:
        return tuple(maps.get_shape())


@contextlib.contextmanager
def _open_maps(predictions: str | Path) -> Iterator[Any]:
    path = maps_path(predictions)
    try:
        with safe_open(path, "np") as handle:
            yield handle.get_slice("maps")
    except FileNotFoundError:
        raise UserError(f"{path}: no soft maps of {predictions}; run `genseg sample` again") from None
    except (SafetensorError, OSError) as error:
        message = f"{path}: not a readable safetensors file of soft maps ({error}); remove it and run `genseg sample` again"
        raise UserError(message) from None
