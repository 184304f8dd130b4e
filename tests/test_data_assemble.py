"""`genseg data` from the command line: exit codes, messages, the report, reproducible bytes, and real data if present."""

from __future__ import annotations

import hashlib
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
    """Create a project folder with a small PNG data set in data/inputs/png, and make it the working directory."""
    monkeypatch.chdir(tmp_path)
    small_png(tmp_path / "data/inputs/png")
    write_params(tmp_path / "params.yaml", study_params(**png_params(Path("data/inputs/png"))))
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ARTIFACTS}


def test_data_command_writes_tables_report_and_manifest(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    statistics = report["statistics"]
    assert (statistics["noun_phrases"], statistics["grounded_phrases"], statistics["ungrounded_phrases"]) == (24, 18, 6)
    assert (statistics["things"], statistics["stuff"], statistics["singulars"], statistics["plurals"]) == (12, 6, 12, 6)
    assert (statistics["narratives_train"], statistics["narratives_test"], statistics["images"]) == (4, 2, 6)
    assert (statistics["phrases_per_caption"], statistics["grounded_per_caption"]) == (4, 3)
    assert report["splits"]["val"] == {"images": 2, "images_with_phrases": 2, "narratives": 2, "phrases": 6}
    assert report["skipped"] == []
    assert "gs_section41.csv` is missing" in Path("data/t/report.md").read_text()


def test_report_compares_with_published_values(project: Path) -> None:
    (project / "data/published").mkdir()
    text = (REPOSITORY / "data/published/gs_section41.csv").read_text()
    (project / "data/published/gs_section41.csv").write_text(text)
    assert main(["data"]) == 0
    markdown = Path("data/t/report.md").read_text()
    assert "| statistic | here | paper |" in markdown
    assert "| grounded noun phrases | 18 | 726,445 |" in markdown
    assert "| grounded noun phrases per caption | 3 | 5.1 |" in markdown
    assert json.loads(Path("data/t/report.json").read_text())["paper"]["masks"] == 741697


def test_skipped_items_are_reported(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five problems at once: the remaining rows are assembled, and the report and stderr list every problem."""
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
        (message,) = [
            line
            for line in lines
            if line.startswith(f"data: skipped {item['count']} {item['unit']}") and item["reason"] in line
        ]
        assert item["examples"][0] in message
    assert len(next(item for item in skipped if item["reason"] == "unknown segment id")["examples"]) == 2
    assert len(read_phrases("data/t/phrases.parquet")) == 15
    assert "unknown segment id" in Path("data/t/report.md").read_text()


def test_report_limits_examples_but_counts_all_skips(project: Path) -> None:
    extra = narrative(3, *[part("a dog", 999)] * 10)
    edit_json(project / "data/inputs/png/annotations/png_coco_train2017.json", lambda document: document.append(extra))
    assert main(["data"]) == 0
    (item,) = json.loads(Path("data/t/report.json").read_text())["skipped"]
    assert (item["count"], len(item["examples"])) == (10, 3)


def test_split_without_phrases_is_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (project / "data/inputs/png/val2017").iterdir():
        path.unlink()
    assert main(["data"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("genseg data: error: data/t/report.md: no phrase is left for test")
    assert any("missing image" in line for line in error)
    assert not Path("data/t/manifest.json").exists()


@pytest.mark.parametrize("params_file", ["nowhere.yaml", "typo.yaml"])
def test_invalid_params_are_reported_in_one_line(project: Path, params_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["data"]["png"]["narrative"] = document["data"]["png"].pop("narratives")
    (project / "typo.yaml").write_text(yaml.safe_dump(document))
    assert main(["data", "--params", params_file]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert params_file in error


def test_inputs_below_the_data_directory_are_rejected(project: Path) -> None:
    small_png(project / "data/t/png")
    with pytest.raises(UserError, match="data/inputs/"):
        assemble(study_params(**png_params(Path("data/t/png"))))
    assert (project / "data/t/png/train2017/000000000001.jpg").exists()


def test_bytes_do_not_depend_on_number_of_workers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params("params.yaml")
    assemble(params)
    first = hashes(Path("data/t"))
    monkeypatch.setattr(assembly, "_MIN_PARALLEL_IMAGES", 0)
    resources = params.resources.model_copy(update={"data": params.resources.data.model_copy(update={"threads": 2})})
    assemble(params.model_copy(update={"resources": resources}))
    assert hashes(Path("data/t")) == first


def test_val_split_depends_only_on_image_ids(project: Path) -> None:
    """An additional narrative, another row order and a missing test narrative move no image between train and val."""
    assert main(["data"]) == 0
    before = read_phrases("data/t/phrases.parquet").groupby("image_id")["split"].first()
    annotations = project / "data/inputs/png/annotations"
    edit_json(annotations / "png_coco_train2017.json", lambda rows: (rows.reverse(), rows.append(narrative(2, part("you", 5)))))
    edit_json(annotations / "png_coco_val2017.json", lambda rows: rows.pop(0))
    assert main(["data"]) == 0
    after = read_phrases("data/t/phrases.parquet").groupby("image_id")["split"].first()
    assert (after == before[after.index]).all()


def test_embedded_scenes_are_read_by_the_png_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assemble(study_params(source="scenes", scenes={"size": 64, "train_images": 6, "test_images": 4}))
    report = json.loads(Path("data/t/report.json").read_text())
    assert report["skipped"] == []
    frame = read_phrases("data/t/phrases.parquet")
    assert frame.groupby("split")["image_id"].nunique().to_dict() == {"test": 4, "train": 3, "val": 3}
    assert all(row_mask(row).any() for _, row in frame.iterrows())
    assert all(Path(name).exists() for name in frame["file_name"])


@pytest.mark.skipif(not (REAL / "coco_panoptic").is_dir(), reason="the real photos are not present")
def test_coco_photos_are_assembled_from_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "params/coco_photos.yaml").read_text().replace("data/inputs", str(REAL))
    text = text.replace("data/classes/", f"{REPOSITORY}/data/classes/")
    (tmp_path / "params.yaml").write_text(text)
    assert main(["data"]) == 0
    report = json.loads(Path("data/coco_photos/report.json").read_text())
    frame = read_phrases("data/coco_photos/phrases.parquet").assign(
        folder=lambda rows: rows["file_name"].str.split("/").str[-3]
    )

    # The expected phrases are those of the files, except for the train image that is a test image of the other folder.
    listed = {}
    for path in sorted(REAL.glob("coco_*/annotations/png_coco_*2017.json")):
        grounded = [
            (int(row["image_id"]), part["utterance"])
            for row in json.loads(path.read_text())
            for part in row["segments"]
            if part["segment_ids"]
        ]
        listed[path.parts[-3], "train" if "train" in path.name else "test"] = sorted(grounded)
    in_test = {image for (_, split), rows in listed.items() for image, _ in rows if split == "test"}
    for (folder, split), rows in listed.items():
        expected = [row for row in rows if split == "test" or row[0] not in in_test]
        read = frame[(frame["folder"] == folder) & (frame["split"].replace("val", "train") == split)]
        assert sorted(zip(read["image_id"], read["phrase"], strict=True)) == expected
    assert [(item["reason"], item["count"]) for item in report["skipped"]] == [("image in both splits", 1)]
    assert report["statistics"]["images"] == 81 + 53 - 1

    classes = read_phrases("data/coco_photos/class_phrases.parquet")
    assert set(classes.groupby("image_id").size()) == {133}
    assert {"the wall", "the door", "the wooden floor"} <= set(classes["phrase"])
    assert not classes["phrase"].str.contains("-").any()
    assert all(row_mask(row).any() for _, row in frame.sample(40, random_state=0).iterrows())


@pytest.mark.skipif(not (REAL / "camvid").is_dir(), reason="the street photos are not present")
def test_camvid_is_assembled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses only some of the images, because the whole data set takes too long for a test."""
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
