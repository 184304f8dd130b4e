"""`genseg plan` without data, and against what a finished study measured."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import PROJECT
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.parquet import read_metadata
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.registry import study_baselines
from genseg.cli import main
from genseg.models import sdxl, stable_diffusion
from genseg.models.attention_control import BYTE_CAP
from genseg.models.flops import meta_unet, vae_flops
from genseg.models.text_to_image import TextToImage
from genseg.params import load_params
from genseg.plan.cost import largest_unit, safetensors_bytes
from genseg.plan.counts import SCENES_DRAWN
from genseg.refine.g4seg import passes
from genseg.refine.layout import MADE_WITH_G4SEG
from test_training import variant

FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "params").glob("*.yaml"))]


def plan(capsys, *arguments: str) -> dict:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """What git holds and the plan may read; no data, no results."""
    (tmp_path / "data").mkdir()
    for name in ("backbone", "classes"):
        shutil.copytree(PROJECT / "data" / name, tmp_path / "data" / name)
    shutil.copy(PROJECT / "data/sources.csv", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_is_planned_without_data(clone, path, capsys):
    found = plan(capsys, "--params", str(path))
    assert not found["counts"]["exact"]
    assert all(value > 0 for value in found["parameters"].values())
    assert all(row["bytes"] > 0 and row["measured"] is None for row in found["artifacts"])
    assert all(row["flops"] > 0 and row["measured_seconds"] is None for row in found["phases"])
    assert all(row["total"] > row["activations"] > 0 for row in found["memory"]["training"])
    for row in found["memory"]["generators"].values():
        assert row["total"] == row["weights"] + row["activations"]
        assert row["weights"] == row["parameters"] * (4 if row["precision"] == "fp32" else 2)
    whole = load_params(path).sample.is_whole()
    assert list(found["memory"]["generators"]) == (["baselines", "refine"] if whole else [])
    assert whole == any(row["phase"] == "refine" for row in found["phases"])
    if path.name == "paper.yaml":
        check_paper(found)
        check_paper_refinement(found, load_params(path))


def check_paper(found):
    surgery = -4 * 320 * 9 - 3 * (320 * 9 + 1)  # 4 input channels and 3 output channels fewer
    adapter = (640 + 1280) * (2048 + 1 + 2) + 2 * 2048 + 1280  # two Linear layers, nulls of two tokens, pooled null
    assert found["parameters"]["unet"] == 2_567_478_084 + surgery
    assert found["parameters"]["adapter"] == adapter
    trained = found["parameters"]["unet"] + adapter
    whole = next(row for row in found["memory"]["training"] if row["sharding"] == "replicate")
    assert whole["weights"] + whole["gradients"] + whole["moments"] == 16 * trained
    assert whole["average"] == 0, "no EMA in the paper"
    phases = {row["what"].split(":")[0].strip(): row for row in found["phases"]}
    assert phases["gs"]["flops"] == pytest.approx(52_802 * 128 * 4 * 6.69e12, rel=0.01), "recomputed: four passes"
    assert phases["of these the main row"]["evaluations"] == found["counts"]["rows"]["test"] * 100
    artifacts = {row["artifact"]: row["bytes"] for row in found["artifacts"]}
    assert artifacts["image latents 1024"] == pytest.approx(123_287 * 4 * 128 * 128 * 2, rel=1e-3)


def check_paper_refinement(found, study):
    row = found["memory"]["generators"]["refine"]
    assert (row["backbone"], row["size"]) == (stable_diffusion.SD_21, 512)
    assert row["parameters"] == 865_910_724 + 83_653_863 + 340_387_840
    distances, offsets = 4 * study.refine.batch * 4096**2, 4 * 4096**2
    features = 4 * study.refine.batch * 4096 * (1280 + 640)
    slices = 6 * BYTE_CAP  # scores, A, T, both weighted, and their sum, of an image-token slice of a 64 x 64 layer
    activations = row["activations"] - 3 * distances - offsets - features - slices
    assert 0.05e9 < activations < 0.15e9, "the rest"
    refined = [row for row in found["phases"] if row["phase"] == "refine" and "masks of each" in row["what"]]
    own = next(row for row in found["phases"] if "G4Seg, " in row["what"])
    masks = found["counts"]["refined"]["phrases"] + found["counts"]["refined"]["class_phrases"]
    assert own["evaluations"] == len(study_baselines(study)) * masks * passes(study.refine)
    assert own["flops"] == pytest.approx(own["evaluations"] * 0.804e12, rel=0.03)
    assert refined[0]["evaluations"] > own["evaluations"]


def test_a_finished_study_has_the_bytes_parameters_and_evaluations_it_was_planned_to_have(finished_study, monkeypatch, capsys):
    monkeypatch.chdir(finished_study)
    found = plan(capsys, "--params", "params/smoke.yaml")
    assert found["counts"]["exact"]
    exact = [row for row in found["artifacts"] if row["basis"] == "exact" and row["measured"] is not None]
    assert {row["artifact"] for row in exact} >= {"image latents 64", "image latents 48", "model: weights", "soft label maps"}
    assert {row["artifact"] for row in exact} >= {"baselines: soft maps", "refined: soft maps"}
    assert [row["artifact"] for row in exact if row["bytes"] != row["measured"]] == []
    for row in found["artifacts"]:
        if row["basis"] == "exact, but for headers":
            assert 0 <= row["measured"] - row["bytes"] < 2_000_000, row
    parameters = found["parameters"]
    assert parameters["unet"] + parameters["adapter"] == read_manifest("results/smoke/model/manifest.json")["parameters"]

    made = 0
    for run in read_manifest("results/smoke/predictions/manifest.json")["runs"]:
        if run["role"] != "readout" and run["evaluations"]:
            made += run["evaluations"] * len(read_predictions(f"results/smoke/predictions/{run['name']}/predictions.parquet"))
    planned = [row["evaluations"] for row in found["phases"] if row["what"].startswith("all runs")]
    assert sum(planned) == made
    measured = {row["what"]: row["measured_seconds"] for row in found["phases"] if row["phase"] == "train"}
    assert all(measured.values()), "Snakemake's benchmarks are read"

    refined, made = [row for row in found["phases"] if row["phase"] == "refine"], 0
    for entry in read_manifest("results/smoke/refined/manifest.json")["refined"]:
        if entry["refiner"] not in MADE_WITH_G4SEG:
            for path in (entry["predictions"], entry["class_predictions"]):
                made += int(read_metadata(path)["evaluations"]) * len(read_predictions(path))
    assert refined[1]["evaluations"] == made == sum(row["evaluations"] for row in refined[2:])
    assert all(row["measured_seconds"] for row in refined)
    assert next(row for row in found["phases"] if row["phase"] == "baselines")["measured_seconds"]


def test_the_baselines_take_the_passes_they_were_planned_to_take(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    planned = [row for row in plan(capsys, "--params", "params/smoke.yaml")["phases"] if row["phase"] == "baselines"]
    predict, rows = TextToImage.predict, []

    def counted(self, x_t, *others):
        rows.append(len(x_t))
        return predict(self, x_t, *others)

    monkeypatch.setattr(TextToImage, "predict", counted)
    shutil.rmtree("results/smoke/baselines")
    assert main(["baseline", "--params", "params/smoke.yaml"]) == 0
    assert load_params("params/smoke.yaml").baselines.diffpng.inversion.inner_steps == 1, "so no null text is done early"
    assert sum(rows) == planned[0]["evaluations"] == sum(row["evaluations"] for row in planned[1:])


def test_counts_before_assembly_are_near_those_after(finished_study, clone, monkeypatch, capsys):
    shutil.copytree(finished_study / "params", clone / "params")
    before = plan(capsys, "--params", variant(clone, "guess", backbone__shape=None, backbone__init="data/backbone"))["counts"]
    assert f"{SCENES_DRAWN} scenes" in before["source"]
    monkeypatch.chdir(finished_study)
    phrases = read_phrases("data/smoke/phrases.parquet")
    splits = phrases["split"].value_counts()
    assert before["train"] + before["val"] == pytest.approx(splits["train"] + splits["val"], rel=0.15)
    assert before["rows"]["test"] == pytest.approx(splits["test"], rel=0.25)
    files = set(phrases["file_name"])
    assert before["picture_bytes"] == pytest.approx(sum(Path(name).stat().st_size for name in files), rel=0.25)
    images = load_params("params/smoke.yaml").data.scenes
    assert sum(before["image_latents"].values()) >= images.train_images + images.test_images


def test_more_gpus_take_less_time_and_shards_less_memory(clone, capsys):
    one = plan(capsys, "--params", str(PROJECT / "params.yaml"))
    many = plan(capsys, "--params", str(PROJECT / "params.yaml"), "--gpus", "16", "--mfu", "0.2")
    for first, second in zip(one["phases"], many["phases"], strict=True):
        assert second["hours"] == (pytest.approx(first["hours"] / 8) if first["hours"] is not None else None)
    rows = {row["sharding"]: row for row in many["memory"]["training"] if row["chosen"]}
    assert {"replicate", "FSDP over 2", "FSDP over 16"} <= rows.keys()
    for name in ("weights", "gradients", "moments", "average", "teacher"):
        assert rows["FSDP over 16"][name] == rows["replicate"][name] // 16
    trained = rows["replicate"]["weights"] // 4
    for sharding in rows:  # without recomputation autograd keeps the 16-bit weights, sharded or not
        copies = {row["checkpointing"]: row["copies"] for row in many["memory"]["training"] if row["sharding"] == sharding}
        recomputed, kept = copies[True], copies[False]
        assert kept - recomputed == 2 * trained
        assert 0 < recomputed < 2 * trained


def test_a_stage_and_labels_of_the_vae_are_planned(clone, capsys):
    (clone / "params").mkdir()
    shutil.copy(PROJECT / "params.yaml", clone / "params/smoke.yaml")
    rare = {"train__validate_every": 10**6}
    distil = {"objective": "distill", "steps": 100, "lr_factor": 0.5, "guidance": 2.0}
    vae = {"train__label": "vae", "train__task_weight": 0.0, "sample__clip_x_0": False}
    without, stage, labels = (
        plan(capsys, "--params", variant(clone, name, **rare, **changes))
        for name, changes in (("a", {}), ("b", {"train__stages": [distil]}), ("c", vae))
    )
    train = load_params(PROJECT / "params.yaml").train
    phases = [{row["what"].split(":")[0]: row for row in found["phases"]} for found in (without, stage, labels)]
    validations = 4 * min(train.validate_phrases, without["counts"]["val"])
    forward = phases[0]["gs"]["flops"] / (train.steps * train.batch * 3 + validations)
    assert phases[1]["gs"]["evaluations"] - phases[0]["gs"]["evaluations"] == 100 * train.batch * 3, "two are the teacher's"
    assert phases[1]["gs"]["flops"] - phases[0]["gs"]["flops"] == pytest.approx(100 * train.batch * 5 * forward)
    more = phases[1]["discriminative"]["flops"] - phases[0]["discriminative"]["flops"]
    assert more == pytest.approx(100 * train.batch * 3 * forward), "the control has the same budget"
    assert all(row["teacher"] == row["weights"] for row in stage["memory"]["training"])
    assert not any(row["teacher"] for row in without["memory"]["training"])
    width = json.loads((clone / "data/backbone/unet/config.json").read_text())["block_out_channels"][0]
    assert labels["parameters"]["unet"] - without["parameters"]["unet"] == 3 * 9 * width + 3 * (9 * width + 1)
    encoded = vae_flops(json.loads((clone / "data/backbone/vae/config.json").read_text()), train.size)[0]
    assert phases[2]["gs"]["flops"] - phases[0]["gs"]["flops"] > (train.steps * train.batch + validations) * encoded
    maps = [
        next(row["bytes"] for row in found["artifacts"] if row["artifact"] == "soft label maps") for found in (without, labels)
    ]
    assert maps[1] > 10 * maps[0], "decoded, they are as large as the image"


def test_the_text_has_every_table(clone, capsys):
    assert main(["plan", "--params", str(PROJECT / "params.yaml")]) == 0
    text = capsys.readouterr().out
    for word in (
        "phrases",
        "parameters",
        "training, bytes on each GPU",
        "artifacts",
        "work on 1 x H200 at 40%",
        "FSDP over 8",
        "at most, on one GPU",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "GTX"], "--gpu GTX: known are"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--mfu", "1.5"], "--mfu"),
        (["--params", "hub.yaml"], "backbone.init: some/one: no such directory"),
        (["--params", "sd.yaml"], "no second text encoder; GS is fine-tuned from an SDXL-inpainting pipeline"),
        (["--params", "refine.yaml"], "refine.backbone: some/one: no such directory"),
        (["--params", "masks.yaml"], "nothing tells how many images"),
    ],
)
def test_what_cannot_be_planned_is_one_line(clone, arguments, message, capsys):
    text = (PROJECT / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text)
    (clone / "hub.yaml").write_text(text.replace("init: data/backbone ", "init: some/one "))
    (clone / "sd.yaml").write_text(text.replace("init: data/backbone ", f"init: {stable_diffusion.SD_21} "))
    before, refine = text.split("\nrefine:\n")
    (clone / "refine.yaml").write_text(before + "\nrefine:\n" + refine.replace("backbone: null", "backbone: some/one", 1))
    shutil.copy(clone / "data/classes/camvid.txt", clone / "data/classes/mine.txt")
    camvid = (PROJECT / "params/camvid.yaml").read_text()
    (clone / "masks.yaml").write_text(camvid.replace("data/classes/camvid.txt", "data/classes/mine.txt"))
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_bytes_of_a_safetensors_file(tmp_path):
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.uint8),
        "a": torch.zeros(7, 2),
        "long name": torch.zeros(11, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "file", metadata={"key": "x" * 17})
    shapes = {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in tensors.items()}
    assert safetensors_bytes(shapes, {"key": "x" * 17}) == (tmp_path / "file").stat().st_size


def test_the_largest_unit_is_that_of_the_parameters_names():
    unet = meta_unet(sdxl.UNET)
    units: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        found = re.match(r".*?\.(transformer_blocks|resnets)\.\d+", name)
        units[found[0] if found else "rest"] += parameter.numel()
    assert len(units) == 70 + 17 + 1
    assert largest_unit(unet) == max(units.values())
