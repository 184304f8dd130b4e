"""Parquet tables with a version in their metadata; the reader also accepts files written by pandas."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from genseg.artifacts.files import atomic_path
from genseg.errors import UserError

KEY = ["image_id", "narrative_id", "phrase_id"]
_KEY_TYPES = (pa.int64(), pa.string(), pa.int64())
KEY_FIELDS = [pa.field(name, dtype, nullable=False) for name, dtype in zip(KEY, _KEY_TYPES, strict=True)]
ROW_GROUP = 1 << 16
"""Rows of a row group, so that a table can be written in pieces with the bytes of a table written at once."""


def write_table(frame: pd.DataFrame, schema: pa.Schema, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the columns of the schema atomically. Equal frames give equal bytes."""
    with atomic_path(path) as temporary:
        write_pieces([frame], schema, temporary, metadata)


def write_pieces(frames: Iterable[pd.DataFrame], schema: pa.Schema, path: str | Path, metadata: dict[str, str]) -> None:
    """Write consecutive pieces of a table, not atomically. At most one row group and one piece are in memory.

    The bytes depend on the rows and not on where they are cut into pieces.
    """
    schema = schema.with_metadata(dict(sorted(metadata.items())))
    pending = schema.empty_table()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for frame in frames:
            piece = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
            pending = pa.concat_tables([pending, piece.replace_schema_metadata(schema.metadata)])
            while len(pending) > ROW_GROUP:
                writer.write_table(pending.slice(0, ROW_GROUP).combine_chunks())
                pending = pending.slice(ROW_GROUP)
        writer.write_table(pending.combine_chunks())


def read_table(path: str | Path, schema: pa.Schema, kind: str, version: int, optional: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read and check a table. Integers are cast losslessly, extra columns are ignored, and a missing version means 1.

    Args:
        kind: name of the artifact in messages.
        version: newest version that can be read.
        optional: columns that may be missing; their values are then null.

    Raises:
        UserError: the file is missing or truncated, its version is newer, a column is missing, a value is missing or does not
            fit the column's type, or a key occurs twice (the message gives the row number).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a Parquet file ({kind}), got a directory")
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except (pa.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({detail}); remove it and create it again") from None
    file_version = (table.schema.metadata or {}).get(b"version", b"1").decode("utf-8", "replace")
    if not file_version.isdecimal() or int(file_version) > version:
        raise UserError(f"{path}: {kind} version {file_version!r} is not supported, the newest is {version}; update genseg")
    columns = {}
    for field in schema:
        if field.name not in table.column_names:
            if field.name in optional:
                columns[field.name] = pa.nulls(table.num_rows, field.type)
                continue
            raise UserError(f"{path}: {kind} without column {field.name}; its columns are {', '.join(table.column_names)}")
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{path}: row {row}: no value in column {field.name}")
        try:
            columns[field.name] = column.cast(field.type, safe=not pa.types.is_floating(field.type))
        except pa.ArrowException as error:
            raise UserError(f"{path}: column {field.name}: {str(error).splitlines()[0]}") from None
    frame = pa.table(columns).to_pandas()
    duplicated = frame.duplicated(KEY)
    if duplicated.any():
        row = int(duplicated.to_numpy().argmax())
        image, narrative, phrase = frame[KEY].iloc[row]
        key = f"(image_id, narrative_id, phrase_id) = ({image}, {narrative!r}, {phrase})"
        raise UserError(f"{path}: row {row}: {key} occurs twice; keep one of them")
    return frame


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a Parquet artifact, empty if the file is missing or unreadable."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items() if key != b"pandas"}
