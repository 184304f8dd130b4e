"""Sampling: equal bytes for any number of shards, only new points are sampled for a changed grid, and valid controls."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genseg.artifacts import masks
from genseg.artifacts.files import read_json
from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import as_levels, as_maps, read_maps, read_predictions
from genseg.artifacts.resample import bilinear, nearest
from genseg.baselines.colour import fit_colours, predict_colours
from genseg.cli import main
from genseg.diffusion.pipeline import GSPipeline, load_pipeline
from genseg.models.vae import decode_latents, encode_images
from genseg.params import load_params
from genseg.report.figures.evolution import read_evolution
from genseg.report.figures.narratives import colour_of
from genseg.report.figures.prediction import draw_prediction
from genseg.sampling.readout import VaeReadout, read_mask
from genseg.sampling.runs import permute_texts, sample_times_path, study_runs
from genseg.sampling.shard import shard_blocks
from test_training import variant

BASE = "grid/size=0064/steps=0003/cfg=07.50"


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_finished_study_has_all_runs(finished_study):
    params = load_params(finished_study / "params/smoke.yaml")
    names = [run.name for run in study_runs(params)]
    assert len(set(names)) == len(names)
    for name in names:
        assert (finished_study / "results/smoke/predictions" / name / "predictions.parquet").exists(), name
    evaluations = {run.name: run.evaluations for run in study_runs(params)}
    assert evaluations[BASE] == 6
    assert evaluations["grid/size=0064/steps=0003/cfg=01.00"] == 3
    assert evaluations["grid/size=0064/steps=0001/cfg=01.00,samples=02,mirrored"] == 2
    assert evaluations["val/size=0064/steps=0003/cfg=02.00,rule=dpmpp,guided=0.300-0.700"] == 5
    assert evaluations["discriminative"] == 1
    assert evaluations["colour_threshold"] is None


def test_three_shards_give_the_same_bytes_as_one(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    before = tree(study_copy / "results/smoke/predictions")
    shutil.rmtree(study_copy / "results/smoke/predictions")
    shutil.rmtree(study_copy / "work/smoke/samples")
    params = variant(study_copy, "sharded", resources__sample={"shards": 3})
    assert main(["sample", "--params", params]) == 0
    assert tree(study_copy / "results/smoke/predictions") == before


def test_new_guidance_samples_only_its_point_and_removes_the_old_one(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    before = tree(study_copy / "results/smoke/predictions")
    shutil.rmtree(study_copy / "work/smoke/samples")  # as after `dvc pull`
    params = variant(study_copy, "changed", sample__grid={"sizes": [48], "num_inference_steps": [2], "guidance_scale": [4.0]})
    assert main(["sample", "--params", params]) == 0
    assert "1 of 21 runs are missing" in capsys.readouterr().out
    after = tree(study_copy / "results/smoke/predictions")
    gone = {name for name in before if name not in after}
    new = {name for name in after if name not in before}
    assert {Path(name).parent.name for name in gone} == {"cfg=07.00"}
    assert {Path(name).parent.name for name in new} == {"cfg=04.00"}
    assert all(after[name] == before[name] for name in after if name not in new)


def test_new_point_is_sampled_on_the_grid_and_on_val(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    before = tree(study_copy / "results/smoke/predictions")
    shutil.rmtree(study_copy / "work/smoke/samples")
    params = variant(
        study_copy, "changed", sample__operating_points=[{"num_inference_steps": 1, "guidance_scale": w} for w in (1.0, 2.0)]
    )
    assert main(["sample", "--params", params]) == 0
    assert "2 of" in capsys.readouterr().out
    after = tree(study_copy / "results/smoke/predictions")
    folders = {str(Path(name).parent) for name in after if name not in before}
    assert folders == {f"{part}/size=0064/steps=0001/cfg=02.00" for part in ("grid", "val")}
    assert all(after[name] == before[name] for name in after if name in before)
    assert not any("samples=02" in name for name in after)


def test_operating_points_are_compared_on_the_same_part_of_val(finished_study):
    phrases = read_phrases(finished_study / "data/smoke/phrases.parquet")
    names = [run.name for run in study_runs(load_params(finished_study / "params/smoke.yaml")) if run.role == "val"]
    keys = set()
    for name in names:
        frame = read_predictions(finished_study / "results/smoke/predictions" / name / "predictions.parquet")
        keys.add(tuple(map(tuple, frame[KEY].to_numpy())))
    [shared] = keys
    images = {image_id for image_id, *_ in shared}
    val = phrases[phrases["split"] == "val"]
    assert set(shared) == set(map(tuple, val[val["image_id"].isin(images)][KEY].to_numpy()))
    assert 0 < len(images) < val["image_id"].nunique()


def test_stored_maps_give_the_stored_masks(finished_study):
    path = finished_study / "results/smoke/predictions/main/predictions.parquet"
    frame, maps = read_predictions(path), read_maps(path)
    assert len(frame) == len(maps)
    for row, soft in zip(frame.itertuples(), maps, strict=True):
        assert np.array_equal(decode(row.mask, 64, 64), bilinear(soft[None], 64, 64)[0] >= 0.5)
        assert 0 <= row.score <= 1


def test_record_of_labels_agrees_with_the_runs_of_the_grid(finished_study):
    """Its phrases are sampled again in another batch, so maps may differ by rounding."""
    folder = finished_study / "results/smoke/predictions"
    record = read_evolution(folder / "evolution.safetensors")
    base = folder / BASE / "predictions.parquet"
    rows = {key: row for row, key in enumerate(read_predictions(base)[KEY].itertuples(index=False, name=None))}
    order = [rows[key] for key in record.keys]
    for maps, path in ((record.x0[:, -1], base), (record.unguided, Path(str(base).replace("cfg=07.50", "cfg=01.00")))):
        assert np.abs(maps / 255 - read_maps(path)[order]).max() <= 1.01 / 255
    assert record.decoded.shape == (len(order), 64, 64)


def test_record_has_a_thing_and_a_stuff_of_each_image(finished_study):
    phrases = read_phrases(finished_study / "data/smoke/phrases.parquet").set_index(KEY)
    keys = read_evolution(finished_study / "results/smoke/predictions/evolution.safetensors").keys
    images = sorted(
        set(read_predictions(finished_study / "results/smoke/predictions" / BASE / "predictions.parquet")["image_id"])
    )
    expected = []
    for image_id in images:
        of_image = phrases.loc[[key for key in phrases.index if key[0] == image_id]].sort_index()
        kinds = [of_image[of_image["is_thing"] == is_thing].index for is_thing in (True, False)]
        expected += sorted(index[0] for index in kinds if len(index))
    assert keys == expected[: len(keys)]
    assert len(keys) == 4


def test_vae_readout_of_plain_labels_is_the_round_trip_of_black_and_white(finished_study):
    vae = load_pipeline(finished_study / "results/smoke/model/gs").vae
    for label in (-1.0, 1.0):
        picture = VaeReadout(vae, 64)(np.full((1, 16, 16), label, np.float32))[0]
        plain = decode_latents(vae, encode_images(vae, torch.full((1, 3, 64, 64), label)))[0]
        luminance = (0.299 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2] + 1) / 2
        assert np.allclose(picture, luminance.numpy(), atol=1e-5)


def test_times_of_all_sampled_masks_are_recorded(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    for run in study_runs(params):
        path = sample_times_path(params, run.name, 0, 1)
        if run.point is None or run.role == "readout":
            assert not path.exists()
            continue
        times = read_json(path)
        assert times["masks"] == len(read_predictions(f"results/smoke/predictions/{run.name}/predictions.parquet"))
        assert times["seconds"] >= 0


def test_message_names_a_missing_part(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    shutil.rmtree(study_copy / "results/smoke/predictions/main")
    shutil.rmtree(study_copy / "work/smoke/samples/main")
    assert main(["sample", "--params", "params/smoke.yaml", "--gather"]) == 2
    assert "work/smoke/samples/main: all blocks are missing" in capsys.readouterr().err
    assert main(["sample", "--params", "params/smoke.yaml", "--size", "77"]) == 2
    assert "--size 77" in capsys.readouterr().err


def test_message_names_an_unreadable_model(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    weights = study_copy / "results/smoke/model/gs/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    picture = next((study_copy / "data/smoke/scenes/val2017").glob("*.jpg"))
    command = ["predict", str(picture), "--phrase", "a", "--model", "results/smoke/model/gs", "--out", "out"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("genseg predict: error: results/smoke/model/gs")
    assert not (study_copy / "out").exists()


def test_prediction_replaces_an_earlier_one_and_invalid_options_are_rejected(finished_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished_study)
    picture, out = next((finished_study / "data/smoke/scenes/val2017").glob("*.jpg")), tmp_path / "out"
    command = ["predict", str(picture), "--model", "results/smoke/model/gs", "--steps", "1"]
    assert main([*command, "--phrase", "the grass", "--phrase", "the star", "--out", str(out)]) == 0
    (out / "mask_of_mine.png").touch()
    assert main([*command, "--phrase", "the grass", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"mask_0.png", "mask_of_mine.png", "overlay.png", "predictions.json"}
    (tmp_path / "file").touch()
    for options, message in (
        (["--out", str(tmp_path / "file" / "sub")], "file is a file; pass a folder"),
        (["--out", str(out), "--steps", "1001"], "num_inference_steps must be in 1..1000"),
        (["--out", str(out), "--guidance", "inf"], "guidance_scale below 100"),
    ):
        capsys.readouterr()
        assert main([*command, "--phrase", "a", *options]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_prediction_with_params_is_sampled_as_the_main_row(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    options = {"sampler": "dpmpp", "guidance_interval": [0.4, 1.0], "ensemble_size": 2, "mirror": True}
    main_row = {"size": 64, "num_inference_steps": 3, "guidance_scale": 2.0, **options}
    document["sample"] |= {"main": main_row, "threshold": 0.3, "clip_sample": False, "precision": "fp32"}
    Path("some.yaml").write_text(yaml.safe_dump(document))
    picture = next(Path("data/smoke/scenes/val2017").glob("*.jpg"))
    command = ["predict", str(picture), "--phrase", "the grass", "--phrase", "the star", "--params", "some.yaml", "--out"]
    assert main([*command, "out"]) == 0
    pipe = GSPipeline.from_pretrained("results/smoke/model/gs")
    pipe.configure_sampling("trailing", False)
    expected = pipe(Image.open(picture), ["the grass", "the star"], 3, 2.0, **options, threshold=0.3)
    for k, mask in enumerate(expected.masks):
        assert np.array_equal(np.asarray(Image.open(f"out/mask_{k}.png")) == 255, mask)
    assert main([*command, "cheap", "--steps", "1", "--guidance", "1", "--threshold", "0"]) == 0
    assert np.asarray(Image.open("cheap/mask_0.png")).all()
    document["sample"]["readout"] = "nearest"
    Path("some.yaml").write_text(yaml.safe_dump(document))
    assert main([*command, "out"]) == 2
    assert "sample.readout nearest" in capsys.readouterr().err
    assert main(["predict", str(picture), "--phrase", "a", "--out", "out"]) == 2
    assert "pass a trained model with --model DIR" in capsys.readouterr().err


def test_folder_of_images_is_segmented_by_the_phrases_of_a_caption(finished_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished_study)
    pictures, out = sorted(Path("data/smoke/scenes/val2017").glob("*.jpg"))[:2], tmp_path / "out"
    (tmp_path / "in").mkdir()
    Image.open(pictures[0]).save(tmp_path / "in/first.PNG")
    Image.open(pictures[1]).convert("L").resize((50, 90)).save(tmp_path / "in/second.jpg")
    (tmp_path / "in/notes.txt").touch()
    command = ["predict", str(tmp_path / "in"), "--model", "results/smoke/model/gs", "--out", str(out)]
    assert main([*command, "--caption", "In this picture I can see some grass, near the star.", "--soft-maps"]) == 0
    assert f"2 masks of each of 2 images in {out}" in capsys.readouterr().out
    pipe = GSPipeline.from_pretrained("results/smoke/model/gs")
    for name in ("first.PNG", "second.jpg"):
        image, folder = Image.open(tmp_path / "in" / name), out / name.partition(".")[0]
        expected = pipe(image, ["some grass", "the star"])
        for k in range(2):
            soft = np.asarray(Image.open(folder / f"map_{k}.png"))
            assert np.array_equal(soft, np.rint(255 * bilinear(expected.maps[k], image.height, image.width)))
            assert np.array_equal(np.asarray(Image.open(folder / f"mask_{k}.png")) == 255, expected.masks[k])
        assert [entry["phrase"] for entry in read_json(folder / "predictions.json")] == ["some grass", "the star"]
    assert main([*command, "--phrase", "the grass"]) == 0
    assert {path.name for path in (out / "first").iterdir()} == {"mask_0.png", "overlay.png", "predictions.json"}

    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/first.png")
    for source, text, message in (
        (tmp_path / "in", ["--phrase", "a"], "two images differ only in their suffix"),
        (tmp_path / "empty", ["--phrase", "a"], "no images in this folder"),
        (tmp_path / "none", ["--phrase", "a"], "no such image or folder"),
        (tmp_path / "in", ["--caption", "In the background."], "it has no noun phrase"),
    ):
        capsys.readouterr()
        assert main([command[0], str(source), *command[2:], *text]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_overlay_colours_each_mask_as_its_phrase(tmp_path):
    image, masks = np.full((40, 60, 3), 255, np.uint8), np.zeros((9, 40, 60), bool)
    for k in range(9):
        masks[k, 4:36, 6 * k + 2 : 6 * k + 6] = True
    path = tmp_path / "overlay.png"
    draw_prediction(image, masks, [f"the stripe {k}" for k in range(9)], None, path)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    legend = {tuple(pixel) for pixel in picture[round(width / 2 * 40 / 60) :].reshape(-1, 3)}
    assert len({colour_of(k) for k in range(9)}) == 9
    for k in range(9):
        colour = tuple(int(colour_of(k)[i : i + 2], 16) for i in (1, 3, 5))
        x = width / 2 + (6 * k + 4) / 60 * width / 2
        assert np.abs(picture[height // 3, round(x)] - colour).max() < 12
        assert colour in legend


def frame_of(masks_of_phrases: list[np.ndarray], image_id: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": image_id,
            "narrative_id": "n",
            "phrase_id": range(len(masks_of_phrases)),
            "phrase": [f"phrase {i}" for i in range(len(masks_of_phrases))],
            "mask": [masks.encode(mask) for mask in masks_of_phrases],
        }
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 100))
def test_permuted_texts_come_from_phrases_with_another_mask(kinds, seed):
    shapes = [np.eye(4, dtype=bool)[kind][None].repeat(4, 0) for kind in kinds]
    rows = frame_of(shapes)
    permuted = permute_texts(rows, seed)
    truth = dict(zip(rows["phrase"], rows["mask"], strict=True))
    for row in permuted.itertuples():
        assert truth[row.text] != row.mask
    assert permuted["text"].is_unique
    most = max(np.bincount(kinds))
    if len(set(kinds)) == 1:
        assert permuted.empty
    elif most <= len(kinds) - most:
        assert len(permuted) == len(kinds), "a full derangement exists and is returned"
    assert len(permuted) == min(len(kinds), 2 * (len(kinds) - most))


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 5))
def test_shards_are_unions_of_blocks(count, batch, shards):
    rows = pd.DataFrame({"image_id": 1, "narrative_id": "n", "phrase_id": range(count)})
    whole = shard_blocks(rows, batch, 0, 1)
    parts = [item for shard in range(shards) for item in shard_blocks(rows, batch, shard, shards).items()]
    assert list(whole) == list(range(len(whole)))
    assert sorted((number, *block["phrase_id"]) for number, block in parts) == [
        (number, *block["phrase_id"]) for number, block in whole.items()
    ]


def test_readouts_of_known_maps():
    soft = np.array([[0.0, 1.0], [0.2, 0.8]], np.float32)
    assert np.array_equal(nearest(soft[None], 4, 4)[0], np.kron(soft, np.ones((2, 2), np.float32)))
    mask, score = read_mask(soft, "nearest", 4, 4, 0.5)
    assert mask.sum() == 8
    assert score == pytest.approx(0.9)
    assert read_mask(np.zeros((2, 2), np.float32), "bilinear", 4, 4, 0.5)[1] == 0
    values = np.random.default_rng(0).random((3, 3)).astype(np.float32)
    assert np.array_equal(as_levels(as_maps(as_levels(values))), as_levels(values))


def test_colour_control_segments_by_colour_only(tmp_path):
    """On red and blue squares, "the red one" is determined by colour and "the left one" is not."""
    rng = np.random.default_rng(0)
    rows = []
    for image_id in range(12):
        picture = np.full((32, 32, 3), 128, np.uint8) + rng.integers(0, 20, (32, 32, 3), dtype=np.uint8)
        red_left = rng.random() < 0.5
        for colour, left in (("red", red_left), ("blue", not red_left)):
            mask = np.zeros((32, 32), bool)
            mask[8:24, 2:14] = left
            mask[8:24, 18:30] = not left
            picture[mask] = (220, 20, 20) if colour == "red" else (20, 20, 220)
            for phrase in (f"the {colour} one", f"the {'left' if left else 'right'} one"):
                rows.append((image_id, "n", len(rows), phrase, masks.encode(mask), str(tmp_path / f"{image_id}.png"), 32, 32))
        Image.fromarray(picture).save(tmp_path / f"{image_id}.png")
    frame = pd.DataFrame(rows, columns=[*KEY, "phrase", "mask", "file_name", "height", "width"])
    train, test = frame[frame["image_id"] < 8], frame[frame["image_id"] >= 8]
    predictions = predict_colours(fit_colours(train, 0), test, 0.5).merge(test, on=KEY, suffixes=("", "_true"))

    def iou(row):
        a, b = decode(row.mask, 32, 32), decode(row.mask_true, 32, 32)
        return (a & b).sum() / (a | b).sum()

    colour = [iou(row) for row in predictions.itertuples() if "red" in row.phrase or "blue" in row.phrase]
    place = [iou(row) for row in predictions.itertuples() if "left" in row.phrase or "right" in row.phrase]
    assert min(colour) > 0.95
    assert np.mean(place) < 0.75


def test_grid_runs_have_all_phrases_of_some_test_images(finished_study):
    phrases = read_phrases(finished_study / "data/smoke/phrases.parquet")
    grid = read_predictions(finished_study / "results/smoke/predictions" / BASE / "predictions.parquet")
    images = set(grid["image_id"])
    test = phrases[phrases["split"] == "test"]
    assert set(map(tuple, grid[KEY].to_numpy())) == set(map(tuple, test[test["image_id"].isin(images)][KEY].to_numpy()))
    assert 0 < len(images) < test["image_id"].nunique()
