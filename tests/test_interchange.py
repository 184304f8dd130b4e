"""Import and export through the command line, compared with the evaluation code of the imported methods."""

import contextlib
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from conftest import PROJECT
from genseg.artifacts.masks import decode, encode
from genseg.artifacts.parquet import KEY, read_metadata
from genseg.artifacts.phrases import read_phrases, write_phrases
from genseg.artifacts.predictions import read_maps, read_predictions, write_predictions, write_with_maps
from genseg.cli.main import main
from genseg.interchange.exporting import palette
from genseg.metrics.scoring import match
from genseg.metrics.semantic import count_pixels

SIZES = {3: (6, 9), 11: (8, 5)}
VOC = [0, 7, 4, 9]
"""Class ids with the background first, not ascending."""
PLAIN = [7, 4, 9]
RNG = np.random.default_rng(0)
PARAMS = str(PROJECT / "params/smoke.yaml")
THEIRS = "data/imported/smoke/theirs.parquet"
THEIR_CLASSES = "data/imported/smoke/theirs_class_phrases.parquet"


def class_table(path, ids, background, split="test", narrative="class"):
    rows = [
        {
            "image_id": image_id,
            "narrative_id": narrative,
            "phrase_id": index,
            "split": split,
            "file_name": f"pictures/im_{image_id}.jpg",
            "height": height,
            "width": width,
            "phrase": f"the {class_id}",
            "is_thing": True,
            "is_plural": False,
            "class_id": class_id,
            "mask": encode(np.zeros((height, width))),
            "tags": ["background"] if class_id == background else [],
            "caption": None,
            "segment_ids": [],
        }
        for image_id, (height, width) in SIZES.items()
        for index, class_id in enumerate(ids)
    ]
    write_phrases(pd.DataFrame(rows), path)
    return path


@pytest.fixture
def voc(tmp_path):
    return class_table(tmp_path / "voc.parquet", VOC, 0)


@pytest.fixture
def plain(tmp_path):
    return class_table(tmp_path / "plain.parquet", PLAIN, None)


def run_import(table, source, form, *options, fresh=True):
    """Import into a study with class phrases `table` and two phrases per image; return exit code and path."""
    root, data = table.parent, table.parent / "data/smoke"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(table, data / "class_phrases.parquet")
    class_table(data / "phrases.parquet", [1, 2], None, narrative="caption")
    if fresh:
        shutil.rmtree(root / "data/imported", ignore_errors=True)
    with contextlib.chdir(root):
        code = main(["import", "theirs", "--params", PARAMS, "--format", form, "--source", str(source), *options])
    return code, root / THEIR_CLASSES


def imported_labels(table, source, form, *options):
    """Return the class ids [H, W] of each image after an import, -1 for no class; no pixel may have two classes."""
    code, out = run_import(table, source, form, *options)
    assert code == 0
    rows = read_predictions(out).merge(read_phrases(table).drop(columns="mask"), on=KEY)
    assert len(rows) == len(read_phrases(table))
    labels = {}
    for image_id, group in rows.groupby("image_id"):
        masks = np.stack([decode(mask, *SIZES[image_id]) for mask in group["mask"]])
        assert masks.sum(0).max() <= 1
        labels[image_id] = np.where(masks.any(0), group["class_id"].to_numpy(int)[masks.argmax(0)], -1)
    return labels


def check(labels, expected):
    for image_id, values in expected.items():
        np.testing.assert_array_equal(labels[image_id], values, err_msg=str(image_id))


