"""Folders of images and index masks: the layouts of CamVid, VOC, PASCAL Context and ADE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_folders import save_photo, study_params
from genseg.artifacts import masks
from genseg.artifacts.phrases import read_phrases, row_mask
from genseg.data import Source, index_masks
from genseg.data.assemble import assemble, open_source
from genseg.errors import UserError

CLASSES = "sky # stuff\ncar # thing\nroad\n"


def folder(root: Path, **changes: Any) -> dict[str, Any]:
    """Write CamVid's layout with two train images and one test image, where index 3 is unlabelled; return the params."""
    for split, stems in (("train", ["a_1", "a_2"]), ("val", ["b_1"])):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number, stem in enumerate(stems):
            save_photo(root / f"images/{split}/{stem}.jpg", 6, 8)
            indices = np.full((6, 8), 3, np.uint8)
            indices[:2], indices[3:, :number] = 0, 1
            Image.fromarray(indices).save(root / f"masks/{split}/{stem}.png")
    (root / "classes.txt").write_text(CLASSES)
    params = {
        "images": {"train": str(root / "images/train"), "test": str(root / "images/val")},
        "masks": {"train": str(root / "masks/train"), "test": str(root / "masks/val")},
        "lists": None,
        "mask_suffix": ".png",
        "classes": str(root / "classes.txt"),
        "ignore": [3],
        "background": None,
    }
    return {"source": "index_masks", "index_masks": params | changes}


def opened(data: dict[str, Any]) -> Source:
    return open_source(study_params(**data).data, Path("unused"))


def test_every_class_in_an_image_becomes_a_phrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    templates = ["the {name}", "a photo of a {name}, 100 %s", "{name}"]
    assemble(study_params(**folder(tmp_path), phrase_templates=templates, class_template="one {name}"))
    frame = read_phrases("data/t/phrases.parquet")
    assert sorted(frame.groupby("image_id")["class_id"].apply(list)) == [[0], [0], [0, 1]]
    allowed = {template.replace("{name}", name) for template in templates for name in ("sky", "car")}
    assert set(frame["phrase"]) <= allowed
    assert frame.groupby("split")["image_id"].nunique().to_dict() == {"test": 1, "train": 1, "val": 1}
    row = frame[frame["class_id"] == 1].iloc[0]
    assert (row["is_thing"], row["is_plural"], row["narrative_id"], row["phrase_id"]) == (True, False, "classes", 1)
    assert row_mask(row).sum() == 3
    assert row["caption"] == ", ".join(frame.loc[frame["image_id"] == row["image_id"], "phrase"])
    classes = read_phrases("data/t/class_phrases.parquet")
    assert set(classes["phrase"]) == {"one sky", "one car", "one road"}
    assert len(classes) == 2 * 3
    assert not classes["image_id"].isin(frame.loc[frame["split"] == "train", "image_id"]).any()


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_mask_of_every_png_mode_is_read(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint16 if mode == "I;16" else np.uint8)
    mask = Image.fromarray(values)
    if mode == "P":
        mask.putpalette(list(range(255, -1, -1)) * 3)
    assert mask.mode == mode
    mask.save(tmp_path / "m.png")
    assert (index_masks.read_indices(tmp_path / "m.png") == values).all()


