"""`genseg data` as a user meets it: exit codes, lines on stderr, the report, equal bytes, real data where there are some."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from data_folders import REPOSITORY, edit_json, narrative, part, png_params, small_png, study_params, write_params
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.phrases import read_phrases, row_mask
from genseg.cli.main import main
from genseg.data import assemble as assembly
from genseg.data.assemble import assemble
from genseg.errors import UserError
from genseg.params import load_params

REAL = REPOSITORY.parent / "shared" / "data"
ARTIFACTS = ("phrases.parquet", "class_phrases.parquet", "classes.json", "report.json", "report.md")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a small PNG data set in data/inputs/png, as working directory."""
    monkeypatch.chdir(tmp_path)
    small_png(tmp_path / "data/inputs/png")
    write_params(tmp_path / "params.yaml", study_params(**png_params(Path("data/inputs/png"))))
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ARTIFACTS}


def test_a_study_is_assembled_and_described(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    captured = capsys.readouterr()
    assert "6 images, 6 narratives, 18 grounded phrases" in captured.out
    assert "data: 6 of 6 images read" in captured.err
    frame = read_phrases("data/t/phrases.parquet")
    assert frame["file_name"].iloc[0] == "data/inputs/png/train2017/000000000001.jpg"
    manifest = read_manifest("data/t/manifest.json", verify=True)
    assert sorted(manifest["outputs"]) == sorted(f"data/t/{name}" for name in ARTIFACTS)
    assert len(manifest["inputs"]) == 4
    assert set(manifest["params"]) == {"data"}
    report = json.loads(Path("data/t/report.json").read_text())
    found = report["statistics"]
    assert (found["noun_phrases"], found["grounded_phrases"], found["ungrounded_phrases"]) == (24, 18, 6)
    assert (found["things"], found["stuff"], found["singulars"], found["plurals"]) == (12, 6, 12, 6)
    assert (found["narratives_train"], found["narratives_test"], found["images"]) == (4, 2, 6)
    assert (found["phrases_per_caption"], found["grounded_per_caption"]) == (4, 3)
    assert report["splits"]["val"] == {"images": 2, "images_with_phrases": 2, "narratives": 2, "phrases": 6}
    assert report["skipped"] == []
    assert "is not here" in Path("data/t/report.md").read_text()


def test_published_numbers_have_a_column_of_their_own(project: Path) -> None:
    (project / "data/published").mkdir()
    text = (REPOSITORY / "data/published/gs_section41.csv").read_text()
    (project / "data/published/gs_section41.csv").write_text(text)
    assert main(["data"]) == 0
    markdown = Path("data/t/report.md").read_text()
    assert "| statistic | here | paper |" in markdown
    assert "| grounded noun phrases | 18 | 726,445 |" in markdown
    assert "| grounded noun phrases per caption | 3 | 5.1 |" in markdown
    assert json.loads(Path("data/t/report.json").read_text())["paper"]["masks"] == 741697


def test_nothing_is_lost_silently(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five mishaps at once: the rest assembles, and report and stderr name each."""
    root = project / "data/inputs/png"
    (root / "train2017/000000000002.jpg").unlink()
    rows = [
        narrative(3, part("a dog", 999), part("", 5), part("a wolf", 998)),
        {"image_id": "x", "segments": [part("a cat", 5)]},
        narrative(50, part("a cat", 5)),
    ]
    edit_json(root / "annotations/png_coco_train2017.json", lambda document: document.extend(rows))
    assert main(["data"]) == 0
    lines = capsys.readouterr().err.splitlines()
    skipped = json.loads(Path("data/t/report.json").read_text())["skipped"]
    assert {(item["unit"], item["reason"]): (item["count"], item["narratives"], item["phrases"]) for item in skipped} == {
        ("image", "missing image"): (1, 1, 3),
        ("image", "unknown image id"): (1, 1, 1),
        ("narrative", "malformed narrative"): (1, 1, 1),
        ("phrase", "empty phrase"): (1, 0, 1),
        ("phrase", "unknown segment id"): (2, 0, 2),
    }
    for item in skipped:
        (told,) = [
            line
            for line in lines
            if line.startswith(f"data: skipped {item['count']} {item['unit']}") and item["reason"] in line
        ]
        assert item["examples"][0] in told
    assert len(next(item for item in skipped if item["reason"] == "unknown segment id")["examples"]) == 2
    assert len(read_phrases("data/t/phrases.parquet")) == 15
    assert "unknown segment id" in Path("data/t/report.md").read_text()


def test_examples_are_few_and_counts_are_whole(project: Path) -> None:
    extra = narrative(3, *[part("a dog", 999)] * 10)
    edit_json(project / "data/inputs/png/annotations/png_coco_train2017.json", lambda document: document.append(extra))
    assert main(["data"]) == 0
    (item,) = json.loads(Path("data/t/report.json").read_text())["skipped"]
    assert (item["count"], len(item["examples"])) == (10, 3)


def test_a_split_without_phrases_is_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (project / "data/inputs/png/val2017").iterdir():
        path.unlink()
    assert main(["data"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("genseg data: error: data/t/report.md: no phrase is left for test")
    assert any("missing image" in line for line in error)
    assert not Path("data/t/manifest.json").exists()


@pytest.mark.parametrize("study", ["nowhere.yaml", "typo.yaml"])
def test_bad_params_exit_with_one_line(project: Path, study: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["data"]["png"]["narrative"] = document["data"]["png"].pop("narratives")
    (project / "typo.yaml").write_text(yaml.safe_dump(document))
    assert main(["data", "--params", study]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert study in error


def test_inputs_below_the_studys_own_folder_are_refused(project: Path) -> None:
    small_png(project / "data/t/png")
    with pytest.raises(UserError, match="data/inputs/"):
        assemble(study_params(**png_params(Path("data/t/png"))))
    assert (project / "data/t/png/train2017/000000000001.jpg").exists()


def test_equal_bytes_again_and_with_more_workers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_params("params.yaml")
    assemble(study)
    first = hashes(Path("data/t"))
    monkeypatch.setattr(assembly, "_PARALLEL_FROM", 0)
    more = study.resources["data"].model_copy(update={"threads": 2})
    assemble(study.model_copy(update={"resources": study.resources | {"data": more}}))
    assert hashes(Path("data/t")) == first


def test_val_depends_on_the_image_ids_alone(project: Path) -> None:
    """Neither rows nor the order of the file nor the images of test move an image between train and val."""
    assert main(["data"]) == 0
    before = read_phrases("data/t/phrases.parquet").groupby("image_id")["split"].first()
    annotations = project / "data/inputs/png/annotations"
    edit_json(annotations / "png_coco_train2017.json", lambda rows: (rows.reverse(), rows.append(narrative(2, part("you", 5)))))
    edit_json(annotations / "png_coco_val2017.json", lambda rows: rows.pop(0))
    assert main(["data"]) == 0
    after = read_phrases("data/t/phrases.parquet").groupby("image_id")["split"].first()
    assert (after == before[after.index]).all()


@pytest.mark.skipif(importlib.util.find_spec("genseg.data.scenes") is None, reason="the embedded scenes are not built yet")
def test_the_embedded_scenes_pass_through_the_same_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["data"]["scenes"]
    assemble(study_params(source="scenes", scenes=shipped | {"size": 64, "train_images": 6, "test_images": 4}))
    report = json.loads(Path("data/t/report.json").read_text())
    assert report["skipped"] == []
    frame = read_phrases("data/t/phrases.parquet")
    assert frame.groupby("split")["image_id"].nunique().to_dict() == {"test": 4, "train": 3, "val": 3}
    assert all(row_mask(row).any() for _, row in frame.iterrows())
    assert all(Path(name).exists() for name in frame["file_name"])


def real_study(name: str, tmp_path: Path) -> str:
    """Copy of a shipped params file whose input paths are the real ones."""
    text = (REPOSITORY / f"params/{name}.yaml").read_text()
    text = text.replace(f"data/inputs/{name}", str(REAL / name)).replace("data/classes/", f"{REPOSITORY}/data/classes/")
    (tmp_path / "params.yaml").write_text(text)
    return str(tmp_path / "params.yaml")


@pytest.mark.skipif(not (REAL / "coco_narrated").is_dir(), reason="no real photos here")
def test_coco_narrated_assembles_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "--params", real_study("coco_narrated", tmp_path)]) == 0
    report = json.loads(Path("data/coco_narrated/report.json").read_text())
    found = report["statistics"]
    assert (found["images"], found["narratives_train"] + found["narratives_test"], found["grounded_phrases"]) == (81, 333, 499)
    assert report["skipped"] == []
    frame = read_phrases("data/coco_narrated/phrases.parquet")
    assert len(frame) == 499
    assert set(frame["split"]) == {"train", "val", "test"}
    assert frame["mask"].map(len).min() > 0
    classes = read_phrases("data/coco_narrated/class_phrases.parquet")
    assert classes[classes["split"] == "test"]["image_id"].nunique() == 20
    assert set(classes.groupby("image_id").size()) == {80}
    assert all(row_mask(row).any() for _, row in frame.sample(40, random_state=0).iterrows())


@pytest.mark.skipif(not (REAL / "camvid").is_dir(), reason="no street photos here")
def test_camvid_assembles_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it, linked: the whole takes too long for a test."""
    monkeypatch.chdir(tmp_path)
    for kind in ("images", "masks"):
        for split, count in (("train", 20), ("val", 6)):
            folder = tmp_path / "data/inputs/camvid" / kind / split
            folder.mkdir(parents=True)
            for path in sorted((REAL / "camvid" / kind / split).iterdir())[:count]:
                (folder / path.name).symlink_to(path)
    text = (REPOSITORY / "params/camvid.yaml").read_text().replace("data/classes/", f"{REPOSITORY}/data/classes/")
    (tmp_path / "params.yaml").write_text(text)
    assert main(["data"]) == 0
    frame = read_phrases("data/camvid/phrases.parquet")
    assert frame.groupby("split")["image_id"].nunique().to_dict() == {"train": 18, "val": 2, "test": 6}
    classes = read_phrases("data/camvid/class_phrases.parquet")
    assert len(classes) == 8 * 11
    names = [item["name"] for item in json.loads(Path("data/camvid/classes.json").read_text())]
    assert names == (REAL / "camvid/classes.txt").read_text().split()
    assert pd.Series(names)[frame["class_id"]].is_unique is False
    assert frame["is_thing"].any()
    assert not frame["is_thing"].all()
