"""Manifests: small JSON files that say what a phase made, of what, with which params and code, on which device.

They are the edges of the DAG: a rule asks for another phase's manifest and reads the big files it names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.errors import UserError

VERSION = 1
TIMING = ("started", "seconds", "timing")
"""Fields that may differ between two runs that made the same bytes."""

_SOURCE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pycocotools", "pandas", "pyarrow")


@cache
def code_hash(*rooms: str) -> str:
    """Hash of the source of some rooms of `genseg` (`data`, `models`, `params.py`, ...); of all without an argument."""
    paths = [_SOURCE / room for room in rooms] if rooms else [_SOURCE]
    digest = hashlib.sha256()
    for path in sorted(file for root in paths for file in ([root] if root.is_file() else root.rglob("*.py"))):
        digest.update(path.relative_to(_SOURCE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write_manifest(
    path: str | Path,
    phase: str,
    params: dict[str, Any],
    inputs: Iterable[str | Path],
    outputs: Iterable[str | Path],
    started: float,
    device: str = "cpu",
    code: str | None = None,
    **facts: Any,
) -> None:
    """Write a phase's manifest, last of all its files.

    Args:
        inputs, outputs: files, or directories taken whole; their sizes and hashes are recorded.
        started: `time.time()` at the start of the work.
        code: `code_hash` of the rooms that ran; of all when None.
        facts: what else a later phase or a reader wants to know, as JSON values.
    """
    write_json(
        path,
        {
            "version": VERSION,
            "phase": phase,
            "params": params,
            "code": code or code_hash(),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES}
            | {"python": platform.python_version()},
            "device": device,
            "inputs": {str(item): file_sha256(item) for item in _files(inputs)},
            "outputs": {str(item): {"bytes": item.stat().st_size, "sha256": file_sha256(item)} for item in _files(outputs)},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 2),
            **facts,
        },
    )


def _files(items: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for item in map(Path, items):
        found += sorted(file for file in item.rglob("*") if file.is_file()) if item.is_dir() else [item]
    return found


def read_manifest(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Read a manifest; with `verify`, raise UserError for an output that is missing or has other bytes."""
    manifest = read_json(path)
    for name, entry in manifest["outputs"].items():
        if not verify:
            break
        file = Path(name)
        if not file.exists() or file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            raise UserError(f"{name}: missing or not the file that {path} describes; run the phase {manifest['phase']!r} again")
    return manifest
