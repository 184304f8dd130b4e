"""Latents: named tensors of fixed or ragged rows in safetensors shards, found through a Parquet index.

A *store* is a directory: `shard-00000.safetensors`, ... and `index.parquet` (id, shard, row, and for ragged rows the
length). Shards are the unit of resume: a store is complete when its index stands, which is written last.
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
    return store / f"shard-{shard:05d}.safetensors"


def readable_shard(path: Path, key: str) -> bool:
    """Whether a shard is whole and was made for `key` (a hash of everything its content depends on)."""
    try:
        with safe_open(path, "pt") as handle:
            return (handle.metadata() or {}).get("key") == key
    except (SafetensorError, OSError):
        return False


def write_shard(path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"key": key})


def write_store(
    store: Path, ids: Sequence[str], shard_rows: int, key: str, encode: Callable[[list[str]], dict[str, torch.Tensor]]
) -> Iterator[tuple[int, bool]]:
    """Write rows for `ids` in order, one shard at a time; yields (rows done, whether this shard was made now).

    Args:
        key: hash of all that the rows depend on; shards that carry another key are made again.
        encode: ids -> tensors. Either every tensor has one row per id, or `offsets` [n + 1] bounds each id's rows in
            the others (ragged).
    """
    shards = [list(ids[start : start + shard_rows]) for start in range(0, len(ids), shard_rows)]
    for number, members in enumerate(shards):
        path = shard_path(store, number)
        shard_key = f"{key}:{hashlib.sha256(json.dumps(members).encode()).hexdigest()}"
        fresh = not readable_shard(path, shard_key)
        if fresh:
            write_shard(path, encode(members), shard_key)
        yield min((number + 1) * shard_rows, len(ids)), fresh
    for stale in sorted(store.glob("shard-*.safetensors"))[len(shards) :]:
        stale.unlink()
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
    """Reader of a store: `store[id]` gives the row's tensors, memory-mapped; shards are opened once and kept."""

    def __init__(self, store: str | Path) -> None:
        self.path = Path(store)
        try:
            index = pq.read_table(self.path / "index.parquet").to_pandas()
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: no complete latents here (index.parquet is missing); run the phase latents"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}/index.parquet: unreadable ({error}); remove it and run the phase latents") from None
        self._places: dict[str, tuple[int, int]] = {
            item: (shard, row) for item, shard, row in zip(index["id"], index["shard"], index["row"], strict=True)
        }
        self._handles: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: object) -> bool:
        return str(item) in self._places

    def ids(self) -> list[str]:
        return list(self._places)

    def _handle(self, shard: int) -> safe_open:
        if shard not in self._handles:
            path = shard_path(self.path, shard)
            try:
                self._handles[shard] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: missing or truncated ({error}); remove {self.path} and run the phase latents"
                ) from None
        return self._handles[shard]

    def __getitem__(self, item: object) -> dict[str, torch.Tensor]:
        try:
            shard, row = self._places[str(item)]
        except KeyError:
            raise UserError(
                f"{self.path}: no latents of {str(item)!r}; the phase latents ran on other data, run it again"
            ) from None
        handle = self._handle(shard)
        names = handle.keys()
        if "offsets" not in names:
            return {name: handle.get_slice(name)[row] for name in names}
        low, high = handle.get_slice("offsets")[row : row + 2].tolist()
        rows = {name: handle.get_slice(name) for name in names if name != "offsets"}
        return {name: part[row] if name.startswith("pooled") else part[low:high] for name, part in rows.items()}
