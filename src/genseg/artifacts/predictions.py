"""Predictions of any method: one row per phrase with a native-size mask; beside it, optional soft label maps."""

from __future__ import annotations

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
        *[pa.field(field.name, field.type, nullable=False) for field in KEY_FIELDS],
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""`mask`: COCO compressed run-length `counts` at the image's native size; `score`: confidence in [0, 1]."""


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read predictions in file order; raises UserError as `parquet.read_table` does."""
    return read_table(path, SCHEMA, "predictions", VERSION)


def write_predictions(frame: pd.DataFrame, path: str | Path, **metadata: str) -> None:
    """Write predictions ordered by key; `metadata` (e.g. what they were made from) goes into the file's footer."""
    frame = frame.sort_values(KEY, kind="stable", ignore_index=True)
    write_table(frame, SCHEMA, path, {"kind": "predictions", "version": str(VERSION), **metadata})


def write_with_maps(frame: pd.DataFrame, maps: NDArray[np.float32] | None, path: str | Path, **metadata: str) -> None:
    """Write predictions that are in key order and beside them soft maps [N, h, w], or none: such as lie there are removed.

    The predictions come last and their old file goes first, so that a file with the metadata has the maps that belong to it,
    whenever this is cut.
    """
    Path(path).unlink(missing_ok=True)
    if maps is None:
        maps_path(path).unlink(missing_ok=True)
    else:
        write_maps(maps, path)
    write_predictions(frame, path, **metadata)


def maps_path(predictions: str | Path) -> Path:
    """Where the soft maps of a predictions file lie."""
    return Path(predictions).with_suffix(".safetensors")


def write_maps(maps: NDArray[np.float32], predictions: str | Path) -> None:
    """Write soft label maps [N, h, w] in [0, 1], row i belonging to row i of the predictions, as uint8 (1/255 steps)."""
    quantised = np.rint(np.clip(maps, 0, 1) * 255).astype(np.uint8)
    with atomic_path(maps_path(predictions)) as temporary:
        save_file({"maps": quantised}, temporary)


def read_maps(predictions: str | Path, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Soft label maps [N, h, w] in [0, 1] of a predictions file, or of some of its rows (only those are read).

    Raises:
        UserError: the maps are missing or truncated.
    """
    with _opened_maps(predictions) as maps:
        count, height, width = maps.get_shape()
        if not count:  # a shard of no block; safetensors slices no empty tensor
            return np.zeros((0, height, width), np.float32)
        return np.asarray(maps[rows] / np.float32(255), dtype=np.float32)


def maps_shape(predictions: str | Path) -> tuple[int, int, int] | None:
    """(N, h, w) of the soft maps of a predictions file, None where it has none. Raises UserError when truncated."""
    if not maps_path(predictions).exists():
        return None
    with _opened_maps(predictions) as maps:
        count, height, width = maps.get_shape()
        return count, height, width


@contextlib.contextmanager
def _opened_maps(predictions: str | Path) -> Iterator[Any]:
    path = maps_path(predictions)
    try:
        with safe_open(path, "np") as handle:
            yield handle.get_slice("maps")
    except FileNotFoundError:
        raise UserError(f"{path}: no soft maps beside {predictions}; sample again to have them") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file of soft maps ({error}); remove it and sample again") from None
