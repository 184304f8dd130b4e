"""Reuse of finished work: when a manifest or a predictions file is current, and which files are removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genseg.artifacts import manifest as manifests
from genseg.artifacts.manifest import is_current, read_manifest, write_manifest
from genseg.artifacts.masks import encode
from genseg.artifacts.predictions import maps_path, write_with_maps
from genseg.artifacts.reuse import has_key, has_maps, prune, with_maps
from genseg.errors import UserError
from genseg.params import Params, validate_params

PARAMS = Params()


# ---------------------------------------------------------------------------------------------------------- manifests
@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a manifest of the phase `backbone` with one input file, and a file and a folder as outputs."""
    monkeypatch.chdir(tmp_path)
    Path("input.bin").write_bytes(b"1")
    Path("out/deep").mkdir(parents=True)
    Path("out/a.bin").write_bytes(b"2")
    Path("out/deep/b.bin").write_bytes(b"3")
    Path("c.bin").write_bytes(b"4")
    return write_backbone_manifest(Path("manifest.json"))


def write_backbone_manifest(path: Path, params: Params = PARAMS) -> Path:
    write_manifest(path, "backbone", params, ["input.bin"], ["out", "c.bin"], weights=[1.5, None])
    return path


def backbone_is_current(manifest: Path, params: Params = PARAMS) -> bool:
    return is_current(manifest, "backbone", params, ["input.bin"])


def test_manifest_records_sizes_and_hashes_of_all_files(manifest: Path) -> None:
    document = read_manifest(manifest, verify=True)
    assert {path: output["bytes"] for path, output in document["outputs"].items()} == {
        "out/a.bin": 1,
        "out/deep/b.bin": 1,
        "c.bin": 1,
    }
    assert document["outputs"]["out/a.bin"]["sha256"] != document["outputs"]["c.bin"]["sha256"]
    assert list(document["inputs"]) == ["input.bin"]
    assert document["params"].keys() == {"seed", "backbone"}
    assert (document["phase"], document["device"], document["weights"]) == ("backbone", "cpu", [1.5, None])


def test_manifest_written_twice_has_the_same_bytes(manifest: Path) -> None:
    assert write_backbone_manifest(Path("again.json")).read_bytes() == manifest.read_bytes()


def test_unchanged_phase_is_current(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert backbone_is_current(manifest)
    assert capsys.readouterr().out == "backbone: manifest.json is up to date\n"


@pytest.mark.parametrize("name", ["input.bin", "out/a.bin", "out/deep/b.bin", "c.bin"])
def test_phase_with_a_changed_or_missing_file_is_not_current(manifest: Path, name: str) -> None:
    content = Path(name).read_bytes()
    for changed in (b"9", content * 2, b""):  # the same size, longer, shorter
        Path(name).write_bytes(changed)
        assert not backbone_is_current(manifest)
    Path(name).unlink()
    assert not backbone_is_current(manifest)
    Path(name).write_bytes(content)
    assert backbone_is_current(manifest)


def test_phase_with_other_inputs_is_not_current(manifest: Path) -> None:
    assert not is_current(manifest, "backbone", PARAMS, [])
    assert not is_current(manifest, "backbone", PARAMS, ["input.bin", "c.bin"])


def test_phase_depends_only_on_its_params(manifest: Path) -> None:
    assert not backbone_is_current(manifest, validate_params({"seed": 1}))
    assert not backbone_is_current(manifest, validate_params({"backbone": {"size": 64}}))
    assert backbone_is_current(manifest, validate_params({"device": "cpu", "tables": {"dpi": 99}}))


def test_phase_with_changed_code_is_not_current(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "code_hash", lambda phase: "other code")
    assert not backbone_is_current(manifest)


def test_phase_with_another_library_version_is_not_current(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests.importlib.metadata, "version", lambda name: "0.0")
    assert not backbone_is_current(manifest)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2'])
def test_phase_without_a_readable_manifest_is_not_current(manifest: Path, content: str) -> None:
    manifest.write_text(content)
    assert not backbone_is_current(manifest)


def test_removed_manifest_is_put_back_only_if_the_phase_is_current(manifest: Path) -> None:
    content = manifest.read_bytes()
    manifest.unlink()
    assert not backbone_is_current(manifest, validate_params({"seed": 1}))
    assert not manifest.exists()
    assert backbone_is_current(manifest)
    assert manifest.read_bytes() == content
    manifest.unlink()
    Path("c.bin").write_bytes(b"other")
    assert not backbone_is_current(manifest)
    assert not manifest.exists()


def test_changed_output_is_an_error_only_if_verified(manifest: Path) -> None:
    Path("out/a.bin").write_bytes(b"9")
    assert read_manifest(manifest)["phase"] == "backbone"
    with pytest.raises(UserError, match=r"out/a\.bin: missing, or not the file that .*; run `genseg backbone` again"):
        read_manifest(manifest, verify=True)


# -------------------------------------------------------------------------------------------------------- predictions
def write_predictions(path: Path, maps: bool = True, key: str = "k") -> Path:
    frame = pd.DataFrame({"image_id": [1], "narrative_id": "n", "phrase_id": 0, "mask": [encode(np.eye(4))], "score": 0.5})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_with_maps(frame, np.zeros((1, 2, 2), np.float32) if maps else None, path, key=key)
    return path


def test_key_matches_only_if_all_predictions_have_it(tmp_path: Path) -> None:
    first = write_predictions(tmp_path / "a.parquet")
    second = write_predictions(tmp_path / "b.parquet", key="other")
    assert has_key("k", first)
    assert has_key("other", second)
    assert not has_key("k", first, second)
    assert not has_key("k", first, tmp_path / "missing.parquet")
    first.write_bytes(first.read_bytes()[:-3])
    assert not has_key("k", first)


def test_maps_are_listed_only_where_they_exist(tmp_path: Path) -> None:
    first = write_predictions(tmp_path / "a.parquet")
    second = write_predictions(tmp_path / "b.parquet", maps=False)
    assert has_maps(first)
    assert not has_maps(first, second)
    assert with_maps([first, second]) == [first, second, maps_path(first)]
    write_predictions(first, maps=False)
    assert not has_maps(first)


def test_prune_removes_other_files_and_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("kept.parquet", "old.parquet", "folder/deep/kept.txt", "old/deep/old.txt", "mixed/kept.txt", "mixed/old.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty/empty").mkdir(parents=True)
    prune(tmp_path, [tmp_path / "kept.parquet", tmp_path / "folder", tmp_path / "mixed/kept.txt"], "sample")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"kept.parquet", "folder", "folder/deep", "folder/deep/kept.txt", "mixed", "mixed/kept.txt"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"sample: removed {tmp_path / name}, which the study no longer has"
        for name in ("mixed/old.txt", "old/deep/old.txt", "old.parquet")
    ]
