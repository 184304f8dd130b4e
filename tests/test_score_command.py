"""The command `genseg score`, for one set of predictions and for a whole study."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from genseg.artifacts.files import write_json
from genseg.artifacts.manifest import read_manifest, write_manifest
from genseg.artifacts.masks import decode, encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import miou_phrases, read_phrases, write_phrases
from genseg.artifacts.predictions import maps_path, write_maps, write_predictions
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.artifacts.scores import read_per_phrase
from genseg.baselines.registry import own_baselines
from genseg.cli import main
from genseg.metrics.runs import score_baselines
from genseg.params import load_params, validate_params
from genseg.params.sample import OperatingPoint
from genseg.refine.layout import refined_images
from genseg.sampling.runs import Run, predictions_path, run_rows, study_runs

SPLITS = ("overall", "things", "stuff", "singulars", "plurals")
HEIGHT, WIDTH = 12, 16


def box(left, right, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), bool)
    mask[:, left:right] = True
    return encode(mask)


def phrase_table():
    """Return four test phrases of two images and one val phrase, each the left half of its image."""
    rows = [
        (1, "a", 0, "test", True, False, [1], ["new"]),
        (1, "a", 2, "test", True, True, [2, 3], []),
        (1, "b", 0, "test", False, False, [4], ["new"]),
        (2, "a", 0, "test", True, False, [1], []),
        (9, "a", 0, "val", True, False, [1], []),
    ]
    frame = pd.DataFrame(rows, columns=[*KEY, "split", "is_thing", "is_plural", "segment_ids", "tags"])
    return frame.assign(height=HEIGHT, width=WIDTH, phrase="the left half", caption="c", mask=[box(0, 8)] * len(rows))


def prediction_table():
    """Return predictions with IoU 1, 0.5 and 0.25 for the phrases of image 1, and none for the phrase of image 2."""
    frame = phrase_table().iloc[:3][KEY]
    return frame.assign(mask=[box(0, 8), box(0, 4), box(0, 2)], score=[0.9, 0.8, 0.7])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phrase_table().to_parquet("T.parquet")
    prediction_table().to_parquet("P.parquet")
    return tmp_path


COMMAND = ["score", "--phrases", "T.parquet", "--predictions", "P.parquet", "--out", "scores.json"]


def score(capsys, *options):
    """Run the command; return the summary from stdout, and stderr."""
    assert main([*COMMAND, *options]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def refused(capsys, *options, command=COMMAND):
    """Run a command that fails; return its one-line error message."""
    assert main([*command, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_tables_written_by_plain_pandas_are_scored(folder, capsys):
    summary, err = score(capsys)
    assert json.loads(Path("scores.json").read_text()) == summary
    assert summary["ar"] == {
        "overall": pytest.approx((1 + 0.5 + 0.25 + 0) / 4),
        "things": pytest.approx(1.5 / 3),
        "stuff": pytest.approx(0.25),
        "singulars": pytest.approx(1.25 / 3),
        "plurals": pytest.approx(0.5),
    }
    assert summary["counts"] == {
        **{"phrases": 4, "images": 2, "narratives": 3, "missing": 1, "left_out": 0, "other_split": 0},
        **{"empty_union": 0, "empty_ground_truth": 0, "plural_by_flag": 0},
    }
    assert "phrases without a prediction, counted as IoU 0: 1\n" in err
    assert (summary["protocol"], summary["protocol_version"], summary["split"]) == ("native", 1, "test")
    assert summary["ceiling"] == dict.fromkeys(SPLITS, 1.0)
    assert summary["miou"] is None
    assert summary["ar_by_size"] == {"small": None, "medium": None, "large": pytest.approx(1.75 / 4)}
    assert summary["tags"] == {"new": {"n": 2, "overall": pytest.approx(0.625)}}
    low, high = summary["interval"]["overall"]
    assert (low, high) == (0.0, pytest.approx(1.75 / 3))  # image 1 has three phrases with a total of 1.75, image 2 one with 0
    per_phrase = read_per_phrase("scores.json")
    assert per_phrase["iou"].tolist() == pytest.approx([1, 0.5, 0.25, 0])
    assert per_phrase["area"].tolist() == [96] * 4


def test_row_order_extra_columns_and_wide_types_do_not_change_scores(folder, capsys):
    before, _ = score(capsys)
    shuffled = phrase_table().sample(frac=1, random_state=1).assign(extra=1)
    table = pa.Table.from_pandas(shuffled, preserve_index=True)
    schema = pa.schema([(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table.schema])
    pq.write_table(table.cast(schema), "T.parquet")
    prediction_table().iloc[::-1].astype({"score": "float64", "image_id": "float64"}).to_parquet("P.parquet")
    after, _ = score(capsys)
    assert after == before


def test_optional_numbers_are_reported_on_request(folder, capsys):
    summary, _ = score(capsys, "--boundary-ratio", "0.05", "--label-latent", "4", "--bootstrap", "0")
    assert summary["interval"] == dict.fromkeys(SPLITS)
    assert 0 < summary["boundary_iou"]["overall"] < summary["ar"]["overall"]
    assert summary["ceiling_latent"]["overall"] == 1.0  # Halves align with the grid of 4 x 4 cells.
    narrow, _ = score(capsys, "--label-latent", "1")
    assert narrow["ceiling_latent"]["overall"] == 0.5  # One half-full cell is read as foreground.
    assert narrow["boundary_iou"] == dict.fromkeys(SPLITS)


def test_threshold_grids_agree_within_1e_4(folder, capsys):
    exact, _ = score(capsys)
    for grid in ("official", "drmn", "gs_eq12"):
        summary, _ = score(capsys, "--threshold-grid", grid)
        assert summary["threshold_grid"] == grid
        for split in SPLITS:
            assert summary["ar"][split] == pytest.approx(exact["ar"][split], abs=1e-4)
    assert summary["ar"]["overall"] == pytest.approx((0.9999 + 0.5 + 0.25) / 4)


def test_other_protocols_differ_from_native_in_ar_and_ceiling(folder, capsys):
    phrase_table().drop(columns="segment_ids").to_parquet("flags.parquet")
    native, _ = score(capsys)
    for protocol in ("png-official", "ppmn"):
        summary, _ = score(capsys, "--protocol", protocol)
        assert summary["protocol"] == protocol
        assert summary["ar"]["overall"] != native["ar"]["overall"]
        assert 0.8 < summary["ceiling"]["overall"] < 1
        by_flag, err = score(capsys, "--protocol", protocol, "--phrases", "flags.parquet")
        assert by_flag["ar"] == summary["ar"]
        assert by_flag["counts"]["plural_by_flag"] == 4
        assert f"phrases without segment_ids, plural by the table's flag instead of {protocol}'s rule: 4\n" in err


def test_other_split_is_scored_and_absent_split_is_rejected(folder, capsys):
    summary, err = score(capsys, "--split", "val")
    assert summary["counts"]["missing"] == 1
    assert summary["counts"]["other_split"] == 3
    assert "predictions for splits other than val, not scored: 3\n" in err
    assert refused(capsys, "--split", "train").endswith(
        "T.parquet: no phrase has split 'train'; splits in the table: test, val; choose one with --split\n"
    )


def test_empty_union_has_iou_0_and_is_counted(folder, capsys):
    empty_mask = encode(np.zeros((HEIGHT, WIDTH)))
    table = phrase_table()
    table.loc[[0, 1], "mask"] = pd.Series([empty_mask] * 2, dtype=object)
    table.to_parquet("T.parquet")
    predictions = prediction_table()
    predictions.loc[0, "mask"] = empty_mask
    predictions.to_parquet("P.parquet")
    summary, _ = score(capsys)
    assert summary["counts"]["empty_union"] == 1
    assert summary["counts"]["empty_ground_truth"] == 2
    assert summary["ar"]["overall"] == pytest.approx(0.25 / 4)
    assert summary["ceiling"]["overall"] == 0.5


def test_codes_with_empty_inner_runs_are_decoded_correctly(folder, capsys):
    """The left half is encoded as 40 + 0 + 56 pixels, which is valid, but the IoU of pycocotools stops at common empty runs."""
    from pycocotools import mask as coco_mask

    runs = [[0, 40, 0, 56, 96], [0, 40, 0, 8, 144]]
    codes = [coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": run}, HEIGHT, WIDTH)["counts"] for run in runs]
    phrase_table().assign(mask=codes[0]).to_parquet("T.parquet")
    prediction_table().assign(mask=codes[1]).to_parquet("P.parquet")
    summary, _ = score(capsys)
    assert summary["ar"]["overall"] == pytest.approx(0.75 * 48 / 96)


ROW_0, ROW_1, ROW_2 = (
    f"row {row} (image_id 1, narrative_id '{narrative}', phrase_id {phrase})"
    for row, narrative, phrase in ((0, "a", 0), (1, "a", 2), (2, "b", 0))
)
MISFIT = ": the RLE of a mask does not fit 12 x 16 pixels"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.assign(image_id=[1, 1, 77]),
            "P.parquet: row 2 (image_id 77, narrative_id 'b', phrase_id 0): no such phrase in T.parquet (1 of 3 rows)",
        ),
        (lambda frame: frame.assign(mask=[box(0, 8), box(0, 8, 6, 8), box(0, 8)]), f"{ROW_1}{MISFIT} (1 of 4 rows)"),
        (lambda frame: frame.assign(mask=[box(0, 4), box(0, 4), b"\x00\xff"]), f"{ROW_2}{MISFIT}"),
        (lambda frame: frame.assign(mask=[mask[:-1] for mask in frame["mask"]]), f"{ROW_0}{MISFIT} (3 of 4 rows)"),
        (
            lambda frame: pd.concat([frame, frame.iloc[1:2]]),
            "row 3: (image_id, narrative_id, phrase_id) = (1, 'a', 2) occurs twice",
        ),
        (lambda frame: frame.assign(score=[0.1, np.nan, 0.2]), "row 1: no value in column score"),
        (lambda frame: frame.assign(score=[0.1, 0.2, np.inf]), f"{ROW_2}: expected a finite score, got inf"),
        (lambda frame: frame.drop(columns="mask"), "predictions without column mask"),
        (lambda frame: frame.assign(mask=[1, 2, 3]), "column mask"),
    ],
)
def test_invalid_predictions_are_rejected_in_one_line(folder, capsys, change, message):
    change(prediction_table()).to_parquet("P.parquet")
    assert message in refused(capsys)
    assert not Path("scores.json").exists()


def test_nan_score_written_by_arrow_is_rejected(folder, capsys):
    table = pa.Table.from_pandas(prediction_table(), preserve_index=False)
    column = table.schema.get_field_index("score")
    pq.write_table(table.set_column(column, "score", pa.array([0.1, float("nan"), 0.2], from_pandas=False)), "P.parquet")
    assert "row 1 (image_id 1, narrative_id 'a', phrase_id 2): expected a finite score, got nan" in refused(capsys)


def test_invalid_phrase_tables_are_rejected_in_one_line(folder, capsys):
    phrase_table().assign(height=[HEIGHT, HEIGHT, 5, HEIGHT, HEIGHT]).to_parquet("T.parquet")
    assert "T.parquet: row 2 (image_id 1, narrative_id 'b', phrase_id 0)" in refused(capsys)
    phrase_table().assign(height=-1).to_parquet("T.parquet")
    assert "T.parquet: row 0" in refused(capsys)
    phrase_table().iloc[:0].to_parquet("T.parquet")
    prediction_table().iloc[:0].to_parquet("P.parquet")
    assert "no phrase has split 'test'; splits in the table: none" in refused(capsys)
    Path("T.parquet").write_bytes(Path("T.parquet").read_bytes()[:-20])
    assert "T.parquet: not a readable Parquet file" in refused(capsys)
    Path("T.parquet").unlink()
    assert "T.parquet: no such phrase table file" in refused(capsys)


def test_empty_predictions_count_all_phrases_as_missing(folder, capsys):
    prediction_table().iloc[:0].to_parquet("P.parquet")
    summary, _ = score(capsys)
    assert summary["counts"]["missing"] == 4
    assert summary["ar"]["overall"] == 0


def test_invalid_options_are_rejected_in_one_line(folder, capsys):
    assert "missing --predictions, --out to score" in refused(capsys, command=["score", "--phrases", "T.parquet"])
    assert "leave out --phrases, --predictions, --out" in refused(capsys, "--params", "params.yaml")
    assert "--out scores: expected a name that ends in .json" in refused(capsys, "--out", "scores")
    assert "would overwrite P.parquet" in refused(capsys, "--out", "P.json")
    assert "would overwrite T.parquet" in refused(capsys, "--out", str(folder / "T.json"))
    assert "--boundary-ratio 2.0" in refused(capsys, "--boundary-ratio", "2")
    assert "--bootstrap -1" in refused(capsys, "--bootstrap", "-1")
    assert "--label-latent 0" in refused(capsys, "--label-latent", "0")
    with pytest.raises(SystemExit):
        main([*COMMAND, "--protocol", "other"])


def test_torch_is_not_imported(folder):
    code = f"import sys; from genseg.cli import main; s = main({COMMAND!r}); assert 'torch' not in sys.modules; sys.exit(s)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["counts"]["phrases"] == 4


# ----------------------------------------------------------------------------------------------------------- study
RUNS = [
    ("main", "main", "gs", (32, 4, 2.0), "test", "bilinear"),
    ("text_permuted", "control", "gs", (32, 4, 2.0), "permutable", "bilinear"),
    ("discriminative", "control", "discriminative", (32, 1, 1.0), "test", "bilinear"),
    ("colour_threshold", "control", "colour_threshold", None, "test", "bilinear"),
    ("grid/size=0032/steps=0050/cfg=07.50", "grid", "gs", (32, 50, 7.5), "grid", "bilinear"),
    ("grid/size=0016/steps=0050/cfg=07.50", "grid", "gs", (16, 50, 7.5), "grid", "bilinear"),
    ("readouts/nearest", "readout", "gs", (32, 50, 7.5), "grid", "nearest"),
    ("class_phrases", "class_phrases", "gs", (32, 4, 2.0), "class_phrases", "bilinear"),
    ("discriminative_class_phrases", "class_phrases", "discriminative", (32, 1, 1.0), "class_phrases", "bilinear"),
]
FIELDS = ("name", "role", "method", "point", "phrases", "readout")


def operating_point(size, steps, guidance_scale):
    return OperatingPoint(size=size, num_inference_steps=steps, guidance_scale=guidance_scale)


def shapes(seed, count, height=24, width=32):
    random = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width]
    centres = zip(random.uniform(0, height, count), random.uniform(0, width, count), random.uniform(4, 9, count), strict=True)
    return [(ys - y) ** 2 + (xs - x) ** 2 < r**2 for y, x, r in centres]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Write a study of twelve images. Predictions are the ground truth at label-latent size, shifted for the controls."""
    monkeypatch.chdir(tmp_path)
    document = {
        "study": "small",
        "sample": {
            "runs": ["main", "controls", "grid"],  # A study without runs on val has no refined masks.
            "main": operating_point(32, 4, 2.0).model_dump(mode="json"),
            "base": operating_point(32, 50, 7.5).model_dump(mode="json"),
        },
        "score": {"protocol": "native", "extra_protocols": ["native", "ppmn"], "bootstrap": 50},
    }
    Path("params.yaml").write_text(yaml.safe_dump(document))
    params = load_params("params.yaml")
    masks = {(image, phrase): mask for image in range(12) for phrase, mask in enumerate(shapes(image, 3))}
    frame = pd.DataFrame(
        {
            **{"image_id": image, "narrative_id": "n", "phrase_id": phrase, "height": 24, "width": 32, "phrase": "x"},
            **{"split": "train" if image == 0 else "test", "is_thing": phrase < 2, "is_plural": phrase == 1},
            **{"segment_ids": [1], "mask": encode(mask), "file_name": "", "caption": "", "class_id": None, "tags": []},
        }
        for (image, phrase), mask in masks.items()
    )
    write_phrases(frame, "data/small/phrases.parquet")
    classes = [{"id": 7 + index, "name": name, "is_thing": True} for index, name in enumerate(("disk", "disc", "none"))]
    write_json("data/small/classes.json", classes)
    class_rows = frame[frame["split"] == "test"].assign(narrative_id="class")
    class_rows.loc[class_rows["phrase_id"] == 2, "mask"] = encode(np.zeros((24, 32)))  # The third class has no pixel.
    write_phrases(class_rows, "data/small/class_phrases.parquet")

    runs = [Run(**dict(zip(FIELDS, run, strict=True)) | {"point": run[3] and operating_point(*run[3])}) for run in RUNS]
    for run in runs:
        path = predictions_path(params, run)
        rows = class_rows if run.role == "class_phrases" else frame[frame["split"] == "test"]
        if run.phrases == "grid":
            rows = rows[rows["image_id"] < 5]
        if run.phrases == "permutable":
            rows = rows[rows["image_id"] != 5]
        shift = {"text_permuted": 3, "colour_threshold": 6, "discriminative": 4}.get(run.name.split("_class")[0], 0)
        keys = zip(rows["image_id"], rows["phrase_id"], strict=True)
        truths = [masks[image, phrase] & (run.role != "class_phrases" or phrase < 2) for image, phrase in keys]
        side = (run.point.size if run.point else 32) // 4
        maps = np.stack([area_reduce(np.roll(mask, shift, 1), side, side) for mask in truths])
        predicted = bilinear(maps, 24, 32) >= 0.5 - 1e-6
        write_predictions(rows[KEY].assign(mask=[encode(mask) for mask in predicted], score=maps.max((1, 2))), path)
        if run.name != "colour_threshold":
            write_maps(maps, path)
    manifest = params.results_dir / "predictions" / "manifest.json"
    write_manifest(manifest, "sample", params, [], [], runs=[run.model_dump(mode="json") for run in runs])
    return Path("results/small/scores")


