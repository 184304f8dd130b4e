"""Readers and writers of the artifacts: accepted inputs, one-line errors, and files after an interruption."""

import contextlib
import errno
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from genseg.artifacts import files, latents, masks
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import choose_images, read_phrases, row_mask, write_phrases
from genseg.artifacts.predictions import maps_path, maps_shape, read_maps, read_predictions, write_maps, write_predictions
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.artifacts.scores import read_per_phrase, read_summary, write_scores
from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError

torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None)
bitmaps = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


# ----------------------------------------------------------------------------------------------------------- masks
@quick
@given(st.lists(bitmaps, max_size=5))
def test_measure_reads_rles_of_pycocotools(bitmaps):
    measures = masks.measure([masks.encode(bitmap) for bitmap in bitmaps])
    assert measures.pixels.tolist() == [bitmap.size for bitmap in bitmaps]
    assert measures.foreground.tolist() == [bitmap.sum() for bitmap in bitmaps]
    assert measures.canonical.all()
    for bitmap in bitmaps:
        assert (masks.decode(masks.encode(bitmap), *bitmap.shape) == bitmap).all()


@quick
@given(st.lists(st.integers(0, 3) | st.integers(0, 2**27), min_size=1, max_size=12), st.integers(0, 2))
def test_measure_reads_runs_of_any_length(runs, neighbours):
    """Runs of any length including empty ones, as compressed by pycocotools, with other RLEs in the same call."""
    total = sum(runs)
    rle = coco_mask.frPyObjects({"size": [total, 1], "counts": runs}, total, 1)["counts"]
    around = [masks.encode(np.ones((3, 3)))] * neighbours
    measures = masks.measure([*around, rle, *around])
    assert measures.pixels[neighbours] == total
    assert measures.foreground[neighbours] == sum(runs[1::2]) == coco_mask.area({"size": [total, 1], "counts": rle})
    assert measures.canonical[neighbours] == all(runs[1:])
    assert (np.delete(measures.pixels, neighbours) == 9).all()


@quick
@given(st.binary(max_size=12))
def test_measure_accepts_any_bytes(invalid_rle):
    valid_rle = masks.encode(np.eye(5))
    measures = masks.measure([valid_rle, invalid_rle, valid_rle])
    assert measures.pixels[[0, 2]].tolist() == [25, 25]
    assert measures.foreground[[0, 2]].tolist() == [5, 5]
    assert measures.pixels[1] >= -1


@quick
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(0, 99)), max_size=6))
def test_compare_counts_common_pixels_of_many_pairs(pairs):
    """Pairs of different sizes in one call, compared with the decoded masks."""
    bitmaps = [np.random.default_rng(seed).random((2, height, width)) < 0.5 for height, width, seed in pairs]
    left, right, common = masks.compare(*([masks.encode(pair[side]) for pair in bitmaps] for side in (0, 1)))
    assert common.tolist() == [(first & second).sum() for first, second in bitmaps]
    for measures, side in ((left, 0), (right, 1)):
        assert measures.pixels.tolist() == [pair[side].size for pair in bitmaps]
        assert measures.foreground.tolist() == [pair[side].sum() for pair in bitmaps]


@quick
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 2**26))
def test_compare_counts_common_pixels_of_any_runs(runs, scale):
    """RLEs with empty runs, and images with more pixels than 32 bits can count."""
    left = [a for a, _ in runs] + [b for _, b in runs]
    right = [b for _, b in runs] + [a for a, _ in runs]

    def bitmap(lengths):
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)

    def encode_runs(lengths):
        total = sum(lengths) * scale
        # Two empty runs at the start: pycocotools writes beyond its buffer if each run takes six characters.
        return coco_mask.frPyObjects({"size": [total, 1], "counts": [0, 0, *(scale * n for n in lengths)]}, total, 1)["counts"]

    common = masks.compare([encode_runs(left)], [encode_runs(right)])[2]
    assert common.tolist() == [scale * (bitmap(left) & bitmap(right)).sum()]


