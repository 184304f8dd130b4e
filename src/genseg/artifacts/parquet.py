"""Parquet with a version and a key in its metadata; readers are generous with what plain pandas writes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from genseg.artifacts.files import atomic_path
from genseg.errors import UserError

KEY = ["image_id", "narrative_id", "phrase_id"]
KEY_FIELDS = [pa.field("image_id", pa.int64()), pa.field("narrative_id", pa.string()), pa.field("phrase_id", pa.int64())]


def write_table(frame: pd.DataFrame, schema: pa.Schema, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the schema's columns atomically; the same frame gives the same bytes."""
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(dict(sorted(metadata.items())))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_table(path: str | Path, schema: pa.Schema, kind: str, version: int, optional: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read and check one artifact: lossless casts are made, extra columns ignored, an absent version is 1.

    Raises:
        UserError: missing or truncated file, newer version, missing column, a value that does not fit the column's
            type, or a key that occurs twice (the row's number is named).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a Parquet file of {kind}")
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); remove it and make it again"
        ) from None
    found = (table.schema.metadata or {}).get(b"version", b"1").decode("utf-8", "replace")
    if not found.isdecimal() or int(found) > version:
        raise UserError(f"{path}: {kind} of version {found!r}, this program reads up to {version}; update genseg")
    columns = {}
    for field in schema:
        if field.name not in table.column_names:
            if field.name in optional:
                columns[field.name] = pa.nulls(table.num_rows, field.type)
                continue
            raise UserError(f"{path}: {kind} without column {field.name}; it has {', '.join(table.column_names)}")
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{path}: row {row}: no value in column {field.name}")
        try:
            columns[field.name] = column.cast(field.type, safe=not pa.types.is_floating(field.type))
        except pa.ArrowException as error:
            raise UserError(f"{path}: column {field.name}: {str(error).splitlines()[0]}") from None
    frame = pa.table(columns).to_pandas()
    twice = frame.duplicated(KEY)
    if twice.any():
        row = int(twice.to_numpy().argmax())
        image, narrative, phrase = frame[KEY].iloc[row]
        key = f"(image_id, narrative_id, phrase_id) = ({image}, {narrative!r}, {phrase})"
        raise UserError(f"{path}: row {row}: {key} occurs twice; keep one of them")
    return frame


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a Parquet artifact; empty when the file is missing or unreadable."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items() if key != b"pandas"}