STUDY = ["score", "--params", "params.yaml"]


def file_contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_study_scores_have_the_documented_files_and_contents(study, capsys):
    assert main(STUDY) == 0
    names = [run[0] for run in RUNS[:-2]] + ["protocols/main.ppmn", "protocols/discriminative.ppmn"]
    expected_files = {f"{name}{suffix}" for name in names for suffix in (".json", ".parquet")} | {
        "comparisons.json",
        "manifest.json",
    }
    assert set(file_contents(study)) == expected_files
    scores = {name: json.loads((study / f"{name}.json").read_text()) for name in names}

    main_scores = scores["main"]
    assert main_scores["run"]["name"] == "main"
    assert main_scores["split"] == "test"
    assert main_scores["counts"]["phrases"] == 33
    assert main_scores["counts"]["left_out"] == main_scores["counts"]["missing"] == 0
    assert main_scores["ceiling"] == dict.fromkeys(SPLITS, 1.0)
    assert main_scores["ceiling_latent"] == pytest.approx(main_scores["ar"], abs=1e-3)  # The predictions equal the ceiling.
    assert set(main_scores["interval"]) == set(SPLITS)
    assert 0 < main_scores["boundary_iou"]["overall"] < main_scores["ar"]["overall"]
    assert main_scores["miou"]["per_class"]["none"] is None
    assert main_scores["miou"]["mean"] == pytest.approx(
        (main_scores["miou"]["per_class"]["disk"] + main_scores["miou"]["per_class"]["disc"]) / 2
    )
    assert main_scores["miou"]["interval"][0] <= main_scores["miou"]["mean"] <= main_scores["miou"]["interval"][1]
    assert scores["discriminative"]["miou"]["mean"] < main_scores["miou"]["mean"]
    assert scores["text_permuted"]["miou"] is None
    assert scores["text_permuted"]["counts"]["left_out"] == 3
    assert scores["colour_threshold"]["ceiling_latent"] is None

    base, small = (scores[f"grid/size=00{size}/steps=0050/cfg=07.50"] for size in (32, 16))
    assert base["counts"]["phrases"] == 12
    assert base["counts"]["left_out"] == 21
    assert base["counts"]["missing"] == 0
    assert small["ceiling_latent"]["overall"] < base["ceiling_latent"]["overall"] < 1
    assert scores["protocols/main.ppmn"]["protocol"] == "ppmn"
    assert scores["protocols/main.ppmn"]["boundary_iou"] == dict.fromkeys(SPLITS)

    comparisons = json.loads((study / "comparisons.json").read_text())
    cell = "grid/size=00{}/steps=0050/cfg=07.50".format
    pairs = ["main - text_permuted", "main - discriminative", "main - colour_threshold", f"main - {cell(32)}"]
    pairs += [f"{cell(16)} - {cell(32)}", f"readouts/nearest - {cell(32)}"]
    assert set(comparisons) == {*pairs, *(f"{pair} (things)" for pair in pairs), "main - discriminative (miou)"}
    permuted = comparisons["main - text_permuted"]
    assert permuted["n"] == 30
    assert 0 < permuted["ci_low"] < permuted["difference"] < permuted["ci_high"]
    assert comparisons["main - text_permuted (things)"]["n"] == 20
    assert comparisons[f"main - {cell(32)}"]["difference"] == 0
    difference = scores["main"]["ar"]["overall"] - scores["discriminative"]["ar"]["overall"]
    assert comparisons["main - discriminative"]["difference"] == pytest.approx(difference)
    assert comparisons["main - discriminative (miou)"]["ci_low"] > 0

    manifest = read_manifest(study / "manifest.json", verify=True)
    written = {f"results/small/scores/{name}" for name in expected_files - {"manifest.json"}}
    assert set(manifest["outputs"]) == {*written, "metrics/small.json"}
    assert {"data/small/phrases.parquet", "data/small/classes.json"} <= set(manifest["inputs"])
    assert manifest["phase"] == "score"


