"""COCO panoptic + PNG narratives: the known pitfalls of the formats, and invalid files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_folders import edit_json, narrative, part, png_params, save_ids, small_png, study_params, write_png
from genseg.artifacts.files import read_json
from genseg.artifacts.phrases import read_phrases, row_mask
from genseg.data import ImageRows, coco_panoptic
from genseg.data.assemble import assemble, open_source
from genseg.errors import UserError


def read_all(root: Path) -> dict[int, ImageRows]:
    """Return the reader's rows by image id."""
    source = open_source(study_params(**png_params(root)).data, root / "unused")
    return {job.image_id: source.read(job) for job in source.jobs}


def assembled_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    monkeypatch.chdir(root)
    assemble(study_params(**png_params(root / "png")))
    return read_phrases("data/t/phrases.parquet")


def reasons(rows: ImageRows) -> list[str]:
    return [skip.reason for skip in rows.skips]


def test_segment_ids_are_matched_within_their_image(tmp_path: Path) -> None:
    """Segment 5 is a person on the left of one image and a tree on the right of the other."""
    left, right = np.zeros((6, 8), int), np.zeros((6, 8), int)
    left[:, :3], right[:, 5:] = 5, 5
    images = {1: (left, [(5, 1)]), 2: (right, [(5, 184)])}
    write_png(tmp_path, "train2017", images, [narrative(2, part("it", 5)), narrative(1, part("it", 5))])
    write_png(tmp_path, "val2017", {}, [])
    edit_json(
        tmp_path / "annotations/panoptic_val2017.json",
        lambda document: document["annotations"].append({"image_id": 99, "file_name": "x.png", "segments_info": []}),
    )
    png = study_params(**png_params(tmp_path)).data.png
    assert png is not None
    source = coco_panoptic.open_source([png], 0.5)
    phrases = {job.image_id: source.read(job).phrases[0] for job in source.jobs}
    assert phrases[1]["is_thing"] is True
    assert phrases[2]["is_thing"] is False
    assert (row_mask(pd.Series(phrases[1] | {"height": 6, "width": 8})) == (left == 5)).all()
    assert (row_mask(pd.Series(phrases[2] | {"height": 6, "width": 8})) == (right == 5)).all()


def test_segment_ids_above_255_do_not_overflow(tmp_path: Path) -> None:
    ids = np.array([[0, 255, 256, 257], [65535, 65536, 16777215, 200 * 256 + 3 * 65536 + 5]])
    save_ids(tmp_path / "a.png", ids)
    assert (coco_panoptic.panoptic_ids(tmp_path / "a.png") == ids).all()


