"""Published results: the CSV files of `data/published/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from genseg.errors import UserError
from genseg.report.scores import SPLITS

PUBLISHED = {
    "table2": ("method", "citation", "venue", "diffusion", "ps_pretrain", *SPLITS, "source"),
    "table3_size": ("size", *SPLITS, "source"),
    "table4_steps": ("steps", *SPLITS, "source"),
    "table5_guidance": ("guidance", *SPLITS, "source"),
}
"""File names without suffix, and the columns of each file; AR is in points, as printed in the paper."""


def published_path(name: str) -> Path:
    """Return the path of a published table."""
    return Path("data/published") / f"{name}.csv"


def read_published(name: str) -> list[dict[str, Any]]:
    """Read the rows of a published table, with the columns `PUBLISHED[name]` and AR in points.

    Raises:
        UserError: the file is missing or unreadable, lacks a column, or holds an AR that is not a number.
    """
    path = published_path(name)
    remedy = f"restore it with `git checkout -- {path}`"
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV ({' '.join(str(error).split())}); {remedy}") from None
    columns = list(PUBLISHED[name])
    for column in columns:
        if column not in frame:
            raise UserError(f"{path}: no column {column}; the columns are {', '.join(map(str, frame.columns))}; {remedy}")
        if column in SPLITS:
            values = pd.to_numeric(frame[column], errors="coerce")
            if values.isna().any():
                row = int(values.isna().to_numpy().argmax())
                value = frame.at[row, column]
                raise UserError(f"{path}: row {row}, column {column}: expected a number, got {value!r}; {remedy}")
            frame[column] = values
    return [dict(zip(columns, row, strict=True)) for row in frame[columns].itertuples(index=False)]