def test_voc_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of images and palette masks, and lists per split; 0 is background, 255 is ignored, one image has no mask."""
    monkeypatch.chdir(tmp_path)
    for name in ("JPEGImages", "SegmentationClass", "lists"):
        (tmp_path / name).mkdir()
    stems = ["2007_000032", "2007_000039", "2008_000002"]
    for stem in [*stems, "2009_000001"]:
        save_photo(tmp_path / f"JPEGImages/{stem}.jpg", 5, 5)
    for number, stem in enumerate(stems):
        indices = np.zeros((5, 5), np.uint8)
        indices[0], indices[2, :3] = 255, min(number, 1) + 1
        mask = Image.fromarray(indices)
        mask.putpalette(list(range(256)) * 3)
        mask.save(tmp_path / f"SegmentationClass/{stem}.png")
    (tmp_path / "classes.txt").write_text("background\naeroplane # thing\nbicycle # thing\n")
    (tmp_path / "lists/train.txt").write_text("\n".join(stems[:2]) + "\n")
    (tmp_path / "lists/val.txt").write_text(stems[2])
    voc = {
        "images": {"train": "JPEGImages", "test": "JPEGImages"},
        "masks": {"train": "SegmentationClass", "test": "SegmentationClass"},
        "lists": {"train": "lists/train.txt", "test": "lists/val.txt"},
        "mask_suffix": ".png",
        "classes": "classes.txt",
        "ignore": [255],
        "background": 0,
    }
    assemble(study_params(source="index_masks", index_masks=voc))
    frame = read_phrases("data/t/phrases.parquet")
    assert "background" not in " ".join(frame["phrase"])
    assert frame[frame["split"] == "test"]["phrase"].tolist() == ["the bicycle"]
    classes = read_phrases("data/t/class_phrases.parquet")
    rows = classes[classes["split"] == "test"].set_index("class_id")
    assert [row_mask(rows.loc[index]).sum() for index in (0, 1, 2)] == [17, 0, 3]  # the five ignored pixels belong to no class
    assert list(rows.loc[0, "tags"]) == ["background"]


def test_class_file_lists_pixel_values(tmp_path: Path) -> None:
    """Several values are one class, and the id of a class is its line number."""
    data = folder(tmp_path)
    (tmp_path / "classes.txt").write_text("ground # stuff 20-22 7\ncar # thing 1 0\nroad\n")
    Image.fromarray(np.array([[20, 22, 7, 1, 0, 2, 3, 21]] * 6, np.uint8)).save(tmp_path / "masks/val/b_1.png")
    source = opened(data)
    assert [(item.id, item.name, item.is_thing) for item in source.classes] == [
        (0, "ground", False),
        (1, "car", True),
        (2, "road", False),
    ]
    rows = next(source.read(job) for job in source.jobs if job.split == "test")
    pixels = {number: np.flatnonzero(masks.decode(mask, 6, 8)[0]).tolist() for number, mask in (rows.class_masks or {}).items()}
    assert pixels == {0: [0, 1, 2, 7], 1: [3, 4], 2: [5]}


def test_ignored_class_keeps_the_other_class_ids(tmp_path: Path) -> None:
    """ADE's layout: index 0 is `other`, which is in the class file but ignored."""
    data = folder(tmp_path, ignore=[0, 3])
    source = opened(data)
    assert [(item.id, item.name) for item in source.classes] == [(1, "car"), (2, "road")]
    rows = [source.read(job) for job in source.jobs]
    assert sorted(len(item.phrases) for item in rows) == [0, 0, 1]  # an image without a class is also read
    assert all(item.class_masks is not None for item in rows)
    phrase = next(item.phrases[0] for item in rows if item.phrases)
    assert (phrase["class_id"], phrase["phrase_id"]) == (1, 0)


def test_image_ids_are_numbers_if_all_stems_are_distinct_numbers(tmp_path: Path) -> None:
    numbers = [("train", "000000000042"), ("train", "7"), ("test", "9")]
    assert list(index_masks.image_ids(numbers).values()) == [42, 7, 9]
    for keys in ([*numbers, ("test", "007")], [*numbers, ("test", "2007_000032")], [*numbers, ("test", "9" * 30)]):
        ids = index_masks.image_ids(keys)
        assert len(set(ids.values())) == 4
        assert all(0 <= image_id < 2**63 for image_id in ids.values())
        # The hash depends only on the split and the stem.
        assert ids["train", "7"] == index_masks.image_ids([("train", "7"), ("test", "x")])["train", "7"]
        assert ids["train", "7"] != 7


def test_images_with_the_same_hash_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_masks, "derive_seed", lambda *ids: 5)
    with pytest.raises(UserError, match="a \\(train\\) and b \\(test\\)"):
        index_masks.image_ids([("train", "a"), ("test", "b")])


def small_mask(root: Path) -> None:
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(root / "masks/train/a_1.png")


