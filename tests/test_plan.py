"""`genseg plan` without data, and compared with the measured values of a finished study."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
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
from genseg.plan.cost import largest_unit
from genseg.plan.counts import SCENES_DRAWN
from genseg.plan.generator import find_generator
from genseg.plan.rows import safetensors_bytes
from genseg.refine.layout import RANDOM, evidence_passes, forward_passes
from genseg.sampling.runs import Run
from test_training import variant

FILES = [PROJECT / "params.yaml", *sorted((PROJECT / "params").glob("*.yaml"))]


def plan(capsys, *arguments: str) -> dict:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The files of a fresh clone that the plan reads; there are no assembled data and no results."""
    (tmp_path / "data").mkdir()
    for name in ("backbone", "classes"):
        shutil.copytree(PROJECT / "data" / name, tmp_path / "data" / name)
    shutil.copy(PROJECT / "data/sources.csv", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_params_are_planned_without_data(clone, path, capsys):
    planned = plan(capsys, "--params", str(path))
    assert not planned["counts"]["exact"]
    assert all(value > 0 for value in planned["parameters"].values())
    assert all(row["bytes"] > 0 and row["measured"] is None for row in planned["artifacts"])
    assert all(row["flops"] > 0 and row["measured_seconds"] is None for row in planned["phases"])
    assert all(row["total"] > row["activations"] > 0 for row in planned["memory"]["training"])
    for row in planned["memory"]["generators"].values():
        assert row["total"] == row["weights"] + row["activations"]
        assert row["weights"] == row["parameters"] * (4 if row["precision"] == "fp32" else 2)
    params = load_params(path)
    phases = {row["phase"] for row in planned["phases"]}
    expected = {"baselines": bool(params.baselines.attention), "refine": True} if params.sample.has_tables() else {}
    assert list(planned["memory"]["generators"]) == [phase for phase, is_planned in expected.items() if is_planned]
    assert ("refine" in phases) == params.sample.has_tables()
    assert ({"latents", "train", "sample"} <= phases) == bool(planned["memory"]["training"]) == bool(params.sample.runs)
    if path.name == "paper.yaml":
        check_paper(planned)
        check_paper_refinement(planned, load_params(path))


def check_paper(planned):
    conversion = -4 * 320 * 9 - 3 * (320 * 9 + 1)  # 4 input channels and 3 output channels fewer
    adapter = (640 + 1280) * (2048 + 1 + 2) + 2 * 2048 + 1280  # two linear layers, null embeddings of two tokens, pooled null
    assert planned["parameters"]["unet"] == 2_567_478_084 + conversion
    assert planned["parameters"]["adapter"] == adapter
    trained = planned["parameters"]["unet"] + adapter
    replicated = next(row for row in planned["memory"]["training"] if row["sharding"] == "replicate")
    assert replicated["weights"] + replicated["gradients"] + replicated["moments"] == 16 * trained
    assert replicated["average"] == 0, "no EMA in the paper"
    phases = {row["what"].split(":")[0].strip(): row for row in planned["phases"]}
    assert phases["gs"]["flops"] == pytest.approx(52_802 * 128 * 4 * 6.69e12, rel=0.01), (
        "four forward passes with recomputation"
    )
    assert phases["of which main row"]["evaluations"] == planned["counts"]["rows"]["test"] * 100
    artifacts = {row["artifact"]: row["bytes"] for row in planned["artifacts"]}
    assert artifacts["image latents 1024"] == pytest.approx(123_287 * 4 * 128 * 128 * 2, rel=1e-3)


def check_paper_refinement(planned, params):
    row = planned["memory"]["generators"]["refine"]
    assert (row["backbone"], row["size"]) == (stable_diffusion.SD_21, 512)
    assert row["parameters"] == 865_910_724 + 83_653_863 + 340_387_840
    distances, offsets = 4 * params.refine.batch * 4096**2, 4 * 4096**2
    features = 4 * params.refine.batch * 4096 * (1280 + 640)
    slices = 6 * BYTE_CAP  # scores, A, T, weighted A, weighted T and their sum, for one slice of a 64 x 64 layer
    activations = row["activations"] - 3 * distances - offsets - features - slices
    assert 0.05e9 < activations < 0.15e9, "remaining activations of the forward pass"
    total = next(row for row in planned["phases"] if row["phase"] == "refine" and "masks for each" in row["what"])
    g4seg = next(row for row in planned["phases"] if "G4Seg, " in row["what"])
    phrases, class_phrases = (planned["counts"]["refined"][name] for name in ("phrases", "class_phrases"))
    shared = params.resources.refine.shards * class_phrases * evidence_passes(params.refine)
    assert g4seg["evaluations"] == len(study_baselines(params)) * phrases * forward_passes(params.refine) + shared
    generator = find_generator(params, "refine.backbone", None, None)
    batches = math.ceil((phrases + class_phrases) / params.refine.batch)
    pictures = planned["counts"]["refined"]["images"] + batches
    encoding = (phrases + class_phrases) * generator.text_flops() + pictures * vae_flops(generator.vae, params.refine.size)[0]
    expected = g4seg["evaluations"] * 0.804e12 + len(study_baselines(params)) * encoding
    assert g4seg["flops"] == pytest.approx(expected, rel=0.03)
    assert total["evaluations"] > g4seg["evaluations"]


def test_finished_study_has_the_planned_bytes_parameters_and_evaluations(finished_study, monkeypatch, capsys):
    monkeypatch.chdir(finished_study)
    planned = plan(capsys, "--params", "params/smoke.yaml")
    assert planned["counts"]["exact"]
    exact = [row for row in planned["artifacts"] if row["basis"] == "exact" and row["measured"] is not None]
    assert {row["artifact"] for row in exact} >= {"image latents 64", "image latents 48", "gs: weights", "soft label maps"}
    assert {row["artifact"] for row in exact} >= {"baselines: soft maps"}
    assert [row["artifact"] for row in exact if row["bytes"] != row["measured"]] == []
    for row in planned["artifacts"]:
        if row["basis"] == "exact except headers":
            assert 0 <= row["measured"] - row["bytes"] < 2_000_000, row
    parameters = planned["parameters"]
    assert parameters["unet"] + parameters["adapter"] == read_manifest("results/smoke/model/gs/manifest.json")["parameters"]

    sampled = 0
    for run in read_manifest("results/smoke/predictions/manifest.json")["runs"]:
        run = Run.model_validate(run)
        if run.role != "readout" and run.evaluations:
            sampled += run.evaluations * len(read_predictions(f"results/smoke/predictions/{run.name}/predictions.parquet"))
    assert sum(row["evaluations"] for row in planned["phases"] if row["what"].startswith("all runs")) == sampled
    measured = {row["what"]: row["measured_seconds"] for row in planned["phases"] if row["phase"] == "train"}
    assert all(measured.values()), "from Snakemake's benchmarks"

    rows, refined = [row for row in planned["phases"] if row["phase"] == "refine"], 0
    for entry in read_manifest("results/smoke/refined/manifest.json")["refined"]:
        if entry["refiner"] != RANDOM:
            for path in (entry["predictions"], entry["class_predictions"]):
                refined += int(read_metadata(path)["evaluations"]) * len(read_predictions(path))
    refine, shards = load_params("params/smoke.yaml").refine, load_params("params/smoke.yaml").resources.refine.shards
    refined += shards * planned["counts"]["refined"]["class_phrases"] * evidence_passes(refine)
    assert rows[1]["evaluations"] == refined == sum(row["evaluations"] for row in rows[2:])
    assert all(row["measured_seconds"] for row in rows)
    assert next(row for row in planned["phases"] if row["phase"] == "baselines")["measured_seconds"]


def test_plan_of_a_study_with_only_the_main_run_is_exact(finished_study, tmp_path, monkeypatch, capsys):
    document = yaml.safe_load((finished_study / "params/smoke.yaml").read_text())
    document["sample"]["runs"] = ["main"]
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(finished_study)
    planned = plan(capsys, "--params", str(tmp_path / "part.yaml"))
    assert planned["counts"]["exact"]
    assert all(planned["counts"]["rows"][part] > 0 for part in ("test", "class_phrases"))
    assert {row["phase"] for row in planned["phases"]} == {"latents", "train", "sample"}


def test_baselines_run_the_planned_evaluations(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    planned = [row for row in plan(capsys, "--params", "params/smoke.yaml")["phases"] if row["phase"] == "baselines"]
    predict, batch_sizes = TextToImage.predict, []

    def counting_predict(self, x_t, *arguments):
        batch_sizes.append(len(x_t))
        return predict(self, x_t, *arguments)

    monkeypatch.setattr(TextToImage, "predict", counting_predict)
    for folder in ("results/smoke/baselines", "work/smoke/baselines"):  # the masks, and the chosen thresholds
        shutil.rmtree(folder)
    assert main(["baseline", "--params", "params/smoke.yaml"]) == 0
    assert load_params("params/smoke.yaml").baselines.diffpng.inversion.inner_steps == 1, "no early stop"
    assert sum(batch_sizes) == planned[0]["evaluations"] == sum(row["evaluations"] for row in planned[1:])


def test_estimated_counts_are_close_to_those_of_the_assembled_data(finished_study, clone, monkeypatch, capsys):
    shutil.copytree(finished_study / "params", clone / "params")
    estimated = plan(capsys, "--params", variant(clone, "guess", backbone__shape=None, backbone__init="data/backbone"))[
        "counts"
    ]
    assert f"{SCENES_DRAWN} scenes" in estimated["source"]
    monkeypatch.chdir(finished_study)
    phrases = read_phrases("data/smoke/phrases.parquet")
    splits = phrases["split"].value_counts()
    assert estimated["train"] + estimated["val"] == pytest.approx(splits["train"] + splits["val"], rel=0.15)
    assert estimated["rows"]["test"] == pytest.approx(splits["test"], rel=0.25)
    files = set(phrases["file_name"])
    assert estimated["picture_bytes"] == pytest.approx(sum(Path(name).stat().st_size for name in files), rel=0.25)
    scenes = load_params("params/smoke.yaml").data.scenes
    assert sum(estimated["image_latents"].values()) >= scenes.train_images + scenes.test_images


def test_more_gpus_need_less_time_and_shards_less_memory(clone, capsys):
    one = plan(capsys, "--params", str(PROJECT / "params.yaml"))
    many = plan(capsys, "--params", str(PROJECT / "params.yaml"), "--gpus", "16", "--mfu", "0.2")
    for first, second in zip(one["phases"], many["phases"], strict=True):
        assert second["hours"] == (pytest.approx(first["hours"] / 8) if first["hours"] is not None else None)
    rows = {row["sharding"]: row for row in many["memory"]["training"] if row["chosen"]}
    assert {"replicate", "FSDP over 2", "FSDP over 16"} <= rows.keys()
    for name in ("weights", "gradients", "moments", "average", "teacher"):
        assert rows["FSDP over 16"][name] == rows["replicate"][name] // 16
    trained = rows["replicate"]["weights"] // 4
    for sharding in rows:  # without recomputation autograd keeps all 16-bit weights, whether they are sharded or not
        copies = {row["checkpointing"]: row["copies"] for row in many["memory"]["training"] if row["sharding"] == sharding}
        assert copies[False] - copies[True] == 2 * trained
        assert 0 < copies[True] < 2 * trained


def test_distillation_stages_and_latent_labels_are_planned(clone, capsys):
    (clone / "params").mkdir()
    shutil.copy(PROJECT / "params.yaml", clone / "params/smoke.yaml")
    rare = {"train__validate_every": 10**6}
    distil = {"objective": "distill", "steps": 100, "lr_factor": 0.5, "guidance_scale": 2.0}
    vae = {"train__label": "vae", "train__mask_loss_weight": 0.0, "sample__clip_sample": False}
    without, stage, labels = (
        plan(capsys, "--params", variant(clone, name, **rare, **changes))
        for name, changes in (("a", {}), ("b", {"train__stages": [distil]}), ("c", vae))
    )
    train = load_params(PROJECT / "params.yaml").train
    phases = [{row["what"].split(":")[0]: row for row in planned["phases"]} for planned in (without, stage, labels)]
    validations = 4 * min(train.validate_phrases, without["counts"]["val"])
    own = train.self_estimate_prob * (1 - train.terminal_warmup) * (1 - train.terminal_timestep_prob)
    forward = phases[0]["gs"]["flops"] / (train.steps * train.batch * (3 + own) + validations)
    assert phases[1]["gs"]["evaluations"] - phases[0]["gs"]["evaluations"] == 100 * train.batch * 3, "two by the teacher"
    assert phases[1]["gs"]["flops"] - phases[0]["gs"]["flops"] == pytest.approx(100 * train.batch * 5 * forward)
    control = phases[1]["discriminative"]["flops"] - phases[0]["discriminative"]["flops"]
    assert control == pytest.approx(100 * train.batch * 3 * forward), "the control has the same number of steps"
    assert all(row["teacher"] == row["weights"] for row in stage["memory"]["training"])
    assert not any(row["teacher"] for row in without["memory"]["training"])
    width = json.loads((clone / "data/backbone/unet/config.json").read_text())["block_out_channels"][0]
    assert labels["parameters"]["unet"] - without["parameters"]["unet"] == 3 * 9 * width + 3 * (9 * width + 1)
    encoded = vae_flops(json.loads((clone / "data/backbone/vae/config.json").read_text()), train.size)[0]
    assert phases[2]["gs"]["flops"] - phases[0]["gs"]["flops"] > (train.steps * train.batch + validations) * encoded
    maps = [
        next(row["bytes"] for row in planned["artifacts"] if row["artifact"] == "soft label maps")
        for planned in (without, labels)
    ]
    assert maps[1] > 10 * maps[0], "decoded maps are as large as the image"


def test_text_output_contains_every_table(clone, capsys):
    assert main(["plan", "--params", str(PROJECT / "params.yaml")]) == 0
    text = capsys.readouterr().out
    for word in (
        "phrases",
        "parameters",
        "training, bytes per GPU",
        "artifacts",
        "work on 1 x H200 at 40%",
        "FSDP over 8",
        "baselines and refinement, upper bound per GPU",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "GTX"], "--gpu GTX: unknown GPU; expected one of"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--mfu", "1.5"], "--mfu must be above 0 and at most 1"),
        (["--params", "hub.yaml"], "backbone.init: some/one: cannot reach the hub"),
        (["--params", "sd.yaml"], "missing second text encoder; GS needs an SDXL-inpainting pipeline"),
        (["--params", "refine.yaml"], "refine.backbone: some/one: cannot reach the hub"),
        (["--params", "masks.yaml"], "the number of images is unknown"),
    ],
)
def test_invalid_plan_prints_a_one_line_error(clone, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    documents = {
        "params": {},
        "hub": {"backbone": {"init": "some/one"}},
        "sd": {"backbone": {"init": stable_diffusion.SD_21}},
        "refine": {"refine": {"backbone": "some/one"}},
    }
    for name, document in documents.items():
        (clone / f"{name}.yaml").write_text(yaml.safe_dump({"study": name} | document))
    shutil.copy(clone / "data/classes/camvid.txt", clone / "data/classes/mine.txt")
    camvid = (PROJECT / "params/camvid.yaml").read_text()
    (clone / "masks.yaml").write_text(camvid.replace("data/classes/camvid.txt", "data/classes/mine.txt"))
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_safetensors_bytes_equals_the_file_size(tmp_path):
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.uint8),
        "a": torch.zeros(7, 2),
        "long name": torch.zeros(11, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "file", metadata={"key": "x" * 17})
    shapes = {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in tensors.items()}
    assert safetensors_bytes(shapes, {"key": "x" * 17}) == (tmp_path / "file").stat().st_size


def test_largest_unit_agrees_with_parameters_grouped_by_name():
    unet = meta_unet(sdxl.UNET)
    units: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        unit = re.match(r".*?\.(transformer_blocks|resnets)\.\d+", name)
        units[unit[0] if unit else "rest"] += parameter.numel()
    assert len(units) == 70 + 17 + 1
    assert largest_unit(unet) == max(units.values())
