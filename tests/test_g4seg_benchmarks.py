"""G4Seg's benchmarks: the shipped params on tiny data in the published layouts, and the commands of docs/g4seg.md.

Only sizes, the generator and resources are replaced in the params. Imported masks are compared with the scripts of their
methods, rewritten literally, and mIoU with the pixels of the published label files.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from conftest import PROJECT, copy_project, run
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.phrases import row_mask
from genseg.cli.main import main
from genseg.metrics.semantic import ClassPhrases, mean_iou
from genseg.params import load_params

HEIGHT, WIDTH = 40, 56
SMALLER = {
    "backbone": None,
    "precision": "fp32",
    "size": 64,
    "feature_size": 16,
    "batch": 16,
    "layers": [1],
    "cut_quantiles": [0.5],
    "choice_timesteps": [600],
    "iterations": 1,
    "trained": {"steps": 2, "batch": 2, "size": 64},
}
COCO_GAPS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
"""Values of COCO-Stuff maps below 91 that no image has: the things that COCO's instances lack."""
COCO_NUMBERS = {value: number for number, value in enumerate(sorted(set(range(91)) - COCO_GAPS), start=1)}
"""Class number in GroupViT's `convert_coco_object.py` of each thing's value in a COCO-Stuff map."""


def convert_coco_object(values):
    """Return the labels that `convert_coco_object.py` makes from a COCO-Stuff map: 80 things, and background 0 for the rest."""
    numbers = COCO_NUMBERS | dict.fromkeys([*range(91, 182), 255], 0)
    return np.vectorize(numbers.__getitem__, otypes=[np.uint8])(values)


