"""Latents: named tensors with fixed-size or ragged rows in safetensors shards, and a Parquet index.

A *store* is a directory with `shard-00000.safetensors`, ... and `index.parquet` (columns id, shard, row). Interrupted writing
continues after the last complete shard. The index is written last, so a store with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from genseg.artifacts.files import atomic_path
from genseg.errors import UserError

if TYPE_CHECKING:
    import torch

VERSION = 1


def shard_path(store: Path, shard: int) -> Path:
    """Return the path of a shard of a store."""
    return store / f"shard-{shard:05d}.safetensors"


def is_current_shard(path: Path, key: str) -> bool:
    """Return whether a shard is readable and was written with `key` (a hash of everything that its rows depend on)."""
    try:
        with safe_open(path, "pt") as handle:
            return (handle.metadata() or {}).get("key") == key
    except (SafetensorError, OSError):
        return False


def write_store(
    store: Path, ids: Sequence[str], shard_rows: int, key: str, encode: Callable[[list[str]], dict[str, torch.Tensor]]
) -> Iterator[tuple[int, bool]]:
    """Write the rows of `ids` in order, one shard at a time.

    Args:
        shard_rows: ids per shard.
        key: hash of everything that the rows depend on. Shards with another key are written again.
        encode: function from ids to tensors. Either every tensor has one row per id, or the rows are ragged: with a tensor
            `offsets` [n + 1], rows offsets[i]:offsets[i + 1] belong to id i (in tensors `pooled*`, row i).

    Yields:
        After each shard, the number of rows written so far, and whether this call wrote the shard.
    """
    from safetensors.torch import save_file

    # 1. Write the shards, and remove surplus shards of an earlier, larger store.
    shards = list(_shards(store, ids, shard_rows, key))
    for number, (path, members, shard_key) in enumerate(shards):
        is_new = not is_current_shard(path, shard_key)
        if is_new:
            tensors = {name: tensor.contiguous() for name, tensor in encode(members).items()}
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata={"key": shard_key})
        yield min((number + 1) * shard_rows, len(ids)), is_new
    for surplus_path in sorted(store.glob("shard-*.safetensors"))[len(shards) :]:
        surplus_path.unlink()

    # 2. Write the index.
    shard, row = np.divmod(np.arange(len(ids), dtype=np.int32), shard_rows)
    index = pa.table(
        {"id": pa.array(ids, pa.string()), "shard": pa.array(shard, pa.int32()), "row": pa.array(row, pa.int32())},
        metadata={"kind": "latents", "version": str(VERSION), "key": key},
    )
    with atomic_path(store / "index.parquet") as temporary:
        pq.write_table(index, temporary)


def is_current_store(store: Path, ids: Sequence[str], shard_rows: int, key: str) -> bool:
    """Return whether `write_store` with these arguments would have nothing to encode."""
    shards = _shards(store, ids, shard_rows, key)
    return (store / "index.parquet").exists() and all(is_current_shard(path, shard_key) for path, _, shard_key in shards)


def _shards(store: Path, ids: Sequence[str], shard_rows: int, key: str) -> Iterator[tuple[Path, list[str], str]]:
    """Yield the path, the ids and the key of each shard."""
    for number, start in enumerate(range(0, len(ids), shard_rows)):
        members = list(ids[start : start + shard_rows])
        yield shard_path(store, number), members, f"{key}:{hashlib.sha256(json.dumps(members).encode()).hexdigest()}"


class LatentStore:
    """Reader of a store: `store[id]` reads the tensors of a row from a memory-mapped shard. Opened shards stay open.

    Raises UserError if the index or a shard is missing or truncated, or an id has no row.
    """

    def __init__(self, store: str | Path) -> None:
        self.path = Path(store)
        try:
            index = pq.read_table(self.path / "index.parquet").to_pandas()
        except FileNotFoundError:
            raise UserError(f"{self.path}: no complete latents (index.parquet is missing); run `genseg latents`") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}/index.parquet: unreadable ({error}); remove it and run `genseg latents`") from None
        self._locations = dict(zip(index["id"], zip(index["shard"], index["row"], strict=True), strict=True))
        self._handles: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, item: object) -> bool:
        return str(item) in self._locations

    def ids(self) -> list[str]:
        """Return all ids, in the order in which they were written."""
        return list(self._locations)

    def __getitem__(self, item: object) -> dict[str, torch.Tensor]:
        if item not in self:
            raise UserError(f"{self.path}: no latents of {str(item)!r} in this store; run `genseg latents` again")
        shard, row = self._locations[str(item)]
        if shard not in self._handles:
            path = shard_path(self.path, shard)
            try:
                self._handles[shard] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                remedy = f"remove {self.path} and run `genseg latents`"
                raise UserError(f"{path}: missing or truncated ({error}); {remedy}") from None
        handle = self._handles[shard]
        names = handle.keys()
        if "offsets" not in names:
            return {name: handle.get_slice(name)[row] for name in names}
        start, stop = handle.get_slice("offsets")[row : row + 2].tolist()
        slices = {name: handle.get_slice(name) for name in names if name != "offsets"}
        return {name: part[row] if name.startswith("pooled") else part[start:stop] for name, part in slices.items()}