def test_measure_handles_many_blocks():
    rles = [masks.encode(np.arange(size * 3).reshape(size, 3) % 2) for size in range(1, 40)] * 80
    assert masks.measure(rles).pixels.tolist() == [size * 3 for size in range(1, 40)] * 80
    assert masks.measure([]).pixels.shape == (0,)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_truncated_rle_and_rle_of_wrong_size_are_rejected(cut):
    rle = masks.encode(np.arange(600).reshape(20, 30) % 7 == 0)
    masks.check(rle, 20, 30)
    masks.check(rle, 30, 20)  # the same number of pixels, so the difference cannot be detected
    for wrong, height, width in ((rle, 20, 31), (rle[:-cut], 20, 30), (b"", 20, 30), (b"\xff\x00", 20, 30)):
        with pytest.raises(UserError, match=f"does not fit {height} x {width} pixels"):
            masks.decode(wrong, height, width)


def test_union_counts_overlap_once():
    left, right = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    left[:, :4], right[:, 3:] = True, True
    union = masks.union([masks.encode(left), masks.encode(right)], 6, 6)
    assert masks.area(union, 6, 6) == 36
    assert masks.area(masks.union([], 6, 6), 6, 6) == 0


# -------------------------------------------------------------------------------------------------------- resample
sides = st.integers(1, 40)


@quick
@given(sides, sides, sides, sides, st.integers(0, 99))
def test_bilinear_equals_torch(height, width, new_height, new_width, seed):
    maps = np.random.default_rng(seed).random((2, height, width), np.float32)
    reference = torch.nn.functional.interpolate(
        torch.tensor(maps)[None], size=(new_height, new_width), mode="bilinear", align_corners=False
    )
    assert np.abs(bilinear(maps, new_height, new_width) - reference[0].numpy()).max() < 1e-5