def test_miou_of_a_fraction_of_test_counts_the_pixels_of_its_images(study):
    """The mIoU of every set of images, computed from the masks themselves, singles out the chosen ones."""
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["score"]["miou"] = 0.3
    Path("params.yaml").write_text(yaml.safe_dump(document))
    params = load_params("params.yaml")
    table = read_phrases("data/small/class_phrases.parquet")
    chosen = miou_phrases(params, table)
    assert chosen["image_id"].nunique() == round(0.3 * 11)
    assert len(chosen) == 3 * chosen["image_id"].nunique()  # every class
    assert set(chosen["image_id"]) <= set(refined_images(validate_params(document | {"refine": {"test_fraction": 0.5}}), table))
    run = next(run for run in study_runs(params) if run.name == "class_phrases")
    assert run_rows(params, run, table, table)[KEY].equals(chosen[KEY])
    assert main(STUDY) == 0
    scored = json.loads((study / "main.json").read_text())["miou"]
    assert scored["images"] == chosen["image_id"].nunique()
    assert scored["pixels"] == sum(
        np.any([decode(mask, 24, 32) for mask in rows["mask"]], 0).sum() for _, rows in chosen.groupby("image_id")
    )


def test_without_miou_no_class_is_predicted(study):
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["score"]["miou"] = 0.0
    params = validate_params(document)
    assert not [run for run in study_runs(params) if run.role == "class_phrases"]
    assert miou_phrases(params, read_phrases("data/small/class_phrases.parquet")).empty
    for baseline in own_baselines(params):
        assert list(baseline.paths(params)) == [False]


