"""COCO-Object masks from COCO instances: overlaps, crowds, background and invalid annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data_folders import edit_json, save_photo, study_params
from genseg.artifacts.phrases import read_phrases, row_mask
from genseg.data.assemble import assemble, open_source
from genseg.errors import UserError

HEIGHT, WIDTH = 10, 12


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def instance(number: int, image_id: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category, "segmentation": segmentation, "iscrowd": crowd}


def folder(root: Path) -> dict[str, Any]:
    (root / "annotations").mkdir(parents=True)
    for split, images in (("train2017", [1, 2]), ("val2017", [11, 12])):
        (root / split).mkdir()
        for image_id in images:
            save_photo(root / f"{split}/{image_id}.jpg", HEIGHT, WIDTH)
        first = images[0]
        counts = [100, 20]  # column by column: 10 empty columns, then 2 columns of the crowd
        document = {
            "images": [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in images],
            "annotations": [
                instance(100 * first + 1, first, 1, box(0, 0, 6, 6)),
                instance(100 * first + 2, first, 3, box(2, 2, 4, 4)),
                instance(100 * first + 3, first, 1, box(8, 8, 9, 9)),
                instance(100 * first + 4, first, 2, {"size": [HEIGHT, WIDTH], "counts": counts}, crowd=1),
                instance(100 * images[1] + 1, images[1], 3, box(0, 0, 2, 2)),
            ],
            "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}, {"id": 3, "name": "car"}],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return {"source": "coco_object", "coco_object": {"images": str(root), "annotations": str(root / "annotations")}}


def test_classes_partition_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assemble(study_params(**folder(tmp_path / "coco")))
    frame = read_phrases("data/t/phrases.parquet")
    rows = frame[frame["image_id"] == 11].set_index("class_id")
    assert rows["phrase"].to_dict() == {1: "the person", 2: "the bicycle", 3: "the car"}
    assert rows["is_plural"].to_dict() == {1: True, 2: True, 3: False}  # two instances; a crowd; one instance
    assert sorted(rows.loc[1, "segment_ids"]) == [1101, 1103]
    # The smaller car is on top of the person.
    assert row_mask(rows.loc[3])[2:4, 2:4].all()
    assert not (row_mask(rows.loc[3]) & row_mask(rows.loc[1])).any()
    assert row_mask(rows.loc[2]).sum() == 20
    assert row_mask(rows.loc[2])[:, 10:].all()
    classes = read_phrases("data/t/class_phrases.parquet")
    rows = classes[classes["image_id"] == 11]
    assert rows["class_id"].tolist() == [0, 1, 2, 3]
    assert (sum(row_mask(row).astype(int) for _, row in rows.iterrows()) == 1).all()
    class_list = json.loads(Path("data/t/classes.json").read_text())
    assert [(item["id"], item["name"], item["background"]) for item in class_list][:2] == [
        (0, "background", True),
        (1, "person", False),
    ]


def test_image_without_instances_is_background(tmp_path: Path) -> None:
    data = folder(tmp_path)
    edit_json(tmp_path / "annotations/instances_val2017.json", lambda document: document["annotations"].pop())
    source = open_source(study_params(**data).data, tmp_path)
    rows = {job.image_id: source.read(job) for job in source.jobs}
    assert rows[12].phrases == []
    assert set(rows[12].class_masks or {}) == {0}


@pytest.mark.parametrize(
    "bad",
    [
        instance(9, 1, 99, box(0, 0, 2, 2)),
        instance(9, 1, 1, [[0, 0, 2]]),
        instance(9, 1, 1, []),
        instance(9, 1, 1, {"size": [3, 3], "counts": [9]}),
        instance(9, 1, 1, {"size": [HEIGHT, WIDTH], "counts": [9]}),
        instance(9, 1, 1, {"size": [HEIGHT, WIDTH], "counts": "oP"}),
        {"id": 9, "image_id": 1, "category_id": 1},
        instance(9, 77, 1, box(0, 0, 2, 2)),
    ],
)
def test_invalid_annotation_is_skipped(tmp_path: Path, bad: dict[str, Any]) -> None:
    data = folder(tmp_path)
    source = open_source(study_params(**data).data, tmp_path)
    before = [source.read(job).phrases for job in source.jobs]
    edit_json(tmp_path / "annotations/instances_train2017.json", lambda document: document["annotations"].append(bad))
    source = open_source(study_params(**data).data, tmp_path)
    rows = [source.read(job) for job in source.jobs]
    assert [item.phrases for item in rows] == before
    skips = source.skips + [skip for item in rows for skip in item.skips]
    assert [skip.unit for skip in skips] == ["annotation"]
    assert "instances_train2017.json" in skips[0].message


def test_compressed_rle_is_read(tmp_path: Path) -> None:
    data = folder(tmp_path)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:5, 1:9] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    extra = instance(9, 2, 2, {"size": [HEIGHT, WIDTH], "counts": rle})
    edit_json(tmp_path / "annotations/instances_train2017.json", lambda document: document["annotations"].append(extra))
    source = open_source(study_params(**data).data, tmp_path)
    rows = next(source.read(job) for job in source.jobs if job.image_id == 2)
    phrase = next(item for item in rows.phrases if item["class_id"] == 2)
    assert (coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": phrase["mask"]}) == mask).all()


def test_missing_image_is_skipped_and_invalid_file_is_an_error(tmp_path: Path) -> None:
    data = folder(tmp_path)
    (tmp_path / "train2017/1.jpg").unlink()
    source = open_source(study_params(**data).data, tmp_path)
    skips = [skip for job in source.jobs for skip in source.read(job).skips]
    assert [skip.reason for skip in skips] == ["missing image"]
    path = tmp_path / "annotations/instances_val2017.json"
    edit_json(path, lambda document: document["categories"].append({"id": 0, "name": "cat"}))
    with pytest.raises(UserError, match="0 is the background"):
        open_source(study_params(**data).data, tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="not valid JSON"):
        open_source(study_params(**data).data, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.coco_object\.annotations"):
        open_source(study_params(**data).data, tmp_path)