@quick
@given(sides, sides, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_area_reduction_equals_torch_for_integer_ratios(height, width, down, across, seed):
    maps = np.random.default_rng(seed).random((2, height * down, width * across), np.float32)
    reference = torch.nn.functional.interpolate(torch.tensor(maps)[None], size=(height, width), mode="area")
    assert np.abs(area_reduce(maps, height, width) - reference[0].numpy()).max() < 1e-5


@quick
@given(bitmaps, st.integers(1, 9), st.integers(1, 9))
def test_area_reduction_is_the_mean_over_each_cell_for_any_ratio(bitmap, height, width):
    """The pixels are repeated until the ratio is an integer, so that every cell is a block."""
    fine = np.repeat(np.repeat(bitmap, height, 0), width, 1).astype(float)
    blocks = fine.reshape(height, bitmap.shape[0], width, bitmap.shape[1]).mean((1, 3))
    reduced = area_reduce(bitmap, height, width)
    assert reduced.dtype == np.float32
    assert reduced == pytest.approx(blocks, abs=1e-6)
    assert reduced.mean() == pytest.approx(bitmap.mean(), abs=1e-6)


def test_resampling_does_not_depend_on_other_maps_of_the_batch():
    maps = np.random.default_rng(0).random((3, 5, 16, 16), np.float32)
    together = bilinear(maps, 37, 53)
    assert together.shape == (3, 5, 37, 53)
    assert (together[2, 4] == bilinear(maps[2, 4], 37, 53)).all()
    assert bilinear(maps[:0], 8, 8).shape == (0, 5, 8, 8)


# ----------------------------------------------------------------------------------------------------- atomic files
def interrupted_write(path):
    with contextlib.suppress(KeyboardInterrupt), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_failed_write_keeps_old_file(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"b": 1, "a": None})
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    interrupted_write(path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "cannot write")]
)
def test_full_or_read_only_disk_is_reported_and_old_file_is_kept(tmp_path, monkeypatch, number, message):
    path = tmp_path / "table.parquet"
    write_predictions(predictions(), path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match=message) as caught:
        write_predictions(predictions().iloc[:1], path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == old
    with pytest.raises(UserError, match=message):
        write_maps(np.zeros((1, 2, 2), np.float32), path)
    assert os.listdir(tmp_path) == ["table.parquet"]


def fill_disk_while_writing(path):
    with files.atomic_directory(path) as temporary:
        (temporary / "weights").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_writing_a_directory_keeps_old_directory(tmp_path):
    path = tmp_path / "model"
    with files.atomic_directory(path) as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(UserError, match="disk is full"):
        fill_disk_while_writing(path)
    assert (path / "weights").read_text() == "old"
    with files.atomic_directory(path) as temporary:
        (temporary / "weights").write_text("new")
    assert (path / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\xff"])
def test_invalid_json_is_reported(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        files.read_json(path)
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------------- tables
def key(rows=3):
    return {"image_id": range(rows), "narrative_id": [f"n{row}" for row in range(rows)], "phrase_id": range(rows)}


def predictions(rows=3):
    return pd.DataFrame({**key(rows), "mask": [masks.encode(np.eye(4))] * rows, "score": [0.5] * rows})


def phrases(rows=3):
    return pd.DataFrame(
        {
            **key(rows),
            **{"split": "test", "file_name": "a.jpg", "height": 4, "width": 4, "caption": "a dog", "phrase": "a dog"},
            **{"is_thing": True, "is_plural": False, "class_id": pd.array([1, None, 3][:rows], "Int64")},
            **{"segment_ids": [[1, 2], [], [3]][:rows], "mask": [masks.encode(np.eye(4))] * rows},
            "tags": [["compositional"], [], []][:rows],
        }
    )


def test_phrase_table_round_trip_is_sorted_and_reproducible(tmp_path):
    frame = phrases().iloc[::-1]
    write_phrases(frame, tmp_path / "a.parquet")
    write_phrases(frame.sample(frac=1, random_state=0), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    table = read_phrases(tmp_path / "a.parquet")
    assert table["image_id"].tolist() == [0, 1, 2]
    assert table["class_id"].isna().tolist() == [False, True, False]
    assert table["segment_ids"][0].tolist() == [1, 2]
    assert (row_mask(table.loc[1]) == np.eye(4)).all()
    assert read_metadata(tmp_path / "a.parquet") == {"kind": "phrases", "version": "1"}
    assert read_metadata(tmp_path / "none.parquet") == {}


def test_tables_written_by_plain_pandas_are_read(tmp_path):
    frame = predictions().assign(
        image_id=[0.0, 1.0, 2.0],
        narrative_id=pd.Categorical(["n0", "n1", "n2"]),
        phrase_id=np.array([0, 1, 2], np.uint8),
        score=np.array([0, 1, 1]),
        extra="ignored",
    )
    frame["mask"] = [rle.decode() for rle in frame["mask"]]  # text, as in JSON results of pycocotools
    frame.to_parquet(tmp_path / "p.parquet")
    table = read_predictions(tmp_path / "p.parquet")
    assert list(table) == [*KEY, "mask", "score"]
    assert table["image_id"].dtype == table["phrase_id"].dtype == np.int64
    assert table["score"].dtype == np.float32
    assert table["mask"].tolist() == predictions()["mask"].tolist()

    arrow_table = pa.Table.from_pandas(predictions(), preserve_index=False)
    large = {"narrative_id": pa.large_string(), "mask": pa.large_binary(), "score": pa.float64()}
    schema = pa.schema([(field.name, large.get(field.name, field.type)) for field in arrow_table.schema])
    folder = tmp_path / "size=0128" / "cfg=07.50"  # a path that looks like partitions to pyarrow
    folder.mkdir(parents=True)
    pq.write_table(arrow_table.cast(schema), folder / "p.parquet")
    assert read_predictions(folder / "p.parquet").equals(read_predictions(tmp_path / "p.parquet").assign(score=np.float32(0.5)))

    bare = phrases().drop(columns=["file_name", "caption", "class_id", "segment_ids", "tags"])
    bare.assign(height=np.int32(4)).to_parquet(tmp_path / "t.parquet")
    assert read_phrases(tmp_path / "t.parquet")["segment_ids"].tolist() == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="score"), r"without column score; its columns are image_id, "),
        (lambda frame: frame.assign(image_id=[0, 1, 1.5]), "column image_id"),
        (lambda frame: frame.assign(image_id=["0", "one", "2"]), "column image_id"),
        (lambda frame: frame.assign(score=[0.5, None, 0.5]), "row 1: no value in column score"),
        (lambda frame: frame.assign(image_id=1, narrative_id="n", phrase_id=[0, 7, 7]), r"row 2: .*\(1, 'n', 7\) occurs twice"),
    ],
)
def test_table_that_does_not_fit_schema_is_rejected(tmp_path, change, message):
    path = tmp_path / "p.parquet"
    change(predictions()).to_parquet(path)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_split_is_reported_with_its_row(tmp_path):
    phrases().assign(split=["test", "dev", "test"]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 1: expected split train, val, test, got 'dev'"):
        read_phrases(tmp_path / "t.parquet")


def test_truncated_and_foreign_files_are_rejected(tmp_path):
    path = tmp_path / "p.parquet"
    write_predictions(predictions(), path)
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[: len(whole) // 2], whole[:-1], b"not parquet" * 50):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable Parquet file") as caught:
            read_predictions(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such predictions file"):
        read_predictions(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="got a directory"):
        read_predictions(tmp_path)


def test_newer_version_is_rejected(tmp_path):
    table = pa.Table.from_pandas(predictions(), preserve_index=False)
    for version, message in (("2", "version '2' is not supported, the newest is 1; update genseg"), ("new", "version 'new'")):
        pq.write_table(table.replace_schema_metadata({"version": version}), tmp_path / "p.parquet")
        with pytest.raises(UserError, match=message):
            read_predictions(tmp_path / "p.parquet")


def test_chosen_images_do_not_depend_on_row_order():
    images = np.repeat(np.arange(100), 3)
    chosen = choose_images(images, 0.1, 0, "grid")
    assert len(chosen) == 10
    assert chosen == choose_images(images[::-1], 0.1, 0, "grid")
    assert chosen != choose_images(images, 0.1, 0, "val")
    assert chosen <= choose_images(images, 0.3, 0, "grid")
    assert len(choose_images(images[:3], 0.001, 0, "grid")) == 1
    assert derive_seed(0, 1, 2) != derive_seed(0, 12)


# ------------------------------------------------------------------------------------------------------- soft maps
def test_soft_maps_are_read_whole_and_in_part(tmp_path):
    path = tmp_path / "p.parquet"
    maps = np.random.default_rng(0).random((7, 4, 6), np.float32)
    assert maps_shape(path) is None
    with pytest.raises(UserError, match="no soft maps of"):
        read_maps(path)
    write_maps(maps, path)
    assert maps_shape(path) == (7, 4, 6)
    assert np.abs(read_maps(path) - maps).max() <= 0.5 / 255 + 1e-6
    assert (read_maps(path, slice(2, 5)) == read_maps(path)[2:5]).all()
    empty_path = tmp_path / "empty.parquet"
    write_maps(maps[:0], empty_path)
    assert read_maps(empty_path).shape == (0, *maps.shape[1:]), "a shard may have no phrases"
    whole = maps_path(path).read_bytes()
    for content in (b"", whole[:20], whole[:-1]):
        maps_path(path).write_bytes(content)
        for read in (read_maps, maps_shape):
            with pytest.raises(UserError, match="not a readable safetensors file of soft maps"):
                read(path)


# --------------------------------------------------------------------------------------------------------- latents
def encoder(encoded_shards, ragged):
    """Return an encoder of decimal ids: a row holds the number, and a ragged row has that many tokens."""

    def encode(ids):
        encoded_shards.append(list(ids))
        numbers = torch.tensor([int(item) for item in ids])
        if not ragged:
            return {"latent": numbers[:, None].repeat(1, 4).float()}
        tokens = torch.repeat_interleave(numbers, numbers)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), numbers.cumsum(0)])
        return {"tokens": tokens[:, None].float(), "offsets": offsets, "pooled": numbers[:, None].float()}

    return encode