def test_baselines_without_ground_truth_are_scored_under_every_protocol(study):
    assert main(STUDY) == 0
    params = load_params("params.yaml")
    folder = params.results_dir / "baselines"
    folder.mkdir()
    shutil.copy(params.results_dir / "predictions" / "main" / "predictions.parquet", folder / "theirs.parquet")
    entry = {"class_predictions": None, "label": "x", "imported": False}
    entries = [
        entry | {"name": "theirs", "real": True, "predictions": str(folder / "theirs.parquet")},
        entry | {"name": "box", "real": False, "predictions": str(folder / "theirs.parquet")},
        entry | {"name": "labels_only", "real": True, "predictions": None},
    ]
    outputs = score_baselines(params, read_phrases("data/small/phrases.parquet"), {"baselines": entries})
    names = {str(path.relative_to(study).with_suffix("")) for path in outputs if path.suffix == ".json"}
    with_protocols = {f"protocols/baselines/{name}.ppmn" for name in ("theirs", "labels_only")}
    assert names == {"baselines/theirs", "baselines/box", "baselines/labels_only", *with_protocols}
    for name, of_main in (("baselines/theirs", "main"), ("protocols/baselines/theirs.ppmn", "protocols/main.ppmn")):
        scores, expected = (json.loads((study / f"{stem}.json").read_text()) for stem in (name, of_main))
        for key in ("protocol", "ar", "interval", "ceiling", "boundary_iou", "counts"):
            assert scores[key] == expected[key], "the same masks as the main run have the same scores"
        assert scores["run"]["name"] == "baselines/theirs"
    empty = json.loads((study / "protocols/baselines/labels_only.ppmn.json").read_text())
    assert empty["protocol"] == "ppmn"
    assert empty["ar"] == dict.fromkeys(SPLITS)


