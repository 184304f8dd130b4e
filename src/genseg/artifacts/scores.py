"""Scores: the IoU of every phrase as Parquet, and a JSON summary (unrounded fractions; null for a split without phrases)."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from genseg.artifacts.files import read_json, write_json
from genseg.artifacts.parquet import KEY, KEY_FIELDS, read_table, write_table

VERSION = 1
SCHEMA = pa.schema(
    [
        *KEY_FIELDS,
        pa.field("is_thing", pa.bool_(), nullable=False),
        pa.field("is_plural", pa.bool_(), nullable=False),
        pa.field("iou", pa.float64(), nullable=False),
        pa.field("boundary_iou", pa.float64()),
        pa.field("area", pa.int64()),
    ]
)


def write_scores(per_phrase: pd.DataFrame, summary: dict[str, Any], path: str | Path) -> None:
    """Write the summary to `path` (.json) and the per-phrase table to the same path with the suffix .parquet."""
    path = Path(path)
    frame = per_phrase.sort_values(KEY, kind="stable", ignore_index=True)
    write_table(frame, SCHEMA, path.with_suffix(".parquet"), {"kind": "scores", "version": str(VERSION)})
    write_json(path, {"version": VERSION, **summary})


def read_summary(path: str | Path) -> dict[str, Any]:
    """Read a summary. Raises UserError as `files.read_json` does."""
    return read_json(path)


def read_per_phrase(path: str | Path) -> pd.DataFrame:
    """Read the per-phrase scores that belong to the summary `path`. Raises UserError as `parquet.read_table` does."""
    return read_table(Path(path).with_suffix(".parquet"), SCHEMA, "scores", VERSION, optional=("boundary_iou", "area"))