def test_palette_png_is_read_by_colour_and_grey_png_is_rejected(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 7, 1, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png")
    assert coco_panoptic.panoptic_ids(tmp_path / "p.png").tolist() == [[0, 263]]
    Image.new("L", (2, 1)).save(tmp_path / "l.png")
    with pytest.raises(UserError, match="mode L"):
        coco_panoptic.panoptic_ids(tmp_path / "l.png")


def test_mask_of_a_phrase_is_the_union_of_its_segments(tmp_path: Path) -> None:
    small_png(tmp_path)
    rows = [narrative(1, part("both", 5, 301, 5)), narrative(1, part("all", 70001, 5))]
    edit_json(tmp_path / "annotations/png_coco_train2017.json", lambda document: document.extend(rows))
    image_rows = read_all(tmp_path)[1]
    first, second = (next(item for item in image_rows.phrases if item["phrase"] == text) for text in ("both", "all"))
    ids = coco_panoptic.panoptic_ids(tmp_path / "annotations/panoptic_train2017/000000000001.png")
    mask = row_mask(pd.Series(first | {"height": 12, "width": 16}))
    assert (mask == np.isin(ids, [5, 301])).all()
    assert first["segment_ids"] == [5, 301]
    assert image_rows.counts["duplicate segment ids within a phrase, counted once"] == 1
    # A thing and stuff: `is_thing` is that of the last segment, and the class is null.
    assert (second["is_thing"], second["class_id"]) == (True, None)
    assert (first["narrative_id"], first["phrase_id"]) == ("1-1", 0)


def test_crowds_are_treated_as_other_segments(tmp_path: Path) -> None:
    small_png(tmp_path)

    def set_crowd(document: dict) -> None:
        document["annotations"][0]["segments_info"][0]["iscrowd"] = 1

    before = read_all(tmp_path)[1].phrases
    edit_json(tmp_path / "annotations/panoptic_train2017.json", set_crowd)
    assert read_all(tmp_path)[1].phrases == before


def test_phrase_table_columns_have_expected_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_png(tmp_path / "png")
    frame = assembled_table(tmp_path, monkeypatch)
    assert len(frame) == 6 * 3
    assert set(frame.loc[frame["image_id"] > 10, "split"]) == {"test"}
    assert frame[frame["image_id"] < 10].groupby("image_id")["split"].nunique().max() == 1
    assert frame.loc[frame["split"] == "val", "image_id"].nunique() == 2  # half of the four images
    row = frame[(frame["image_id"] == 12) & (frame["phrase_id"] == 3)].iloc[0]
    assert row["phrase"] == "on trees"
    assert row["narrative_id"] == "12-0"
    assert row["caption"] == "near a person a cat on trees the air"
    assert (row["is_thing"], row["is_plural"], row["class_id"], list(row["segment_ids"])) == (False, True, 184, [70012])
    assert row["file_name"] == str(tmp_path / "png/val2017/000000000012.jpg")
    assert row_mask(row)[10:].all()
    assert row_mask(row).sum() == 32


def test_several_folders_are_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image 12 of test is a train image of the second folder, and image 11 is a test image of both."""
    small_png(tmp_path / "png")
    ids = np.full((6, 8), 5)
    ids[:3] = 9
    image = (ids, [(5, 200), (9, 17)])
    other = [narrative(number, part("a lawn", 5)) for number in (12, 13, 14)]
    write_png(tmp_path / "more", "train2017", dict.fromkeys((12, 13, 14), image), other)
    write_png(tmp_path / "more", "val2017", dict.fromkeys((11, 15), image), [narrative(11, part("a lawn", 5))])
    lawn = {"id": 200, "name": "lawn", "isthing": 0}
    for split in ("train2017", "val2017"):
        edit_json(tmp_path / f"more/annotations/panoptic_{split}.json", lambda document: document["categories"].append(lawn))
    data = png_params(tmp_path / "png")
    data["png"]["more"] = [{key: png_params(tmp_path / "more")["png"][key] for key in ("images", "annotations", "narratives")}]
    monkeypatch.chdir(tmp_path)
    assemble(study_params(**data))
    frame = read_phrases("data/t/phrases.parquet")
    folders = frame["file_name"].str.split("/").str[-3].groupby(frame["image_id"]).agg(set)
    assert folders.to_dict() == {number: {"png"} for number in (1, 2, 3, 4, 11, 12)} | {13: {"more"}, 14: {"more"}}
    splits = frame.groupby("image_id")["split"].agg(set)
    assert splits[11] == splits[12] == {"test"}
    assert sorted(map(min, splits[[13, 14]])) == ["train", "val"]  # half of the train images of every folder
    assert row_mask(frame[frame["image_id"] == 13].iloc[0]).sum() == 24
    classes = read_phrases("data/t/class_phrases.parquet")
    assert set(classes.loc[classes["split"] == "test", "image_id"]) == {11, 12, 15}
    assert set(classes.groupby("image_id")["class_id"].agg(tuple)) == {(1, 17, 184, 200)}
    source = open_source(study_params(**data).data, tmp_path)
    assert sorted((skip.reason, skip.narratives) for skip in source.skips) == [
        ("image in both splits", 1),
        ("image in several sources", 1),
    ]
    edit_json(
        tmp_path / "more/annotations/panoptic_val2017.json", lambda document: document["categories"][1].update(name="dog")
    )
    with pytest.raises(UserError, match="category 17 is 'dog' in this file but 'cat' elsewhere"):
        open_source(study_params(**data).data, tmp_path)


def test_categories_are_named_by_the_class_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_png(tmp_path / "png")
    (tmp_path / "names.csv").write_text("category,name\nperson,person\ncat,two cats\ntree,tree trunk\nunused,x\n")
    monkeypatch.chdir(tmp_path)
    data = png_params(tmp_path / "png")
    data["png"]["classes"] = "names.csv"
    assemble(study_params(**data))
    classes = read_phrases("data/t/class_phrases.parquet")
    assert set(classes["phrase"]) == {"the person", "two cats", "the tree trunk"}
    assert [item["name"] for item in read_json(Path("data/t/classes.json"))] == ["person", "two cats", "tree trunk"]
    assert "names.csv" in read_json(Path("data/t/manifest.json"))["inputs"]
    (tmp_path / "names.csv").write_text("category,name\nperson,person\ntree,tree\n")
    with pytest.raises(UserError, match=r"names.csv: category 'cat' of the annotations has no name; add a row"):
        assemble(study_params(**data))
    with pytest.raises(UserError, match="not a CSV with the columns category and name"):
        assemble(study_params(**data | {"png": data["png"] | {"classes": "missing.csv"}}))


def test_class_phrases_contain_every_class_for_val_and_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_png(tmp_path / "png")
    # Test image 12 loses its narrative but has class phrases, for mIoU. Its cat becomes a second segment of class person.
    annotations = tmp_path / "png/annotations"
    edit_json(annotations / "png_coco_val2017.json", lambda rows: rows.pop())
    edit_json(
        annotations / "panoptic_val2017.json",
        lambda document: document["annotations"][1]["segments_info"][1].update(category_id=1),
    )
    frame = assembled_table(tmp_path, monkeypatch)
    classes = read_phrases("data/t/class_phrases.parquet")
    images = {11, 12} | set(frame.loc[frame["split"] == "val", "image_id"])
    assert set(classes["image_id"]) == images
    assert (classes.groupby("image_id")["phrase_id"].apply(list).map(tuple) == (0, 1, 2)).all()
    assert classes["class_id"].tolist() == [1, 17, 184] * len(images)
    assert set(classes["phrase"]) == {"the person", "the cat", "the tree"}
    ids = coco_panoptic.panoptic_ids(annotations / "panoptic_val2017/000000000012.png")
    rows = classes[classes["image_id"] == 12].set_index("class_id")
    assert (row_mask(rows.loc[1]) == np.isin(ids, [5, 312])).all()
    assert not row_mask(rows.loc[17]).any()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (part("a dog", 999), "unknown segment id"),
        (part("both", 5, 999), "unknown segment id"),
        (part("  ", 5), "empty phrase"),
        (part("a cat", "x7"), "malformed segment id"),
        (part("a ghost", 8), "empty mask"),
        (part("twins", 9), "duplicate segment id"),
        (part("a thing", 10), "unknown category id"),
    ],
)
def test_invalid_phrase_is_skipped(tmp_path: Path, bad: dict, reason: str) -> None:
    small_png(tmp_path)
    extra = [
        {"id": 8, "category_id": 1},
        {"id": 9, "category_id": 1},
        {"id": 9, "category_id": 17},
        {"id": 10, "category_id": 4},
    ]
    edit_json(
        tmp_path / "annotations/panoptic_train2017.json",
        lambda document: document["annotations"][0]["segments_info"].extend(extra),
    )
    edit_json(tmp_path / "annotations/png_coco_train2017.json", lambda rows: rows[0]["segments"].insert(0, bad))
    rows = read_all(tmp_path)[1]
    assert reasons(rows) == [reason]
    assert rows.skips[0].phrases == 1
    assert "png_coco_train2017.json: row 0 (image 1), segment 0" in rows.skips[0].message
    assert [item["phrase"] for item in rows.phrases] == ["a person", "a cat", "on trees"]


def test_empty_segment_of_a_phrase_with_others_is_counted(tmp_path: Path) -> None:
    small_png(tmp_path)
    edit_json(
        tmp_path / "annotations/panoptic_train2017.json",
        lambda document: document["annotations"][0]["segments_info"].append({"id": 8, "category_id": 1}),
    )
    edit_json(tmp_path / "annotations/png_coco_train2017.json", lambda rows: rows[0]["segments"].append(part("people", 5, 8)))
    rows = read_all(tmp_path)[1]
    assert len(rows.phrases) == 4
    assert rows.counts["empty segments of phrases with other segments"] == 1


def test_ungrounded_long_and_tagged_phrases_are_counted(tmp_path: Path) -> None:
    small_png(tmp_path)
    extra = [part("word " * 71, 5, tags=["compositional"]), part("loose", 5, noun=False)]
    edit_json(tmp_path / "annotations/png_coco_train2017.json", lambda rows: rows[0]["segments"].extend(extra))
    rows = read_all(tmp_path)[1]
    assert rows.counts["ungrounded"] == 1
    assert rows.counts["parts with segments that are not nouns"] == 1
    assert [count for text, count in rows.counts.items() if text.startswith("phrases over 70 words")] == [1]
    assert rows.phrases[-1]["phrase_id"] == 5
    assert rows.phrases[-1]["tags"] == ["compositional"]
    assert len(rows.phrases[-1]["phrase"].split()) == 71


@pytest.mark.parametrize(
    ("row", "unit", "reason"),
    [
        ({"segments": [part("a cat", 5)]}, "narrative", "malformed narrative"),
        (narrative(1) | {"image_id": "one"}, "narrative", "malformed narrative"),
        (narrative(1) | {"segments": None}, "narrative", "malformed narrative"),
        ("text", "narrative", "malformed narrative"),
        (narrative(77, part("a cat", 5)), "image", "unknown image id"),
        (narrative(11, part("a cat", 311)), "image", "image in both splits"),
    ],
)
def test_invalid_narrative_is_skipped(tmp_path: Path, row: object, unit: str, reason: str) -> None:
    small_png(tmp_path)
    edit_json(tmp_path / "annotations/png_coco_train2017.json", lambda rows: rows.append(row))
    if reason == "image in both splits":
        duplicate = {"image_id": 11, "file_name": "000000000011.png", "segments_info": []}
        edit_json(
            tmp_path / "annotations/panoptic_train2017.json",
            lambda document: (
                document["annotations"].append(duplicate),
                document["images"].append({"id": 11, "file_name": "x.jpg"}),
            ),
        )
        Image.new("RGB", (1, 1)).save(tmp_path / "annotations/panoptic_train2017/000000000011.png")
    source = open_source(study_params(**png_params(tmp_path)).data, tmp_path)
    assert [(skip.unit, skip.reason) for skip in source.skips] == [(unit, reason)]
    assert "row 4" in source.skips[0].message
    assert sum(len(source.read(job).phrases) for job in source.jobs) == 18
    assert {job.image_id: job.split for job in source.jobs}[11] == "test"


def truncate_image(root: Path) -> None:
    path = root / "train2017/000000000001.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def truncate_png(root: Path) -> None:
    path = root / "annotations/panoptic_train2017/000000000001.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / "train2017/000000000001.jpg").unlink(), "missing image"),
        (truncate_image, "unreadable image"),
        (lambda root: (root / "train2017/000000000001.jpg").write_text("<html>404</html>"), "unreadable image"),
        (lambda root: (root / "annotations/panoptic_train2017/000000000001.png").unlink(), "missing panoptic PNG"),
        (truncate_png, "unreadable panoptic PNG"),
        (
            lambda root: save_ids(root / "annotations/panoptic_train2017/000000000001.png", np.zeros((6, 8), int)),
            "image and panoptic PNG differ in size",
        ),
    ],
)
def test_image_with_invalid_file_is_skipped(tmp_path: Path, damage: object, reason: str) -> None:
    small_png(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    rows_by_image = read_all(tmp_path)
    assert reasons(rows_by_image[1]) == [reason]
    skip = rows_by_image[1].skips[0]
    assert "000000000001" in skip.message
    assert (skip.narratives, skip.phrases) == (1, 3)
    assert sum(len(rows.phrases) for rows in rows_by_image.values()) == 15


def test_png_count_modulo_65536_is_rejected_as_incomplete_unzip(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zipfile"):
        coco_panoptic.check_png_count(tmp_path / "panoptic_train2017", 52_751, 118_287)
    for count in (118_287, 118_286, 118_300, 0):
        coco_panoptic.check_png_count(tmp_path / "panoptic_train2017", count, 118_287)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("annotations/panoptic_train2017.json", '{"images": [', "not valid JSON"),
        ("annotations/panoptic_val2017.json", '{"images": [], "annotations": []}', "got no list `categories`"),
        ("annotations/panoptic_val2017.json", "[]", "got no list `images`"),
        ("annotations/png_coco_train2017.json", "{}", "expected a list of narratives"),
        ("annotations/png_coco_val2017.json", None, "set data.png.narratives"),
        ("annotations/panoptic_train2017.json", None, "set data.png.annotations"),
    ],
)
def test_invalid_top_level_file_is_an_error(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    small_png(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_all(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_is_reported_with_its_param(tmp_path: Path) -> None:
    small_png(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data\.png\.images"):
        read_all(tmp_path)


def test_different_categories_of_the_splits_are_rejected(tmp_path: Path) -> None:
    small_png(tmp_path)
    path = tmp_path / "annotations/panoptic_val2017.json"
    edit_json(path, lambda document: document["categories"][0].update(name="dog"))
    with pytest.raises(UserError, match="category 1 is"):
        read_all(tmp_path)


SEGMENT = st.sampled_from([1, 2, 256, 65536, 65537, 99])
PARTS = st.lists(
    st.tuples(st.sampled_from(["a cat", "", "it"]), st.lists(SEGMENT, max_size=4), st.booleans(), st.booleans()), max_size=5
)


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, 2, 256, 65536, 65537]), min_size=12, max_size=12),
    narratives=st.lists(PARTS, min_size=1, max_size=3),
)
def test_every_grounded_phrase_is_a_row_or_a_counted_skip(ids: list[int], narratives: list) -> None:
    grid = np.array(ids).reshape(3, 4)
    categories = {1: 1, 2: 17, 256: 184, 65536: 1, 65537: 184}
    rows = [
        narrative(1, *(part(text, *segments, noun=noun, plural=plural) for text, segments, noun, plural in parts))
        for parts in narratives
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_png(root, "train2017", {1: (grid, list(categories.items()))}, rows)
        write_png(root, "val2017", {2: (grid, list(categories.items()))}, [])
        image_rows = read_all(root)[1]
    expected = {}
    for k, parts in enumerate(narratives):
        for position, (text, segments, noun, plural) in enumerate(parts):
            all_listed = all(segment in categories for segment in segments)
            mask = np.isin(grid, segments)
            if noun and segments and text and all_listed and mask.any():
                expected[f"1-{k}", position] = (text, plural, mask)
    grounded = sum(bool(segments) and noun for parts in narratives for _, segments, noun, _ in parts)
    assert {(item["narrative_id"], item["phrase_id"]) for item in image_rows.phrases} == expected.keys()
    assert len(image_rows.phrases) + sum(skip.phrases for skip in image_rows.skips) == grounded
    for item in image_rows.phrases:
        text, plural, mask = expected[item["narrative_id"], item["phrase_id"]]
        assert (item["phrase"], item["is_plural"]) == (text, plural)
        assert (row_mask(pd.Series(item | {"height": 3, "width": 4})) == mask).all()
