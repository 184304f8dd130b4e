"""Manifests: small JSON files that record what a phase wrote, from which inputs, params and code, on which device.

They are the edges of the DAG: a rule waits for the manifest of another phase and reads the large files that it lists. They
contain no times, so a phase that runs again on the same inputs writes the same bytes.
"""

import importlib.metadata
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genseg.artifacts.files import atomic_path, file_sha256, read_json, write_json
from genseg.errors import UserError
from genseg.params import Params
from genseg.phases import PHASES, code_hash

VERSION = 2
Paths = Iterable[str | Path]
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pycocotools", "pandas", "pyarrow")


def write_manifest(
    path: str | Path, phase: str, params: Params, inputs: Paths, outputs: Paths, device: str = "cpu", **facts: Any
) -> None:
    """Write the manifest of a phase, after all its outputs.

    Args:
        inputs, outputs: files, or directories with all their files. Their hashes are recorded.
        device: name of the device that computed the outputs.
        facts: JSON values that later phases or readers need.
    """
    write_record(path, _origin(phase, params) | {"phase": phase, "device": device} | facts, inputs, outputs)
    _copy(Path(path), _copy_path(path, params))


def write_record(path: str | Path, facts: dict[str, Any], inputs: Paths, outputs: Paths) -> None:
    """Write a manifest of outputs that belong to no phase. `facts` are JSON values to record, such as params."""
    files = {
        "version": VERSION,
        "inputs": {str(file): file_sha256(file) for file in _files(inputs)},
        "outputs": {str(file): {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in _files(outputs)},
    }
    write_json(path, files | facts)


def is_current(path: str | Path, phase: str, params: Params, inputs: Paths) -> bool:
    """Return whether a phase would write what its manifest describes, and its outputs are complete and unchanged."""
    try:
        facts = _origin(phase, params) | {"inputs": {str(file): file_sha256(file) for file in _files(inputs)}}
    except OSError:
        return False
    if not has_facts(path, params, facts):
        return False
    print(f"{phase}: {path} is up to date", flush=True)
    return True


def has_facts(path: str | Path, params: Params, facts: dict[str, Any]) -> bool:
    """Return whether a manifest holds these values, and its outputs are complete and unchanged.

    If it does, but Snakemake has removed it (as it removes the outputs of a rule before each job), it is put back.
    """
    path, copy = Path(path), _copy_path(path, params)
    try:
        manifest = read_manifest(path if path.exists() else copy, verify=True)
    except (UserError, OSError):
        return False
    if any(manifest.get(key) != value for key, value in facts.items()):
        return False
    if not path.exists():
        _copy(copy, path)
    return True


def read_manifest(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Read a manifest. Raises UserError if it cannot be read or, with `verify`, an output is missing or has changed."""
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "outputs" not in manifest:
        raise UserError(f"{path}: not a manifest; remove it and run `snakemake` again")
    if not verify:
        return manifest
    for name, entry in manifest["outputs"].items():
        file = Path(name)
        if not file.exists() or file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            raise UserError(f"{name}: missing, or not the file that {path} describes; run `genseg {manifest['phase']}` again")
    return manifest


def times_path(params: Params, phase: str) -> Path:
    """Return the file of a phase's measured times. It is not an output, because times differ between identical runs."""
    return params.work_dir / "times" / f"{phase}.json"


def _copy_path(path: str | Path, params: Params) -> Path:
    return params.work_dir / "manifests" / Path(path).parent.name / Path(path).name


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _origin(phase: str, params: Params) -> dict[str, Any]:
    """Return the params, code hash and library versions on which the outputs of a phase depend."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "params": params.subtree(*PHASES[phase].keys),
        "code": code_hash(phase),
        "libraries": libraries | {"python": platform.python_version()},
    }


def _files(paths: Paths) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files
