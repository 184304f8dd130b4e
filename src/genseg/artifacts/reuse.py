"""Reuse of predictions files whose metadata has a key (a hash of all dependencies), and removal of unused files."""

from collections.abc import Iterable
from pathlib import Path

from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.predictions import maps_path


def has_key(key: str, *paths: Path) -> bool:
    """Return whether all predictions files exist and their metadata has this key."""
    return all(read_metadata(path).get("key") == key for path in paths)


def has_maps(*paths: Path) -> bool:
    """Return whether all predictions files have soft maps."""
    return all(maps_path(path).exists() for path in paths)


def with_maps(paths: Iterable[Path]) -> list[Path]:
    """Return predictions files and their soft maps, where they exist."""
    predictions = list(paths)
    return [*predictions, *(maps_path(path) for path in predictions if maps_path(path).exists())]


def prune(folder: Path, keep: Iterable[Path], phase: str) -> None:
    """Remove files and empty folders below a folder, except the files `keep` and the files in the folders `keep`."""
    keep = set(keep)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not keep & {path, *path.parents}:
            path.unlink()
            print(f"{phase}: removed {path}, which the study no longer has", flush=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