# ------------------------------------------------------------------------------------------------------------------ CAMs
@pytest.mark.parametrize(("form", "array", "dtype"), [("irn", "high_res", "f4"), ("clip_es", "attn_highres", "f2")])
@pytest.mark.parametrize("rule", [None, "constant:0.3", "power:2"])
def test_cam_labels_equal_those_of_the_methods_evaluation_code(tmp_path, voc, plain, form, array, dtype, rule):
    keys = {3: np.array([2, 0]), 11: np.array([1])}
    cams = {image: RNG.integers(0, 11, (len(keys[image]), *size)) / 10 for image, size in SIZES.items()}  # with ties
    expected = {}
    for image, cam in cams.items():
        cam = cam.astype(dtype)
        np.save(tmp_path / f"im_{image}.npy", {"keys": keys[image], array: cam})
        kind, value = (rule or {"irn": "constant:0.15", "clip_es": "power:1"}[form]).split(":")
        if kind == "constant":
            stacked = np.pad(cam, ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=float(value))
        else:
            stacked = np.concatenate((np.power(1 - np.max(cam, axis=0, keepdims=True), float(value)), cam), axis=0)
        indices = np.pad(keys[image] + 1, (1, 0), mode="constant")[np.argmax(stacked, axis=0)]
        expected[image] = np.array(VOC)[indices]
    options = () if rule is None else ("--background", rule)
    check(imported_labels(voc, tmp_path, form, *options), expected)
    check(imported_labels(plain, tmp_path, form, *options), {k: np.where(v == 0, -1, v) for k, v in expected.items()})
    recorded = json.loads(read_metadata(tmp_path / THEIR_CLASSES)["imported"])
    assert recorded["background"] == (rule or {"irn": "constant:0.15", "clip_es": "power:1"}[form])
    assert (recorded["format"], recorded["array"]) == (form, array)


def test_coarse_cams_are_resized_bilinearly_and_scored_by_their_mean_inside_the_mask(tmp_path, plain):
    expected, scores = {}, {}
    for image, (height, width) in SIZES.items():
        cam = torch.from_numpy(RNG.random((3, 3, 4)).astype("f4"))
        np.save(tmp_path / f"im_{image}.npy", {"keys": torch.arange(3), "cam": cam, "high_res": np.zeros((3, height, width))})
        large = torch.nn.functional.interpolate(cam[None], (height, width), mode="bilinear")[0].numpy()
        expected[image] = np.where(large.max(0) > 0.6, np.array(PLAIN)[large.argmax(0)], -1)
        scores |= {(image, c): large[c][expected[image] == PLAIN[c]] for c in range(3)}
    check(imported_labels(plain, tmp_path, "irn", "--array", "cam", "--background", "constant:0.6"), expected)
    for row in read_predictions(tmp_path / THEIR_CLASSES).itertuples():
        inside = scores[row.image_id, row.phrase_id]
        assert row.score == pytest.approx(inside.mean() if inside.size else 0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- mmseg logits
def test_logits_with_background_are_resized_before_argmax(tmp_path, voc):
    expected = {}
    for number, (image, size) in enumerate(SIZES.items()):
        logits = RNG.normal(size=(4, 4, 6)).astype("f4")
        if number:
            np.save(tmp_path / f"im_{image}.npy", logits)
        else:
            np.savez(tmp_path / f"im_{image}.npz", logits=logits)
        large = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear")[0]
        expected[image] = np.array(VOC)[large.argmax(0).numpy()]
    check(imported_labels(voc, tmp_path, "mmseg"), expected)


@pytest.mark.parametrize("probabilities", [False, True])
def test_logits_without_background_need_a_background_rule(tmp_path, voc, capsys, probabilities):
    expected = {}
    for image, size in SIZES.items():
        logits = torch.from_numpy(RNG.normal(size=(3, *size)).astype("f4"))
        shares = logits.softmax(0)
        np.save(tmp_path / f"im_{image}.npy", (shares if probabilities else logits).numpy())
        expected[image] = np.where(shares.amax(0) < 0.5, 0, np.array(PLAIN)[shares.argmax(0)])
    flag = ["--probabilities"] if probabilities else []
    check(imported_labels(voc, tmp_path, "mmseg", "--background", "threshold:0.5", *flag), expected)
    assert run_import(voc, tmp_path, "mmseg")[0] == 2
    assert "no background channel" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ index masks, import and export
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
@pytest.mark.parametrize("numbering", ["class_id", "position"])
def test_index_masks_are_read_in_every_png_mode(tmp_path, voc, plain, mode, numbering):
    numbers = {"class_id": [7, 4, 9], "position": [1, 2, 3]}[numbering]
    expected = {}
    for image, size in SIZES.items():
        values = RNG.choice([0, 255, *numbers], size)
        picture = Image.fromarray(values.astype("u2" if mode == "I;16" else "u1"))
        if mode == "P":
            picture = picture.convert("P")
            picture.putpalette(RNG.integers(0, 256, 768).tolist())
        picture.save(tmp_path / f"im_{image}.png")
        expected[image] = np.select([values == number for number in numbers], PLAIN, np.where(values == 0, 0, -1))
    check(imported_labels(voc, tmp_path, "index_masks", "--numbering", numbering), expected)
    without = {image: np.where(values == 0, -1, values) for image, values in expected.items()}
    check(imported_labels(plain, tmp_path, "index_masks", "--numbering", numbering), without)


def random_predictions(table, seed):
    rng = np.random.default_rng(seed)
    rows = [
        (*(getattr(row, name) for name in KEY), encode(rng.random((row.height, row.width)) < rng.choice([0, 0.4])), score)
        for row, score in zip(table.itertuples(), rng.integers(0, 4, len(table)) / 4, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*KEY, "mask", "score"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), background=st.sampled_from([None, 0]), numbering=st.sampled_from(["class_id", "position"]))
def test_exported_index_masks_have_the_labels_that_scoring_counts(tmp_path_factory, seed, background, numbering):
    """Overlapping class masks are exported to PNGs and imported: mIoU counts the same pixels for the same classes."""
    folder = tmp_path_factory.mktemp("round")
    ids = PLAIN if background is None else VOC
    table = read_phrases(class_table(folder / "t.parquet", ids, background))
    table["mask"] = random_predictions(table, seed + 1)["mask"]
    write_phrases(table, folder / "t.parquet")
    before = random_predictions(table, seed)
    write_predictions(before, folder / "p.parquet")
    files = ["--predictions", str(folder / "p.parquet"), "--phrases", str(folder / "t.parquet")]
    assert main(["export", *files, "--format", "index_png", "--out", str(folder / "png"), "--numbering", numbering]) == 0
    assert run_import(folder / "t.parquet", folder / "png", "index_masks", "--numbering", numbering)[0] == 0
    classes = [{"name": str(item), "background": item == background} for item in ids]
    counts = []
    for predictions in (before, read_predictions(folder / THEIR_CLASSES)):
        joined = match(table, predictions, "test", False, ("t", "p"))[0]
        area = [decode(row.mask, row.height, row.width).sum() for row in joined.itertuples()]
        counts.append(count_pixels(joined.assign(area=area), None, classes, 0.5).counts)
    np.testing.assert_array_equal(*counts)


def test_exported_index_masks_have_the_palette_of_voc_and_never_overwrite_files(tmp_path, voc):
    assert palette()[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    write_predictions(random_predictions(read_phrases(voc), 0), tmp_path / "p.parquet")
    arguments = [
        "export",
        "--predictions",
        str(tmp_path / "p.parquet"),
        "--phrases",
        str(voc),
        "--format",
        "index_png",
        "--out",
    ]
    assert main([*arguments, str(tmp_path / "png")]) == 0
    with Image.open(tmp_path / "png" / "im_3.png") as picture:
        assert picture.mode == "P"
        indices = np.asarray(picture)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), palette()[indices])
    assert main([*arguments, str(tmp_path / "png")]) == 2  # the folder exists
    assert main([*arguments, str(tmp_path / "p.parquet"), "--format", "coco"]) == 2  # the file is an input