def blocks(rng, values):
    """Return a map [HEIGHT, WIDTH] of blocks with random values, with a border of 255 around the blocks as in VOC."""
    labels = np.kron(rng.choice(values, (HEIGHT // 8, WIDTH // 8)), np.ones((8, 8))).astype(np.uint8)
    labels[::8], labels[:, ::8] = 255, 255
    return labels


def save_pair(rng, labels, image, mask, palette=False):
    noise = rng.integers(0, 60, (HEIGHT, WIDTH, 3))
    picture = 40 * np.stack([labels % 5, labels // 5 % 5, labels % 3], axis=-1) + noise
    Image.fromarray(picture.astype(np.uint8)).save(image)
    png = Image.fromarray(labels)
    if palette:
        png.putpalette(rng.permutation(768).astype(np.uint8).tolist())
    png.save(mask)


def write_voc(root, masks, lists, values, palette):
    """Write VOC's layout; return the labels of the val images by stem."""
    rng = np.random.default_rng(len(values))
    for folder in ("JPEGImages", masks, f"ImageSets/{lists}"):
        (root / folder).mkdir(parents=True)
    truth = {}
    for split, stems in (("train", ["2007_000032", "2007_000039", "2008_000008"]), ("val", ["2007_000033", "2009_000457"])):
        for stem in stems:
            labels = blocks(rng, values)
            save_pair(rng, labels, root / f"JPEGImages/{stem}.jpg", root / f"{masks}/{stem}.png", palette)
            truth |= {stem: labels} if split == "val" else {}
        (root / f"ImageSets/{lists}/{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    save_pair(rng, blocks(rng, values), root / "JPEGImages/2010_000001.jpg", root / "unlisted.png")  # an image without a mask
    return truth


def write_benchmark(study, inputs):
    """Write the data of a study in the published layout; return the labels of its test images as methods number them."""
    devkit, rng = inputs / "VOCdevkit", np.random.default_rng(7)
    if study == "g4seg_voc":
        return write_voc(devkit / "VOC2012", "SegmentationClass", "Segmentation", [0, 0, 3, 15, 20], palette=True)
    if study == "g4seg_context":
        return write_voc(
            devkit / "VOC2010", "SegmentationClassContext", "SegmentationContext", [0, 1, 31, 47, 59], palette=False
        )
    truth = {}
    for split, stems in (("train2017", ["000000000009", "000000000025"]), ("val2017", ["000000000139", "000000000632"])):
        for folder in (split, f"stuffthingmaps/{split}"):
            (inputs / "coco" / folder).mkdir(parents=True)
        for stem in stems:
            # One image has stuff only. It has no phrase and no CAMs, but counts in mIoU.
            values = blocks(rng, [91, 123, 181] if stem == "000000000632" else [0, 2, 43, 89, 91, 123, 181])
            save_pair(rng, values, inputs / f"coco/{split}/{stem}.jpg", inputs / f"coco/stuffthingmaps/{split}/{stem}.png")
            truth |= {stem: convert_coco_object(values)} if split == "val2017" else {}
    return truth


def write_clip_es(rng, truth, folder):
    """Write maps as `generate_cams_voc12.py` does; return the labels that `eval_cam.py` makes from them with exponent 1."""
    folder.mkdir(parents=True)
    predicted = {}
    for stem, labels in truth.items():
        keys = np.array(sorted(set(np.unique(labels).tolist()) - {0, 255})) - 1
        predicted[stem] = np.zeros_like(labels)
        if not len(keys):
            continue  # without a class there is no file
        noise = rng.random((len(keys), HEIGHT, WIDTH))
        cams = (0.4 * (labels == keys[:, None, None] + 1) + 0.6 * noise).astype(np.float16)
        np.save(folder / f"{stem}.npy", {"keys": keys, "attn_highres": cams}, allow_pickle=True)
        scores = np.concatenate((np.power(1 - np.max(cams, axis=0, keepdims=True), 1), cams), axis=0)
        predicted[stem] = np.pad(keys + 1, (1, 0), mode="constant")[np.argmax(scores, axis=0)]
    return predicted


def write_groupvit(rng, truth, folder, classes):
    """Write labels as the mode `pred` of GroupViT's `show_result` does, and return them."""
    folder.mkdir(parents=True)
    predicted = {}
    for stem, labels in truth.items():
        predicted[stem] = np.where(
            (rng.random(labels.shape) < 0.7) & (labels != 255), labels, rng.choice([0, 1, classes - 1], labels.shape)
        )
        output = Image.fromarray(predicted[stem].astype(np.uint8)).convert("P")
        output.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tolist())
        output.save(folder / f"{stem}.png")
    return predicted


def brute_force_miou(truth, predicted):
    """Return mIoU from all labelled pixels of all images."""
    pairs = [(labels[labels != 255], predicted[stem][labels != 255]) for stem, labels in truth.items()]
    labels, guesses = (np.concatenate(side) for side in zip(*pairs, strict=True))
    ious = [
        ((labels == number) & (guesses == number)).sum() / ((labels == number) | (guesses == number)).sum()
        for number in np.unique(labels)
    ]
    return float(np.mean(ious))


def commands(study):
    """Return the import commands of a study in docs/g4seg.md."""
    text = (PROJECT / "docs/g4seg.md").read_text()
    return [shlex.split(line)[1:] for line in re.findall(rf"^genseg import .*{study}\.yaml.*$", text, re.MULTILINE)]


def assembled(study, folder):
    """Make a project with the data of a study and outputs of other methods, and run the documented commands up to the import.

    Returns the truth and the labels predicted by each method, by stem.
    """
    copy_project(folder)
    document = yaml.safe_load((PROJECT / f"params/{study}.yaml").read_text())
    document["refine"] |= SMALLER
    document["score"] = {"bootstrap": 100}
    document["resources"] = {name: {"mem_mb": 1000, "runtime": 10, "threads": 1, "gpu": 0} for name in ("data", "score")}
    document["resources"]["refine"] = {"mem_mb": 1000, "runtime": 10, "threads": 1, "gpu": 0, "shards": 1}
    (folder / f"params/{study}.yaml").write_text(yaml.safe_dump(document | {"device": "cpu"}))
    truth, rng = write_benchmark(study, folder / "data/inputs"), np.random.default_rng(1)
    classes = len((PROJECT / document["data"]["index_masks"]["classes"]).read_text().splitlines())
    assert main(["data", "--params", f"params/{study}.yaml"]) == 0
    predicted = {}
    for arguments in commands(study):
        source = Path(arguments[arguments.index("--source") + 1])
        writer = {"CLIP-ES": write_clip_es, "GroupViT": lambda *items: write_groupvit(*items, classes)}[arguments[1]]
        predicted[arguments[1]] = writer(rng, truth, source)
        assert main(arguments) == 0
    return truth, predicted


@pytest.mark.parametrize(("study", "methods"), [("g4seg_context", 1), ("g4seg_coco_object", 2)])
def test_imported_masks_have_the_miou_of_the_published_labels(tmp_path, monkeypatch, study, methods):
    monkeypatch.chdir(tmp_path)
    truth, predicted = assembled(study, tmp_path)
    params = load_params(f"params/{study}.yaml")
    assert len(predicted) == methods
    for name, labels in predicted.items():
        counts = ClassPhrases(params).count(params.imported_dir / f"{name}_class_phrases.parquet").counts
        assert len(counts) == len(truth)
        assert mean_iou(counts.sum(0)) == pytest.approx(brute_force_miou(truth, labels), abs=1e-12)
    assert json.loads(Path(f"data/{study}/report.json").read_text())["skipped"] == []


def test_context_without_background_has_59_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth, predicted = assembled("g4seg_context", tmp_path)
    document = yaml.safe_load(Path("params/g4seg_context.yaml").read_text())
    document["data"]["index_masks"] |= {"ignore": [0, 255], "background": None}
    Path("59.yaml").write_text(yaml.safe_dump(document))
    assert main(["data", "--params", "59.yaml"]) == 0
    source = Path("data/inputs/groupvit/context")
    assert main(["import", "GroupViT", "--format", "index_masks", "--source", str(source), "--params", "59.yaml"]) == 0
    assert len(json.loads(Path("data/g4seg_context/classes.json").read_text())) == 59
    without = {stem: np.where(labels == 0, 255, labels) for stem, labels in truth.items()}
    params = load_params("59.yaml")
    counts = ClassPhrases(params).count(params.imported_dir / "GroupViT_class_phrases.parquet").counts
    assert mean_iou(counts.sum(0)) == pytest.approx(brute_force_miou(without, predicted["GroupViT"]), abs=1e-12)


def test_coco_object_maps_every_value_as_the_converter_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assembled("g4seg_coco_object", tmp_path)
    values = np.array([[*COCO_NUMBERS, *range(91, 182), 255]], np.uint8)
    for split, stem in (("val2017", "000000000139"), ("val2017", "000000000632")):
        Image.fromarray(values).save(f"data/inputs/coco/stuffthingmaps/{split}/{stem}.png")
        Image.fromarray(values).save(f"data/inputs/coco/{split}/{stem}.jpg")
    assert main(["data", "--params", "params/g4seg_coco_object.yaml"]) == 0
    table = ClassPhrases(load_params("params/g4seg_coco_object.yaml")).table
    labels = np.full(values.shape, 255)
    for _, row in table[table["split"] == "test"].drop_duplicates("class_id").iterrows():
        labels[row_mask(row)] = row["class_id"]
    assert (labels == convert_coco_object(values)).all()


def test_voc_study_runs_through_the_dag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth, predicted = assembled("g4seg_voc", tmp_path)
    shutil.rmtree("data/g4seg_voc")  # Snakemake assembles the data itself
    command = ("snakemake", "--cores", "1", "--configfile", "params/g4seg_voc.yaml")
    done = run(*command, cwd=tmp_path)
    ran = set(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE))
    assert ran == {
        "all",
        "preflight",
        "data",
        "backbone",
        "baselines",
        "refine_train",
        "refine_shard",
        "refine",
        "score",
        "tables",
    }
    again = run(*command, "--dry-run", cwd=tmp_path)
    assert "Nothing to be done" in again.stdout + again.stderr

    table = pd.read_csv("results/g4seg_voc/tables/refinement.csv").set_index("method")
    assert set(predicted) <= set(table.index)
    for name, labels in predicted.items():
        assert table.loc[name, "miou_before"] == pytest.approx(100 * brute_force_miou(truth, labels), abs=0.05)
        assert np.isfinite(table.loc[name, ["miou_after", "delta", "ci_low", "ci_high"]].astype(float)).all()
    controls = pd.read_csv("results/g4seg_voc/tables/refinement_controls.csv")
    assert set(controls["control"]) == set(load_params("params/g4seg_voc.yaml").refine.controls)
    page = Path("results/g4seg_voc/tables/index.html").read_text()
    assert "G4Seg refinement: study g4seg_voc" in page
    recorded = read_metadata(Path("results/g4seg_voc/baselines/CLIP-ES_class_phrases.parquet"))["imported"]
    assert json.loads(recorded)["background"] == "power:1"