@pytest.mark.parametrize("ragged", [False, True])
def test_interrupted_store_resumes_after_its_last_complete_shard(tmp_path, ragged):
    store, ids, encoded_shards = tmp_path / "store", [str(number) for number in (3, 1, 4, 2, 5, 9, 6)], []
    writer = latents.write_store(store, ids, 3, "key", encoder(encoded_shards, ragged))
    assert next(writer) == (3, True)
    writer.close()  # interrupted after one shard
    with pytest.raises(UserError, match=r"no complete latents \(index.parquet is missing\)"):
        latents.LatentStore(store)
    assert list(latents.write_store(store, ids, 3, "key", encoder(encoded_shards, ragged))) == [
        (3, False),
        (6, True),
        (7, True),
    ]
    assert encoded_shards == [ids[:3], ids[3:6], ids[6:]]

    reader = latents.LatentStore(store)
    assert reader.ids() == ids
    assert len(reader) == 7
    assert "9" in reader
    for item in ids:
        row = reader[item]
        if ragged:
            assert row["tokens"].flatten().tolist() == [int(item)] * int(item)
            assert row["pooled"].tolist() == [int(item)]
        else:
            assert row["latent"].tolist() == [int(item)] * 4
    with pytest.raises(UserError, match="no latents of '77'"):
        reader[77]