def colour_mask(root: Path) -> None:
    Image.new("RGB", (8, 6)).save(root / "masks/train/a_1.png")


def unknown_index_mask(root: Path) -> None:
    Image.fromarray(np.full((6, 8), 9, np.uint8)).save(root / "masks/train/a_1.png")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / "images/train/a_1.jpg").unlink(), "mask without an image"),
        (lambda root: (root / "masks/train/a_1.png").unlink(), "image without a mask"),
        (lambda root: save_photo(root / "images/train/a_1.png", 6, 8), "images with the same stem"),
        (lambda root: (root / "images/train/a_1.jpg").write_bytes(b"x"), "unreadable image"),
        (lambda root: (root / "masks/train/a_1.png").write_bytes(b"x"), "unreadable index mask"),
        (small_mask, "image and mask differ in size"),
        (colour_mask, "index mask in colour"),
        (unknown_index_mask, "unknown class index"),
    ],
)
def test_invalid_pair_is_skipped(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    data = folder(tmp_path)
    damage(tmp_path)
    source = opened(data)
    rows = [source.read(job) for job in source.jobs]
    skips = source.skips + [skip for item in rows for skip in item.skips]
    assert [skip.reason for skip in skips] == [reason]
    assert "a_1" in skips[0].message
    assert sum(len(item.phrases) for item in rows) == 3


def test_image_in_both_splits_is_used_for_test_only(tmp_path: Path) -> None:
    data = folder(tmp_path)
    data["index_masks"] |= {
        key: dict.fromkeys(("train", "test"), data["index_masks"][key]["test"]) for key in ("images", "masks")
    }
    source = opened(data)
    assert [job.split for job in source.jobs] == ["test"]
    assert [skip.reason for skip in source.skips] == ["image in both splits"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n\nroad\n", "line 2: expected a class name"),
        ("sky # vegetable\n", "line 1: expected the mark thing or stuff, got 'vegetable'"),
        ("sky\nsky\n", "line 2: duplicate class 'sky'"),
        ("sky # stuff 0-1 x7\n", "line 1: expected a pixel value or a range such as 91-181, got 'x7'"),
        ("sky # 0-2\ncar # thing 2\n", "line 2: pixel value 2 also belongs to another line"),
        ("sky # 1\ncar\n", "line 2: pixel value 1 also belongs to another line"),
        ("sky # 0 3\n", "line 1: pixel value 3 also belongs to another line or to data.index_masks.ignore"),
        ("", "no class names"),
    ],
)
def test_invalid_class_file_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    data = folder(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "nowhere.txt"}, "data.index_masks.classes"),
        ({"images": {"train": "nowhere", "test": "nowhere"}}, "nowhere: no such folder; set data.index_masks.images.test"),
        ({"masks": {"train": "nowhere"}}, "data.index_masks.masks has no test"),
        ({"lists": {"train": "nowhere", "test": "nowhere"}}, "data.index_masks.lists.test"),
        ({"background": 3}, "data.index_masks.background is 3"),
    ],
)
def test_invalid_param_is_reported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(folder(tmp_path, **change))


def test_unmarked_classes_are_stuff_and_counted(tmp_path: Path) -> None:
    source = opened(folder(tmp_path))
    assert [item.is_thing for item in source.classes] == [False, True, False]
    assert list(source.counts.values()) == [1]


def test_phrase_template_depends_only_on_image_and_class(tmp_path: Path) -> None:
    data = folder(tmp_path)
    templates = [f"{number} {{name}}" for number in range(50)]

    def phrases() -> pd.Series:
        source = open_source(study_params(**data, phrase_templates=templates).data, tmp_path)
        rows = [source.read(job) for job in source.jobs]
        return pd.Series({(row.image_id, item["class_id"]): item["phrase"] for row in rows for item in row.phrases})

    before = phrases()
    assert before.nunique() == len(before)
    (tmp_path / "images/train/a_1.jpg").unlink()
    after = phrases()
    assert len(after) < len(before)
    assert (after == before[after.index]).all()
