"""Predictions of any method: one row per phrase with a native-size mask, and optional soft label maps in a second file."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from genseg.artifacts.files import atomic_path
from genseg.artifacts.parquet import KEY, KEY_FIELDS, read_table, write_pieces, write_table
from genseg.errors import UserError

Levels = NDArray[np.uint8]
"""Soft maps [N, h, w] as they are stored: 0 to 255 for 0 to 1."""
VERSION = 1
MAPS_AT_ONCE = 256
"""Number of soft maps that `iterate_maps` holds in memory."""
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
    """Write predictions that are sorted by key, and their soft maps [N, h, w]. If `maps` is None, old maps are removed."""
    levels = None if maps is None else as_levels(maps)
    write_in_pieces([(frame, levels)], None if levels is None else levels.shape, path, **metadata)


def write_in_pieces(
    pieces: Iterable[tuple[pd.DataFrame, Levels | None]], shape: tuple[int, ...] | None, path: str | Path, **metadata: str
) -> None:
    """Write predictions in key order, piece by piece, with their soft maps of the total `shape` (N, h, w); None without maps.

    The bytes do not depend on the pieces. The predictions file is removed first and written last, so after an interruption
    it never has maps of another run.
    """
    Path(path).unlink(missing_ok=True)
    maps_path(path).unlink(missing_ok=True)
    with atomic_path(path) as table, contextlib.ExitStack() as stack:
        write = None if shape is None else stack.enter_context(_maps_writer(path, shape))

        def frames() -> Iterator[pd.DataFrame]:
            for frame, levels in pieces:
                if write is not None and levels is not None:
                    write(levels)
                yield frame

        write_pieces(frames(), SCHEMA, table, {"kind": "predictions", "version": str(VERSION), **metadata})


def maps_path(predictions: str | Path) -> Path:
    """Return the path of the soft maps of a predictions file."""
    return Path(predictions).with_suffix(".safetensors")


def as_levels(maps: NDArray[np.floating[Any]]) -> Levels:
    """Return soft maps in [0, 1] as they are stored, rounded to steps of 1/255."""
    return np.rint(np.clip(maps, 0, 1) * 255).astype(np.uint8)


def as_maps(levels: Levels) -> NDArray[np.float32]:
    """Return stored soft maps in [0, 1]."""
    return np.asarray(levels / np.float32(255), dtype=np.float32)


def write_maps(maps: NDArray[np.float32], predictions: str | Path) -> None:
    """Write soft label maps [N, h, w] in [0, 1] as uint8 (steps of 1/255). Map i belongs to row i of the predictions."""
    with _maps_writer(predictions, maps.shape) as write:
        write(as_levels(maps))


@contextlib.contextmanager
def _maps_writer(predictions: str | Path, shape: tuple[int, ...]) -> Iterator[Callable[[Levels], object]]:
    """Yield a function that appends maps to a new file of `shape` (N, h, w).

    safetensors itself can only write tensors that are in memory. The file is the one that it writes: the length of the header,
    the header, padded to a multiple of 8 bytes, and the data.
    """
    tensor = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, int(np.prod(shape))]}
    header = json.dumps({"maps": tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(maps_path(predictions)) as temporary, open(temporary, "wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        yield lambda levels: handle.write(np.ascontiguousarray(levels, np.uint8).data)


def read_maps(predictions: str | Path, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Read soft label maps [N, h, w] in [0, 1], or only some rows. Raises UserError if they are missing or truncated."""
    return as_maps(read_levels(predictions, rows))


def read_levels(predictions: str | Path, rows: slice = slice(None)) -> Levels:
    """Read soft label maps as they are stored, or only some rows. Raises UserError as `read_maps` does."""
    with _open_maps(predictions) as maps:
        count, height, width = maps.get_shape()
        if not count:  # safetensors cannot slice an empty tensor
            return np.zeros((0, height, width), np.uint8)
        return np.asarray(maps[rows])


def iterate_maps(predictions: str | Path) -> Iterator[NDArray[np.float32]]:
    """Yield the soft label map [h, w] of every row, with a few of them in memory. Raises UserError as `read_maps` does."""
    count = (maps_shape(predictions) or (0,))[0]
    for start in range(0, count, MAPS_AT_ONCE):
        stop = min(start + MAPS_AT_ONCE, count)  # safetensors refuses slices beyond the end
        yield from read_maps(predictions, slice(start, stop))


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
