"""Latents: named tensors with fixed or ragged rows in safetensors shards, and a Parquet index.

A *store* is a directory with `shard-00000.safetensors`, ... and `index.parquet` (columns id, shard, row). Writing resumes
at shards. The index is written last, so a store with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from genseg.artifacts.files import atomic_path
from genseg.errors import UserError

if TYPE_CHECKING:
    import torch

VERSION = 1


def shard_path(store: Path, shard: int) -> Path:
    """Return the path of a shard of a store, by the shard's number."""
    return store / f"shard-{shard:05d}.safetensors"


def is_current_shard(path: Path, key: str) -> bool:
    """Return whether a shard is readable and was written with `key` (a hash of everything that its rows depend on)."""
    try:
        with safe_open(path, "pt") as handle:
            return (handle.metadata() or {}).get("key") == key
    except (SafetensorError, OSError):
        return False


def write_shard(path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    """Write the tensors of one shard atomically, with `key` in the file's metadata."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"key": key})


def write_store(
    store: Path, ids: Sequence[str], shard_rows: int, key: str, encode: Callable[[list[str]], dict[str, torch.Tensor]]
) -> Iterator[tuple[int, bool]]:
    """Write the rows of `ids` in order, one shard at a time.

    Args:
        shard_rows: ids per shard.
        key: hash of everything that the rows depend on; shards with another key are written again.
        encode: function from ids to tensors. Either every tensor has one row per id, or the rows are ragged: with a tensor
            `offsets` [n + 1], rows offsets[i]:offsets[i + 1] belong to id i (in tensors `pooled*`, row i).

    Yields:
        (rows done, whether this shard was written now)
    """
    shards = [list(ids[start : start + shard_rows]) for start in range(0, len(ids), shard_rows)]
    for number, members in enumerate(shards):
        path = shard_path(store, number)
        shard_key = f"{key}:{hashlib.sha256(json.dumps(members).encode()).hexdigest()}"
        is_new = not is_current_shard(path, shard_key)
        if is_new:
            write_shard(path, encode(members), shard_key)
        yield min((number + 1) * shard_rows, len(ids)), is_new
    for surplus_path in sorted(store.glob("shard-*.safetensors"))[len(shards) :]:
        surplus_path.unlink()
    index = pa.table(
        {
            "id": pa.array([str(item) for item in ids], pa.string()),
            "shard": pa.array([position // shard_rows for position in range(len(ids))], pa.int32()),
            "row": pa.array([position % shard_rows for position in range(len(ids))], pa.int32()),
        },
        metadata={"kind": "latents", "version": str(VERSION), "key": key},
    )
    with atomic_path(store / "index.parquet") as temporary:
        pq.write_table(index, temporary)


class LatentStore:
    """Reader of a store: `store[id]` returns the tensors of a row, memory-mapped. Opened shards stay open.

    Raises:
        UserError: the index or a shard is missing or truncated, or an id has no row.
    """

    def __init__(self, store: str | Path) -> None:
        self.path = Path(store)
        try:
            index = pq.read_table(self.path / "index.parquet").to_pandas()
        except FileNotFoundError:
            raise UserError(f"{self.path}: no complete latents (index.parquet is missing); run `genseg latents`") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}/index.parquet: unreadable ({error}); remove it and run `genseg latents`") from None
        self._locations: dict[str, tuple[int, int]] = {
            item: (shard, row) for item, shard, row in zip(index["id"], index["shard"], index["row"], strict=True)
        }
        self._handles: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, item: object) -> bool:
        return str(item) in self._locations

    def ids(self) -> list[str]:
        """Return all ids, in the order in which they were written."""
        return list(self._locations)

    def _handle(self, shard: int) -> safe_open:
        if shard not in self._handles:
            path = shard_path(self.path, shard)
            try:
                self._handles[shard] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                message = f"{path}: missing or truncated ({error}); remove {self.path} and run `genseg latents`"
                raise UserError(message) from None
        return self._handles[shard]

    def __getitem__(self, item: object) -> dict[str, torch.Tensor]:
        try:
            shard, row = self._locations[str(item)]
        except KeyError:
            message = f"{self.path}: no latents of {str(item)!r}, they belong to other data; run `genseg latents` again"
            raise UserError(message) from None
        handle = self._handle(shard)
        names = handle.keys()
        if "offsets" not in names:
            return {name: handle.get_slice(name)[row] for name in names}
        start, stop = handle.get_slice("offsets")[row : row + 2].tolist()
        slices = {name: handle.get_slice(name) for name in names if name != "offsets"}
        return {name: part[row] if name.startswith("pooled") else part[start:stop] for name, part in slices.items()}