# ------------------------------------------------------------------------------------------------------------------- COCO
def test_exported_results_load_in_pycocotools_and_are_imported_unchanged(tmp_path, voc, capsys):
    table = read_phrases(voc)
    table["class_id"] = table["class_id"].mask(table["phrase_id"] == 3)  # a phrase of several classes
    write_phrases(table, voc)
    before = random_predictions(table, 5)
    write_predictions(before, tmp_path / "p.parquet")
    files = ["--predictions", str(tmp_path / "p.parquet"), "--phrases", str(voc)]
    assert main(["export", *files, "--format", "coco", "--out", str(tmp_path / "r.json")]) == 0
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in SIZES.items()],
        "annotations": [],
        "categories": [],
    }
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "r.json"))
    assert len(loaded.anns) == len(before)
    for result in loaded.anns.values():
        row = before[(before["image_id"] == result["image_id"]) & (before["phrase_id"] == result["phrase_id"])].iloc[0]
        mask = decode(row["mask"], *SIZES[result["image_id"]])
        np.testing.assert_array_equal(loaded.annToMask(result) > 0, mask)
        assert result["score"] == row["score"]
        assert result["area"] == mask.sum()
        assert result["category_id"] == [*VOC[:3], -1][result["phrase_id"]]
    code, out = run_import(voc, tmp_path / "r.json", "coco_results")
    assert code == 0
    pd.testing.assert_frame_equal(read_predictions(out), read_predictions(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("form", "options"), [("mmseg", ["--background", "none", "--probabilities"]), ("clip_es", ["--background", "power:2"])]
)
def test_probability_outside_unit_interval_is_rejected(tmp_path, voc, capsys, form, options):
    for image, size in SIZES.items():
        maps = np.full((3, *size), 2.5, "f4")
        np.save(tmp_path / f"im_{image}.npy", maps if form == "mmseg" else {"keys": np.arange(3), "attn_highres": maps})
    assert run_import(voc, tmp_path, form, *options)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"im_\d+\.npy: values from 0 to 2\.5, but --\w+.* expects values in \[0, 1\]", line), line


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"score": float("inf")}, [], "score inf is not a number"),
        ({"score": 5.0}, [], "score 5.0 is not a number"),
        ({"image_id": 4}, [], "is not a phrase of the table"),
        ({}, ["--background", "none"], "--background none: COCO results have no background"),
    ],
)
def test_invalid_predictions_are_not_exported(tmp_path, voc, capsys, change, options, message):
    predictions = random_predictions(read_phrases(voc), 5)
    for name, value in change.items():
        predictions.loc[0, name] = value
    write_predictions(predictions, tmp_path / "p.parquet")
    files = ["--predictions", str(tmp_path / "p.parquet"), "--phrases", str(voc), "--out", str(tmp_path / "r.json")]
    assert main(["export", *files, "--format", "coco", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("rule", [None, "threshold:0.5", "constant:0.5"])
@pytest.mark.parametrize("numbering", ["class_id", "position"])
def test_instances_are_painted_in_order_of_their_scores(tmp_path, voc, rule, numbering):
    results, expected = [], {}
    for image, size in SIZES.items():
        labels, best = np.zeros(size, int), np.full(size, -1.0)
        for _ in range(6):
            index, score, mask = RNG.integers(1, 4), RNG.integers(0, 5) / 4, RNG.random(size) < 0.4
            number = VOC[index] if numbering == "class_id" else index
            code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            counts = code["counts"].decode()
            if RNG.random() < 0.5:  # uncompressed
                runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 2])) + 1
                counts = np.diff(np.r_[0, runs - 1]).tolist()
            results.append(
                {
                    "image_id": image,
                    "category_id": int(number),
                    "score": score,
                    "segmentation": {"size": list(size), "counts": counts},
                }
            )
            certain = {None: True, "threshold:0.5": score >= 0.5, "constant:0.5": score > 0.5}[rule]
            front = mask & (score > best)
            labels[front], best[front] = (VOC[index] if certain else 0), score
        expected[image] = labels
    (tmp_path / "r.json").write_text(json.dumps(results))
    options = [] if rule is None else ["--background", rule]
    check(imported_labels(voc, tmp_path / "r.json", "coco_results", "--numbering", numbering, *options), expected)


