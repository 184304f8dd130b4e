"""Parts: predictions that are being made, so that a killed job continues after the last part that it wrote.

Predictions are made unit by unit. A *unit* is a fixed set of rows, such as a block of phrases or an image, and has a number;
units in ascending order are in key order. Where parts are cut depends on time. The predictions that are gathered from them do
not, and gathering holds a few parts in memory, however many rows there are.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from genseg.artifacts.files import atomic_path
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.predictions import SCHEMA, Levels, write_in_pieces
from genseg.errors import UserError

PART_SECONDS = 180.0
"""Time after which a part is written, in seconds."""
PART_ROWS = 1024
"""Number of rows after which a part is written earlier, which bounds the memory of a job and of gathering."""
PROGRESS_SECONDS = 10
"""Minimum time between progress lines."""

Piece = tuple[pd.DataFrame, Levels | None]
"""Predictions of a unit in key order, and their soft maps [n, h, w] if they have any."""


def part_bytes(height: int, width: int) -> int:
    """Return the largest memory, in bytes, of the rows of a part with soft maps [height, width].

    A job holds one part of each of its files, e.g. of each attention method for phrases and class phrases. Gathering holds one
    unit of each shard.
    """
    return PART_ROWS * (height * width + 1024)


class Parts:
    """The parts in a folder that have a key, a hash of everything that the predictions depend on.

    Attributes:
        total: number of units of the finished predictions; None if no part says so.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.total: int | None = None
        self._seconds: dict[Path, float] = {}
        self._shape: list[int] | None = None
        self._rows: dict[int, tuple[Path, int, int]] = {}  # unit -> part, row group (-1 without rows) and number of rows
        self._last: dict[Path, int] = {}  # last unit that is read from each part
        self._open: dict[Path, pq.ParquetFile] = {}
        for path in sorted(folder.glob("part-*.parquet")):
            metadata = read_metadata(path)
            if metadata.get("key") == key:
                self._add(path, json.loads(metadata["part"]))

    def _add(self, path: Path, facts: dict[str, Any]) -> None:
        self._seconds[path] = facts["seconds"]
        self.total = self.total if facts["total"] is None else facts["total"]
        self._shape = facts["shape"] or self._shape
        group = 0
        for unit, rows in zip(facts["units"], facts["rows"], strict=True):
            if unit not in self._rows:  # two jobs at once may have made a unit twice, with equal rows
                self._rows[unit] = path, group if rows else -1, rows
                self._last[path] = max(unit, self._last.get(path, unit))
            group += rows > 0

    def __contains__(self, unit: int) -> bool:
        return unit in self._rows

    def seconds(self, units: Iterable[int]) -> float:
        """Return the time in which the parts with these units were made."""
        return sum(self._seconds[path] for path in {self._rows[unit][0] for unit in units})

    def write(self, pieces: Mapping[int, Piece], seconds: float, total: int | None = None) -> None:
        """Write the rows of some units, made in `seconds`, as a part. Parts with other keys are removed."""
        shape = next((levels.shape[1:] for _, levels in pieces.values() if levels is not None), None)
        facts: dict[str, Any] = {"units": list(pieces), "rows": [len(frame) for frame, _ in pieces.values()], "shape": shape}
        facts |= {"seconds": round(seconds, 3), "total": total}
        path = self.folder / f"part-{min(pieces, default=0):012d}-{max(pieces, default=0):012d}.parquet"
        for other in () if self._rows else self.folder.glob("part-*.parquet"):
            if read_metadata(other).get("key") != self.key:
                other.unlink(missing_ok=True)
        schema = SCHEMA if shape is None else SCHEMA.append(pa.field("maps", pa.binary(int(np.prod(shape)))))
        schema = schema.with_metadata({"key": self.key, "part": json.dumps(facts)})
        with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for frame, levels in pieces.values():
                if len(frame):
                    writer.write_table(_as_table(frame, levels).cast(schema))  # one row group
        self._add(path, facts)

    def read(self, unit: int) -> Piece:
        """Read a unit. Parts stay open until their last unit is read. Raises UserError if the part is damaged."""
        path, group, _ = self._rows[unit]
        try:
            if path not in self._open:
                self._open[path] = pq.ParquetFile(path)
            file = self._open[path]
            rows = file.schema_arrow.empty_table() if group < 0 else file.read_row_group(group)
            if unit == self._last[path]:
                self._open.pop(path).close()
        except (pa.ArrowException, OSError) as error:
            detail = str(error).splitlines()[0]
            raise UserError(f"{path}: not a readable part ({detail}); remove it and run the command again") from None
        levels = None
        if self._shape is not None:
            stored = b"" if group < 0 else rows.column("maps").combine_chunks().buffers()[1]
            levels = np.frombuffer(stored, np.uint8, len(rows) * int(np.prod(self._shape))).reshape(-1, *self._shape)
        return rows.select(SCHEMA.names).to_pandas(), levels

    def pieces(self) -> Iterator[Piece]:
        """Yield all units in ascending order."""
        return map(self.read, sorted(self._rows))

    def gather(self, path: Path, **metadata: str) -> int:
        """Write the predictions of all units, with their soft maps if they have any, and return the number of rows."""
        count = sum(rows for _, _, rows in self._rows.values())
        shape = None if self._shape is None else (count, *self._shape)
        write_in_pieces(self.pieces(), shape, path, key=self.key, **metadata)
        return count

    def remove(self) -> None:
        """Remove the parts, after their predictions are complete."""
        for path in self.folder.glob("part-*.parquet"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()


def _as_table(frame: pd.DataFrame, levels: Levels | None) -> pa.Table:
    table = pa.Table.from_pandas(frame[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    if levels is None:
        return table
    maps = np.ascontiguousarray(levels)
    column = pa.Array.from_buffers(pa.binary(maps[0].size), len(maps), [None, pa.py_buffer(maps)])
    return table.append_column("maps", column)


def make_parts(
    parts: Mapping[Any, Parts],
    units: Collection[int],
    make: Callable[[int], Mapping[Any, Piece]],
    label: str,
    total: int | None = None,
) -> None:
    """Make the units that some output does not have yet, and write a part of every output every few minutes.

    Args:
        make: function from a unit to its rows in every output.
        label: beginning of progress lines, e.g. `baseline: image`.
    """
    missing = [unit for unit in units if not all(unit in output for output in parts.values())]
    pending: dict[Any, dict[int, Piece]] = {name: {} for name in parts}
    started = last_line = time.monotonic()
    rows = 0
    for position, unit in enumerate(missing, start=len(units) - len(missing) + 1):
        made = make(unit)
        for name, piece in made.items():
            if unit not in parts[name]:
                pending[name][unit] = piece
        rows += max(len(frame) for frame, _ in made.values())
        now = time.monotonic()
        if unit == missing[-1] or now - started > PART_SECONDS or rows >= PART_ROWS:
            for name, pieces in pending.items():
                if pieces:
                    parts[name].write(pieces, now - started, total)
                    pieces.clear()
            started, rows = time.monotonic(), 0
        if now - last_line > PROGRESS_SECONDS:
            last_line = now
            print(f"{label} {position} of {len(units)}", flush=True)
