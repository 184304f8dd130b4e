"""The phase refine on the finished smoke study: its predictions, scores, tables, and which files are kept or removed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pycocotools import mask as coco

from genseg.artifacts.phrases import write_phrases
from genseg.artifacts.predictions import maps_path, read_maps
from genseg.baselines.registry import study_baselines
from genseg.cli import main
from genseg.params import load_params
from genseg.params.refine import Crf
from genseg.refine.layout import refined_images, refiners

REFINED = Path("results/smoke/refined")
KEY = ["image_id", "narrative_id", "phrase_id"]


@pytest.fixture
def params(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    return load_params("params/smoke.yaml")


def manifest():
    return json.loads((REFINED / "manifest.json").read_text())


def times():
    return json.loads(Path("work/smoke/times/refine.json").read_text())


def test_every_baseline_has_every_refiner_on_the_same_images(params):
    pairs = {(entry["refiner"], entry["baseline"]) for entry in manifest()["refined"]}
    expected = {(name, each.name) for each in study_baselines(params) for name in refiners(params, each.name)}
    assert pairs == expected
    assert len({name for _, name in pairs}) == len(study_baselines(params))
    phrases = pd.read_parquet("data/smoke/phrases.parquet")
    images = refined_images(params, phrases)
    assert manifest()["images"] == images
    assert set(images) < set(phrases.loc[phrases["split"] == "test", "image_id"])
    tables = {"predictions": phrases, "class_predictions": pd.read_parquet("data/smoke/class_phrases.parquet")}
    for entry in manifest()["refined"]:
        for kind, table in tables.items():
            expected = table[table["image_id"].isin(images)].sort_values(KEY, ignore_index=True)
            refined = pd.read_parquet(entry[kind])
            assert refined[KEY].equals(expected[KEY])
            assert [code["size"] for code in codes(refined, expected)] == expected[["height", "width"]].to_numpy().tolist()
    # The random control has no time, because it reuses the results of G4Seg.
    timing = times()
    assert set(timing) == {f"{name}/{baseline}" for name, baseline in pairs if name != "random"}
    count = sum(len(table[table["image_id"].isin(images)]) for table in tables.values())
    for name, entry in timing.items():
        by_network = name.split("/")[0] not in ("crf", "trained")
        assert entry["seconds"] > 0
        assert (entry["masks"], entry["images"]) == (count, len(images))
        assert entry["batch"] == (params.refine.batch if by_network else 1)
        assert entry["device"].startswith("c")


def codes(predictions, table):
    return [
        {"counts": counts, "size": [height, width]}
        for counts, height, width in zip(predictions["mask"], table["height"], table["width"], strict=True)
    ]


def labels_of(path, table):
    """Return the label map [H, W] of each image by id, -1 for no label. It is taken from soft maps if there are any, else from
    masks, of which higher scores cover lower ones."""
    predictions = pd.read_parquet(path).reset_index(names="row")
    joined = table.merge(predictions, on=KEY, suffixes=("", "_predicted"))
    labels = {}
    for image_id, rows in joined.groupby("image_id"):
        size = int(rows["height"].iloc[0]), int(rows["width"].iloc[0])
        if maps_path(path).exists():
            maps = torch.from_numpy(read_maps(path)[rows["row"].to_numpy()])[None]
            best = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
            labels[image_id] = rows["phrase_id"].to_numpy()[best]
            continue
        label = np.full(size, -1)
        for _, row in rows.sort_values(["score", "phrase_id"], ascending=[True, False]).iterrows():
            label[coco.decode({"counts": row["mask_predicted"], "size": list(size)}).astype(bool)] = row["phrase_id"]
        labels[image_id] = label
    return labels


def brute_force_miou(path, table):
    """Return mIoU from one confusion matrix of all pixels of all images; smaller ground-truth masks cover larger ones."""
    hit, union, seen = {}, {}, set()
    for image_id, label in labels_of(path, table).items():
        rows = table[table["image_id"] == image_id]
        truths = {row.phrase_id: coco.decode({"counts": row.mask, "size": list(label.shape)}) for row in rows.itertuples()}
        truth = np.full(label.shape, -1)
        for phrase_id in sorted(truths, key=lambda index: -int(truths[index].sum())):
            truth[truths[phrase_id] > 0] = phrase_id
        for index in truths:
            inside = (truth == index)[truth >= 0], (label == index)[truth >= 0]
            hit[index] = hit.get(index, 0) + (inside[0] & inside[1]).sum()
            union[index] = union.get(index, 0) + (inside[0] | inside[1]).sum()
            seen |= {index} if inside[0].any() else set()
    return float(np.mean([hit[index] / union[index] for index in seen]))


def test_refined_classes_share_no_pixel_and_cover_the_image(params):
    """The data have no background class, so G4Seg gives every pixel one class. The random control leaves no
    pixel that the coarse masks cover without a class."""
    table = pd.read_parquet("data/smoke/class_phrases.parquet")
    for entry in manifest()["refined"]:
        refined = pd.read_parquet(entry["class_predictions"]).merge(table, on=KEY, suffixes=("", "_truth"))
        if entry["refiner"] in ("g4seg", "no_generation", "random"):
            coarse = pd.read_parquet(entry["coarse_classes"]).merge(table, on=KEY, suffixes=("", "_truth"))
            for image_id, rows in refined.groupby("image_id"):
                classes = sum(coco.decode(code).astype(int) for code in codes(rows, rows))
                assert (classes <= 1).all()
                covered = np.ones_like(classes, bool)
                if entry["refiner"] == "random":
                    before = coarse[coarse["image_id"] == image_id]
                    covered = np.any([coco.decode(code) for code in codes(before, before)], axis=0)
                assert (classes[covered] == 1).all()


def test_miou_before_and_after_equals_brute_force(params):
    table = pd.read_parquet("data/smoke/class_phrases.parquet")
    table = table[table["image_id"].isin(manifest()["images"])]
    rows = json.loads(Path("results/smoke/scores/refinement.json").read_text())["rows"]
    paths = {(entry["refiner"], entry["baseline"]): entry for entry in manifest()["refined"]}
    assert len(rows) == len(paths)
    checked = [row for row in rows if row["baseline"] in ("gs", "diffseg", "inexact_eroded", "cross_attention")]
    for row in checked:
        entry = paths[row["refiner"], row["baseline"]]
        for side, path in (("before", entry["coarse_classes"]), ("after", entry["class_predictions"])):
            assert row["miou"][side] == pytest.approx(brute_force_miou(path, table), abs=2e-4), (
                row["refiner"],
                row["baseline"],
                side,
            )


def test_ar_and_means_equal_brute_force(params):
    scores = json.loads(Path("results/smoke/scores/refinement.json").read_text())
    phrases = pd.read_parquet("data/smoke/phrases.parquet")
    table = phrases[phrases["image_id"].isin(manifest()["images"])]
    paths = {(entry["refiner"], entry["baseline"]): entry for entry in manifest()["refined"]}
    for row in scores["rows"][:12]:
        entry = paths[row["refiner"], row["baseline"]]
        for side, path in (("before", entry["coarse"]), ("after", entry["predictions"])):
            joined = table.merge(pd.read_parquet(path), on=KEY, suffixes=("", "_predicted"))
            pairs = zip(codes(joined, joined), codes(joined.assign(mask=joined["mask_predicted"]), joined), strict=True)
            ious = [coco.iou([predicted], [truth], [0])[0][0] for truth, predicted in pairs]
            assert row["ar"][side] == pytest.approx(np.mean(ious), abs=1e-6)
    for mean in scores["means"]:
        own = [row for row in scores["rows"] if row["refiner"] == mean["refiner"] and (row["real"] or mean["over"] == "all")]
        assert mean["baselines"] == [row["baseline"] for row in own]
        for name in ("miou", "ar", "boundary_iou"):
            assert mean[name]["difference"] == pytest.approx(np.mean([row[name]["difference"] for row in own]))
            assert mean[name]["ci_low"] <= mean[name]["ci_high"]


def test_tables_and_figures_cover_all_baselines_and_controls(params):
    frame = pd.read_csv("results/smoke/tables/refinement.csv")
    assert list(frame.columns[:7]) == ["method", "real", "miou_before", "miou_after", "delta", "ci_low", "ci_high"]
    count = len(study_baselines(params))
    assert len(frame) == count + 2
    controls = pd.read_csv("results/smoke/tables/refinement_controls.csv")
    on_all = controls["control"].value_counts() == count + 2
    assert set(on_all[on_all].index) == set(params.refine.controls)
    published = pd.read_csv("results/smoke/tables/table2.csv").query("source == 'published'")
    assert not published["method"].str.contains("G4Seg|reimplemented|adaptation").any()
    for name in ("refined.png", "gain.png"):
        assert (Path("results/smoke/figures") / name).stat().st_size > 2000
        assert f"../figures/{name}" in Path("results/smoke/tables/index.html").read_text()


def test_costs_are_stored_outside_of_the_results(params):
    """Seconds differ between two runs, so they are not part of the results."""
    costs = pd.read_csv("work/smoke/tables/refinement_costs.csv")
    means = costs[costs["kind"] == "mean"].set_index("refiner")
    timing = times()
    assert set(costs.loc[costs["seconds"].isna(), "refiner"]) == {"random"}
    for refiner in ("g4seg", "crf", "alpha=1"):
        own = [entry["seconds"] / entry["images"] for name, entry in timing.items() if name.startswith(f"{refiner}/")]
        assert means.at[refiner, "seconds_per_image"] == pytest.approx(np.mean(own), rel=0.01)
    assert not list(Path("results/smoke").rglob("*costs*"))


def tune_crf(capsys):
    assert main(["refine", "--params", "params/smoke.yaml", "--tune-crf"]) == 0
    return capsys.readouterr().out


def test_crf_is_tuned_on_val_only(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    before = content()
    text = tune_crf(capsys)
    table, block = text.split("\n\n")
    head, columns, coarse, *settings = table.splitlines()
    names = columns.split()
    assert names[7:] == ["mean", "gs", *(f"inexact_{kind}" for kind in load_params("params/smoke.yaml").baselines.inexact)]
    assert len(settings) == 10
    main_row = next(
        summary
        for summary in (json.loads(path.read_text()) for path in sorted(Path("results/smoke/scores/val").rglob("*.json")))
        if summary["run"]["name"] == operating_point()
    )
    assert float(coarse.split()[1]) == pytest.approx(100 * main_row["ar"]["overall"], abs=0.051)
    assert f"{main_row['counts']['phrases']} phrases" in head
    values = [dict(zip(names, line.split(), strict=False)) for line in settings]
    best = max(values, key=lambda row: float(row["mean"]))
    chosen = yaml.safe_load(block)["refine"]["crf"]
    assert Crf.model_validate(chosen)
    assert {name: float(best[name]) for name in chosen} == pytest.approx(chosen)

    phrases = pd.read_parquet("data/smoke/phrases.parquet")
    only = phrases[phrases["split"] == "val"].sample(frac=1, random_state=0).reset_index(drop=True)
    write_phrases(only, Path("data/smoke/phrases.parquet"))
    assert tune_crf(capsys) == text
    assert content() == before


def operating_point():
    return json.loads(Path("results/smoke/scores/operating_points.json").read_text())["main"]


def content():
    return {path: path.read_bytes() for path in REFINED.rglob("*") if path.is_file() and path.suffix != ".json"}


def test_killed_refine_resumes_and_writes_the_same_bytes(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    before = content()
    deleted = [path for path in before if path.stem in ("gs", "gs_class_phrases", "inexact_box", "inexact_box_class_phrases")]
    for path in deleted:
        path.unlink()
    command = [str(Path(sys.executable).parent / "genseg"), "refine", "--params", "params/smoke.yaml"]
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    first = REFINED / "g4seg" / "gs.parquet"
    for _ in range(2400):
        if first.exists() or run.poll() is not None:
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert first.exists()
    assert not all(path.exists() for path in deleted), "refine finished before it was killed"
    modified = {path: path.stat().st_mtime_ns for path in content()}
    assert main(["refine", "--params", "params/smoke.yaml"]) == 0
    assert content() == before
    assert {path: path.stat().st_mtime_ns for path in modified} == modified


def test_gather_removes_refiners_no_longer_in_the_params_and_keeps_the_others(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    document["refine"]["controls"] = ["no_generation"]
    document["refine"]["sensitivity"]["baselines"] = []
    timing = times()
    Path("less.yaml").write_text(yaml.safe_dump(document))
    assert main(["refine", "--params", "less.yaml"]) == 0
    names = {"g4seg", "no_generation", "discrepancy", "network.json", "manifest.json"}
    assert {path.name for path in REFINED.iterdir()} == names
    assert "masks in" not in capsys.readouterr().out  # nothing was refined again
    kept = {name: entry for name, entry in timing.items() if name.split("/")[0] in ("g4seg", "no_generation")}
    assert times() == kept  # kept files keep their timing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "p.parquet"], "missing --phrases, --out; give all of --phrases, --predictions, --out"),
        (["--shard", "2", "--shards", "2"], "--shard 2: expected a number from 0 to 1"),
        (["--tune-crf", "--gather"], "--tune-crf refines nothing; leave out --gather"),
        (["--method", "alpha_zero"], "--method: applies to one file only; also give --phrases"),
    ],
)
def test_user_errors_are_one_line(finished_study, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(finished_study)
    assert main(["refine", "--params", "params/smoke.yaml", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