def test_scoring_again_does_nothing(study, capsys):
    assert main(STUDY) == 0
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    capsys.readouterr()
    assert main(STUDY) == 0
    assert capsys.readouterr().out == "score: results/small/scores/manifest.json is up to date\n"
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before


def test_scoring_from_scratch_writes_the_same_bytes_and_removes_stale_scores(study, capsys):
    assert main(STUDY) == 0
    before = file_contents(study)
    (study / "main.json").unlink()
    (study / "grid" / "old.json").write_text("{}")
    (study / "old" / "removed.parquet").parent.mkdir()
    (study / "old" / "removed.parquet").write_text("")
    assert main(STUDY) == 0
    assert file_contents(study) == before


def test_miou_is_computed_from_masks_without_soft_maps(study, capsys):
    assert main(STUDY) == 0
    soft = json.loads((study / "main.json").read_text())["miou"]["mean"]
    maps_path("results/small/predictions/class_phrases/predictions.parquet").unlink()
    assert main(STUDY) == 0
    assert json.loads((study / "main.json").read_text())["miou"]["mean"] == pytest.approx(soft, abs=0.2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda results: (results / "manifest.json").unlink(),
            "predictions/manifest.json: no such file; run `genseg sample` with the params of study small",
        ),
        (lambda results: (results / "main/predictions.parquet").unlink(), "main/predictions.parquet: no such predictions file"),
        (
            lambda results: write_maps(np.zeros((2, 8, 8)), results / "class_phrases/predictions.parquet"),
            "class_phrases/predictions.safetensors: expected 33 soft maps, one for each prediction, got 2",
        ),
        (
            lambda results: write_json("data/small/classes.json", [{"name": "disk"}]),
            "phrase_id 1 is not the index of one of 1 classes",
        ),
    ],
)
def test_broken_study_is_rejected_in_one_line_and_has_no_manifest(study, capsys, damage, message):
    assert main(STUDY) == 0
    capsys.readouterr()
    damage(Path("results/small/predictions"))
    assert main(STUDY) == 2
    assert message in capsys.readouterr().err
    keeps_old_scores = not Path("results/small/predictions/manifest.json").exists()
    assert (study / "manifest.json").exists() == keeps_old_scores