# -------------------------------------------------------------------------------------------------------- masks and a CSV
def test_mask_pngs_are_read_in_every_png_mode(tmp_path, plain):
    lines, expected = ["image_id,narrative_id,phrase_id,file,score"], {}
    for number, row in enumerate(read_phrases(plain).itertuples()):
        soft = RNG.integers(0, 65536, (row.height, row.width))
        picture = [
            lambda s: Image.fromarray((s // 257).astype("u1")),
            lambda s: Image.fromarray(s.astype("u2")),
            lambda s: Image.fromarray(s > 30000),
            lambda s: Image.fromarray((s > 30000).astype("u1")).convert("P"),
        ][number % 4](soft)
        picture.save(tmp_path / f"m{number}.png")
        values = [soft // 257 / 255, soft / 65535, soft > 30000, soft > 30000][number % 4]
        mask = values >= 0.7
        expected[row.image_id, row.phrase_id] = mask, 0.25 if number == 2 else values[mask].mean()
        lines.append(f"{row.image_id},class,{row.phrase_id},m{number}.png,{0.25 if number == 2 else ''}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    code, out = run_import(plain, tmp_path / "index.csv", "png_masks", "--threshold", "0.7")
    assert code == 0
    for row in read_predictions(out).itertuples():
        mask, score = expected[row.image_id, row.phrase_id]
        np.testing.assert_array_equal(decode(row.mask, *SIZES[row.image_id]), mask)
        assert row.score == pytest.approx(score, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------- errors
def cams(folder, **changes):
    for image, size in SIZES.items():
        content = {"keys": np.array([0, 2]), "high_res": np.zeros((2, *size), "f4")} | (changes if image == 11 else {})
        np.save(folder / f"im_{image}.npy", {key: value for key, value in content.items() if value is not None})


def pngs(folder, image_11):
    for image, size in SIZES.items():
        Image.fromarray(image_11 if image == 11 else np.zeros(size, "u1")).save(folder / f"im_{image}.png")


def result(**changes):
    code = {"size": [6, 9], "counts": encode(np.ones((6, 9))).decode()}
    return {"image_id": 3, "category_id": 7, "score": 0.5, "segmentation": code} | changes


def results(folder, *records):
    (folder / "r.json").write_text(json.dumps([result(), *records]))


def index(folder, *lines):
    Image.fromarray(np.zeros((6, 9), "u1")).save(folder / "ok.png")
    Image.fromarray(np.ones((6, 9), "u1")).save(folder / "faint.png")
    Image.fromarray(np.zeros((9, 6), "u1")).save(folder / "transposed.png")
    Image.fromarray(np.zeros((6, 9, 3), "u1")).save(folder / "rgb.png")
    (folder / "i.csv").write_text("\n".join(["image_id,narrative_id,phrase_id,file,score", *lines]))


def arrays(folder, shape, name=None):
    for image, size in SIZES.items():
        np.save(folder / f"im_{image}.npy", np.zeros(shape or (4, *size)))
    if name:
        np.savez(folder / name, np.zeros(1))


def text(folder, name, content):
    (folder / name).write_text(content)


def truncated(folder):
    pngs(folder, np.zeros((8, 5), "u1"))
    (folder / "im_11.png").write_bytes(b"\x89PNG")


def incomplete(folder):
    cams(folder)
    (folder / "im_11.npy").unlink()


def code_of(size, counts):
    return result(segmentation={"size": size, "counts": counts})


def phrase_results(narrative, times):
    return json.dumps([result(narrative_id=narrative, phrase_id=1)] * times)


GREY = np.zeros((8, 5), "u1")
INVALID = {
    "missing image file": ("irn", incomplete, r"no im_11\.npy; .*--allow-missing"),
    "pickle that executes code": ("irn", lambda f: cams(f, keys=np.array([print], object)), r"im_11\.npy: refused, .*print"),
    "missing array": ("irn", lambda f: cams(f, high_res=None), r"im_11\.npy: .*no 'high_res'"),
    "unknown class": ("irn", lambda f: cams(f, keys=np.array([0, 3])), r"im_11\.npy: key 3 is not one of the study's 3"),
    "duplicate class": ("irn", lambda f: cams(f, keys=np.array([2, 2])), r"im_11\.npy: duplicate class"),
    "float keys": ("irn", lambda f: cams(f, keys=np.array([0.0, 2.0])), r"im_11\.npy: keys have shape"),
    "wrong shape": (
        "irn",
        lambda f: cams(f, high_res=np.zeros((3, 8, 5))),
        r"im_11\.npy: high_res has shape \[3, 8, 5\], expected",
    ),
    "transposed": (
        "irn",
        lambda f: cams(f, high_res=np.zeros((2, 5, 8))),
        r"im_11\.npy: 5 x 8 pixels, but the image has 8 x 5",
    ),
    "NaN": ("irn", lambda f: cams(f, high_res=np.full((2, 8, 5), np.nan)), r"im_11\.npy: .*NaN"),
    "integer maps": ("irn", lambda f: cams(f, high_res=np.zeros((2, 8, 5), int)), r"im_11\.npy: maps have type int64"),
    "logits of other classes": ("mmseg", lambda f: arrays(f, (7, 6, 9)), r"im_3\.npy: shape \[7, 6, 9\], expected"),
    "two files for an image": ("mmseg", lambda f: arrays(f, None, "im_3.npz"), r"im_3\.npy: im_3\.npz exists too"),
    "mask of another size": ("index_masks", lambda f: pngs(f, GREY.T), r"im_11\.png: 5 x 8 pixels, but the image has 8 x 5"),
    "unknown value": ("index_masks", lambda f: pngs(f, GREY + 8), r"im_11\.png: value 8 is not a class"),
    "colour mask": ("index_masks", lambda f: pngs(f, np.zeros((8, 5, 3), "u1")), r"im_11\.png: expected one value per pixel"),
    "broken PNG": ("index_masks", truncated, r"im_11\.png: unreadable"),
    "not a list": ("coco_results", lambda f: text(f, "r.json", "{}"), r"r\.json: expected a list of results, got dict"),
    "not JSON": ("coco_results", lambda f: text(f, "r.json", "[{"), r"r\.json: not valid JSON"),
    "missing score": ("coco_results", lambda f: results(f, {"image_id": 3}), r"r\.json: result 1: expected the fields"),
    "NaN score": ("coco_results", lambda f: results(f, result(score=float("nan"))), r"result 1: score nan"),
    "unknown image": ("coco_results", lambda f: results(f, result(image_id=4)), r"result 1: image_id 4 is not an image"),
    "list as image id": (
        "coco_results",
        lambda f: results(f, result(image_id=[3])),
        r"result 1: image_id \[3\] is not an integer",
    ),
    "unknown category": (
        "coco_results",
        lambda f: results(f, result(category_id=8)),
        r"result 1: category_id 8 is not a class",
    ),
    "polygon": ("coco_results", lambda f: results(f, result(segmentation=[[0, 0, 1, 1]])), r"result 1: .*polygons"),
    "RLE of another size": ("coco_results", lambda f: results(f, code_of([9, 6], "0f1")), r"result 1: .*size \[9, 6\]"),
    "truncated RLE": ("coco_results", lambda f: results(f, code_of([6, 9], "0f")), r"result 1: segmentation: "),
    "run lengths with a wrong sum": ("coco_results", lambda f: results(f, code_of([6, 9], [50])), r"result 1: segmentation: "),
    "duplicate phrase": (
        "coco_results",
        lambda f: text(f, "r.json", phrase_results("class", 2)),
        r"result 1: duplicate \(3, 'class', 1\)",
    ),
    "unknown phrase": (
        "coco_results",
        lambda f: text(f, "r.json", phrase_results("x", 1)),
        r"result 0: \(3, 'x', 1\).*not a phrase",
    ),
    "narrative is a list": (
        "coco_results",
        lambda f: text(f, "r.json", phrase_results([1], 1)),
        r"result 0: narrative_id \[1\] is not a string",
    ),
    "phrase ids in some results": (
        "coco_results",
        lambda f: text(f, "r.json", json.dumps([*json.loads(phrase_results("class", 1)), result()])),
        r"result 1: expected the fields image_id, narrative_id",
    ),
    "empty list": (
        "coco_results",
        lambda f: text(f, "r.json", "[]"),
        r"r\.json: expected a list of results, got an empty list",
    ),
    "missing column": (
        "png_masks",
        lambda f: text(f, "i.csv", "image_id,file\n"),
        r"i\.csv: no column narrative_id, phrase_id",
    ),
    "unknown phrase in CSV": ("png_masks", lambda f: index(f, "3,class,9,ok.png,"), r"i\.csv: line 2: .*is not a phrase"),
    "duplicate row": ("png_masks", lambda f: index(f, *["3,class,1,ok.png,"] * 2), r"i\.csv: line 3: duplicate"),
    "phrase_id is not a number": ("png_masks", lambda f: index(f, "3,class,one,ok.png,"), r"i\.csv: line 2: .*integers"),
    "missing mask file": ("png_masks", lambda f: index(f, "3,class,1,no.png,"), r"line 2: .*no\.png: no such file"),
    "transposed mask": ("png_masks", lambda f: index(f, "3,class,1,transposed.png,"), r"line 2: transposed\.png: 9 x 6 pixels"),
    "mask in colours": ("png_masks", lambda f: index(f, "3,class,1,rgb.png,"), r"rgb\.png: expected one value per pixel"),
    "mask of 0 and 1": (
        "png_masks",
        lambda f: index(f, "3,class,1,faint.png,"),
        r"line 2: .*faint\.png: the highest value is 1 of",
    ),
    "missing result": ("coco_results", results, r"r\.json: no result for image im_11; .*--allow-missing"),
    "boolean as image id": (
        "coco_results",
        lambda f: results(f, result(image_id=True)),
        r"result 1: image_id True is not an integer",
    ),
    "deeply nested": ("coco_results", lambda f: text(f, "r.json", "[" * 200_000), r"r\.json: not valid JSON"),
    "beyond single precision": (
        "irn",
        lambda f: cams(f, high_res=np.full((2, 8, 5), 1e300)),
        r"im_11\.npy: .*single precision",
    ),
    "missing rows": (
        "png_masks",
        lambda f: index(f, "3,class,1,ok.png,"),
        r"i\.csv: no mask for .*\(3, 'class', 2\).* 4 more",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_source_raises_a_one_line_error_and_writes_nothing(tmp_path, voc, capsys, name):
    form, make, message = INVALID[name]
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    source = {"coco_results": folder / "r.json", "png_masks": folder / "i.csv"}.get(form, folder)
    assert run_import(voc, source, form)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert str(folder) in line
    assert not (tmp_path / "data/imported").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "index_masks", "--background", "none"], "--background: format index_masks does not have this option"),
        (["--format", "irn", "--background", "constant:much"], "--background constant:much: give none, constant:V"),
        (["--format", "irn", "--background", "power:-1"], "--background power:-1: give none, constant:V"),
        (["--format", "irn", "--source", "nowhere"], "nowhere: no such file or folder"),
        (["--format", "coco_results"], "no such file or folder; coco_results expects a JSON"),
        (["--format", "png_masks", "--threshold", "2"], "--threshold 2.0: must be"),
    ],
)
def test_invalid_options_are_rejected(tmp_path, voc, capsys, options, message):
    assert run_import(voc, tmp_path / "nothing" if "nowhere" in options else tmp_path, options[1], *options[2:])[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "a b", "", "x_class_phrases", "-x", "gs", "GS", "diffseg", "inexact_box", "a=2"])
def test_invalid_names_are_rejected(tmp_path, voc, capsys, monkeypatch, name):
    cams(tmp_path)
    assert run_import(voc, tmp_path, "irn")[0] == 0
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) if name == "-x" else contextlib.nullcontext():
        assert main(["import", name, "--params", PARAMS, "--format", "irn", "--source", "."]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_images_are_allowed_on_request_and_incomplete_class_phrases_are_rejected(tmp_path, voc, capsys):
    cams(tmp_path)
    (tmp_path / "im_11.npy").unlink()
    np.save(tmp_path / "im_3.npy", {"keys": np.zeros(0, int), "high_res": np.zeros((0, 3, 4), "f4")})  # no class was detected
    code, out = run_import(voc, tmp_path, "irn", "--allow-missing")
    assert code == 0
    assert set(read_predictions(out)["image_id"]) == {3}
    assert [decode(mask, 6, 9).all() for mask in read_predictions(out)["mask"]] == [True, False, False, False]
    assert "4 predictions for 1 images; 1 missing" in capsys.readouterr().out
    table = read_phrases(voc)
    write_phrases(table.iloc[1:], voc)
    assert run_import(voc, tmp_path, "irn")[0] == 2
    assert "expected every class of one list" in capsys.readouterr().err


def both_tables(root):
    return [read_phrases(root / "data/smoke" / f"{name}.parquet") for name in ("phrases", "class_phrases")]


def export(root, table, predictions, name):
    write_predictions(predictions, root / "p.parquet")
    arguments = ["--predictions", str(root / "p.parquet"), "--phrases", str(root / "data/smoke" / table), "--format", "coco"]
    assert main(["export", *arguments, "--out", str(root / name)]) == 0
    return root / name


def test_import_replaces_only_the_tables_for_which_it_has_rows(tmp_path, voc):
    """Phrases alone, class phrases alone and both at once; a second import replaces only what it provides."""
    cams(tmp_path)
    assert run_import(voc, tmp_path, "irn")[0] == 0
    assert [path.name for path in (tmp_path / "data/imported/smoke").iterdir()] == ["theirs_class_phrases.parquet"]
    cam = (tmp_path / THEIR_CLASSES).read_bytes()
    phrases, classes = both_tables(tmp_path)
    first, second = random_predictions(phrases, 1), random_predictions(classes, 2)
    results = export(tmp_path, "phrases.parquet", first, "phrases.json")
    assert run_import(voc, results, "coco_results", fresh=False)[0] == 0
    assert (tmp_path / THEIR_CLASSES).read_bytes() == cam
    written = read_predictions(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(read_predictions(tmp_path / THEIRS), written)
    together = json.loads(results.read_text())
    together += json.loads(export(tmp_path, "class_phrases.parquet", second, "classes.json").read_text())
    (tmp_path / "both.json").write_text(json.dumps(together))
    assert run_import(voc, tmp_path / "both.json", "coco_results")[0] == 0
    pd.testing.assert_frame_equal(read_predictions(tmp_path / THEIRS), written)
    pd.testing.assert_frame_equal(read_predictions(tmp_path / THEIR_CLASSES), read_predictions(tmp_path / "p.parquet"))


def test_predictions_written_by_pandas_are_checked_and_imported(tmp_path, voc, capsys):
    class_table(tmp_path / "none.parquet", [1], None)
    run_import(voc, tmp_path / "none.parquet", "predictions")  # writes the tables
    capsys.readouterr()
    frame = random_predictions(both_tables(tmp_path)[0], 3)
    good = tmp_path / "good.parquet"
    frame.to_parquet(good)
    assert run_import(voc, good, "predictions")[0] == 0
    imported = read_predictions(tmp_path / THEIRS).merge(frame, on=KEY, suffixes=("", "_given"))
    assert (imported["mask"] == imported["mask_given"]).all()
    assert (imported["score"] == imported["score_given"]).all()
    invalid = {
        "row 1: score 1.5 is not a number": frame.assign(score=[0.5, 1.5, *frame["score"][2:]]),
        "row 0: (4, 'caption', 0)": frame.assign(image_id=[4, *frame["image_id"][1:]]),
        "row 0: ": frame.assign(mask=[encode(np.ones((9, 5))), *frame["mask"][1:]]),
        "no mask for phrase (11, 'caption', 1)": frame.iloc[:-1],
        "without column score": frame.drop(columns="score"),
    }
    capsys.readouterr()
    for message, content in invalid.items():
        content.to_parquet(tmp_path / "invalid.parquet")
        assert run_import(voc, tmp_path / "invalid.parquet", "predictions")[0] == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "data/imported").exists()


@pytest.mark.parametrize("background", [None, 0])
def test_index_masks_of_soft_maps_have_the_labels_that_scoring_counts(tmp_path, capsys, background):
    """Predictions may have no background class, as in this program's own ones; then the background rule assigns it."""
    ids = PLAIN if background is None else VOC
    table = read_phrases(class_table(tmp_path / "t.parquet", ids, background))
    table["mask"] = random_predictions(table, 1)["mask"]
    write_phrases(table, tmp_path / "t.parquet")
    foreground = [background is None or class_id != background for class_id in table["class_id"]]
    before, maps = random_predictions(table[foreground], 2), RNG.random((sum(foreground), 3, 4)).astype("f4")
    write_with_maps(before, maps, tmp_path / "p.parquet")
    export = ["export", "--predictions", str(tmp_path / "p.parquet"), "--phrases", str(tmp_path / "t.parquet")]
    export += ["--format", "index_png", "--out", str(tmp_path / "png")]
    rule = ["--background", "threshold:0.7"]
    assert main([*export, *([] if background is not None else rule)]) == 2
    assert "--background" in capsys.readouterr().err
    assert main([*export, *(rule if background is not None else [])]) == 0
    assert run_import(tmp_path / "t.parquet", tmp_path / "png", "index_masks")[0] == 0
    classes = [{"name": str(item), "background": item == background} for item in ids]
    counts = []
    for path in (tmp_path / "p.parquet", tmp_path / THEIR_CLASSES):
        joined = match(table, read_predictions(path), "test", False, ("t", "p"))[0]
        area = [decode(row.mask, row.height, row.width).sum() for row in joined.itertuples()]
        soft = (lambda rows: read_maps(tmp_path / "p.parquet")[rows]) if path.name == "p.parquet" else None
        counts.append(count_pixels(joined.assign(area=area), soft, classes, 0.7).counts)
    np.testing.assert_array_equal(*counts)