def test_store_rewrites_truncated_and_outdated_shards(tmp_path):
    store, ids, encoded_shards = tmp_path / "store", [str(number) for number in range(1, 8)], []
    list(latents.write_store(store, ids, 2, "key", encoder(encoded_shards, False)))
    shard = latents.shard_path(store, 1)
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: missing or truncated"):
        latents.LatentStore(store)["3"]
    encoded_shards.clear()
    list(latents.write_store(store, ids, 2, "key", encoder(encoded_shards, False)))
    assert encoded_shards == [["3", "4"]]
    encoded_shards.clear()
    list(latents.write_store(store, ids[:3], 2, "other", encoder(encoded_shards, False)))
    assert encoded_shards == [["1", "2"], ["3"]]
    assert sorted(path.name for path in store.iterdir()) == [
        "index.parquet",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    (store / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"index.parquet: unreadable"):
        latents.LatentStore(store)


def test_store_rewrites_shards_when_ids_change(tmp_path):
    store = tmp_path / "store"
    list(latents.write_store(store, ["1", "2"], 2, "key", encoder([], False)))
    list(latents.write_store(store, ["3", "2"], 2, "key", encoder([], False)))
    assert latents.LatentStore(store)["3"]["latent"][0] == 3


# ---------------------------------------------------------------------------------------------------------- scores
def test_scores_round_trip(tmp_path):
    per_phrase = pd.DataFrame({**key(), "is_thing": True, "is_plural": False, "iou": 0.5, "boundary_iou": np.nan, "area": 4})
    write_scores(per_phrase, {"ar": {"overall": 0.5}}, tmp_path / "grid" / "cfg=07.50.json")
    assert read_summary(tmp_path / "grid" / "cfg=07.50.json") == {"version": 1, "ar": {"overall": 0.5}}
    table = read_per_phrase(tmp_path / "grid" / "cfg=07.50.json")
    assert table["iou"].tolist() == [0.5] * 3
    assert table["boundary_iou"].isna().all()


@pytest.mark.parametrize("name", ["file/under", "folder", "x" * 300])
def test_path_that_cannot_be_written_is_reported(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(UserError, match="cannot write"):
        files.write_text(tmp_path / name, "new")
    if name != "folder":  # `atomic_directory` replaces folders
        with pytest.raises(UserError, match="cannot write"), files.atomic_directory(tmp_path / name / "new") as folder:
            (folder / "x").touch()
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder", "mine"}
