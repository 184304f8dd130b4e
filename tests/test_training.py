"""Training: exact resume after kill -9, independence from micro-batches, what is trained, what is logged."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from genseg.artifacts.manifest import read_manifest
from genseg.cli import main
from genseg.diffusion.objectives import noised, task_loss
from genseg.diffusion.pipeline import load_pipeline
from genseg.diffusion.schedule import make_scheduler
from genseg.params import Optimizer, load_params, validate_params
from genseg.training.gs import (
    Batch,
    Networks,
    Objective,
    PhraseData,
    Texts,
    build_networks,
    image_store,
    parameter_groups,
    step_indices,
    text_store,
    total_steps,
    training_parts,
)
from genseg.training.loop import check_finite, load_checkpoint, lr_factor, save_checkpoint

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v
        for part in ("unet", "adapter")
        for k, v in load_file(next((folder / part).glob("*.safetensors"))).items()
    }


def variant(study: Path, name: str, **changes) -> str:
    """A params file of the finished study with other values; returns its path relative to the study."""
    document = yaml.safe_load((study / "params/smoke.yaml").read_text())
    for key, value in changes.items():
        node = document
        *parents, last = key.split("__")
        for part in parents:
            node = node[part]
        node[last] = value
    (study / f"params/{name}.yaml").write_text(yaml.safe_dump(document))
    return f"params/{name}.yaml"


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 40))
def test_every_row_is_seen_once_an_epoch_whatever_the_batch(seed, batch, count):
    steps = -(-count // batch)
    seen = [index for step in range(steps) for index in step_indices(seed, step, batch, count)][:count]
    assert Counter(seen) == Counter(range(count))


def test_learning_rate_schedule():
    values = [lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert values[0] == pytest.approx(1 / 11, rel=1e-3)
    assert max(values) == pytest.approx(values[10], rel=0.05)
    assert values[-1] < 0.001
    assert lr_factor(99, 100, 0, "constant") == 1


def test_a_bad_loss_stops_before_it_reaches_the_weights():
    from genseg.errors import UserError

    with pytest.raises(UserError, match="step 7: the loss is nan"):
        check_finite(torch.tensor(float("nan")), 7)


def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "unreadable" in capsys.readouterr().out


def test_killed_training_ends_with_the_same_weights(study_copy, monkeypatch):
    """kill -9 after some checkpoint, run again: the final weights are those of the uncut run, bit for bit."""
    expected = weights(study_copy / "results/smoke/model")
    log = (study_copy / "results/smoke/model/log.csv").read_bytes()
    shutil.rmtree(study_copy / "results/smoke/model")
    shutil.rmtree(study_copy / "work/smoke/train")
    command = [str(Path(sys.executable).parent / "genseg"), "train", "--params", "params/smoke.yaml", "--model", "gs"]
    process = subprocess.Popen(
        command, cwd=study_copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.time() + 240
    while not list((study_copy / "work/smoke").glob("train/*/step-*.pt")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (study_copy / "results/smoke/model").exists(), "killed in the middle"
    monkeypatch.chdir(study_copy)
    assert main(["train", "--params", "params/smoke.yaml", "--model", "gs"]) == 0
    found = weights(study_copy / "results/smoke/model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (study_copy / "results/smoke/model/log.csv").read_bytes() == log


def test_micro_batches_change_rounding_only(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    before = weights(study_copy / "results/smoke/model")
    params = variant(study_copy, "whole", train__micro_batch=8)
    assert main(["train", "--params", params]) == 0
    after = weights(study_copy / "results/smoke/model")
    start = weights_at_start(study_copy)
    moved = torch.cat([(before[name] - start[name]).abs().flatten() for name in start]).mean()
    apart = torch.cat([(before[name] - after[name]).abs().flatten() for name in start]).mean()
    assert moved > 1e-5
    assert apart < 0.01 * moved


def weights_at_start(study: Path) -> dict[str, torch.Tensor]:
    params = load_params("params/smoke.yaml")
    backbone = read_manifest(study / "results/smoke/backbone/manifest.json")
    texts = Texts(text_store(params), torch.device("cpu"))
    networks = build_networks(params, backbone["pipeline"], None, texts[""])
    parts = {"unet": networks.unet, "adapter": networks.adapter}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def test_all_of_the_networks_is_trained_and_new_layers_have_their_rate(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    start, end = weights_at_start(finished_study), weights(finished_study / "results/smoke/model")
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert not still
    params = load_params("params/smoke.yaml")
    pipeline = load_pipeline("results/smoke/model")
    networks = Networks(pipeline.unet, pipeline.adapter)
    groups = parameter_groups(networks, params.train.optimizer)
    assert [group["lr"] for group in groups] == [params.train.optimizer.lr, params.train.optimizer.lr_new]
    new = {id(parameter) for parameter in groups[1]["params"]}
    assert {id(p) for p in networks.adapter.parameters()} <= new
    assert {id(p) for p in pipeline.unet.conv_in.parameters()} <= new
    assert sum(len(group["params"]) for group in groups) == len(list(networks.parameters()))
    one = Optimizer.model_validate(params.train.optimizer.model_dump() | {"lr_new": None})
    assert len(parameter_groups(networks, one)) == 1, "the paper has one Adam group"


def test_the_log_has_validation_loss_per_timestep_band(finished_study):
    with open(finished_study / "results/smoke/model/log.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    last = rows[-1]
    assert int(last["step"]) == 8
    bands = [float(last[name]) for name in ("val_t0_249", "val_t250_499", "val_t500_749", "val_t750_999")]
    assert float(last["val_loss"]) == pytest.approx(sum(bands) / 4, rel=1e-4)


def test_labels_are_the_area_reduced_masks_and_mirrored_with_the_image(finished_study, monkeypatch):
    from genseg.artifacts.latents import LatentStore
    from genseg.artifacts.phrases import read_phrases, row_mask

    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    rows = phrases[phrases["split"] == "train"]
    data = PhraseData(
        rows, LatentStore(image_store(params, 64)), Texts(text_store(params), torch.device("cpu")), torch.device("cpu")
    )
    batch = data.batch([0, 0], [False, True])
    mask = torch.from_numpy(row_mask(rows.iloc[0])).float()
    assert torch.allclose(batch.label[0, 0], mask.reshape(16, 4, 16, 4).mean((1, 3)), atol=1e-6)
    assert torch.equal(batch.label[1], batch.label[0].flip(-1))
    assert torch.equal(batch.image[1], batch.image[0].flip(-1))


def test_epochs_become_steps():
    document = yaml.safe_load((Path(__file__).resolve().parents[1] / "params.yaml").read_text())
    document["train"] |= {"steps": None, "epochs": 3}
    assert total_steps(validate_params(document).train, 100) == -(-300 // document["train"]["batch"])


OTHER_CHOICES = {
    "no injection, noise": {
        "train__prediction": "noise",
        "train__zero_terminal_snr": False,
        "train__task_weight": 0.0,
        "train__inject": "none",
    },
    "v, pooled text, one group": {
        "train__prediction": "v",
        "train__text": "pooled",
        "train__image_columns": "masked_image",
        "train__ema": None,
        "train__precision": "bf16",
        "train__gradient_checkpointing": True,
        "train__optimizer__lr_new": None,
        "train__optimizer__name": "adam",
    },
}


DISTIL = {"objective": "distill", "steps": 2, "lr_factor": 0.5, "guidance": 3.0}
TASK = {"objective": "task", "steps": 2, "lr_factor": 0.5, "guidance": None}
OTHER_CHOICES["VAE labels, distilled"] = {
    "train__label": "vae",
    "train__task_weight": 0.0,
    "train__p_last": 0.5,
    "train__stages": [DISTIL],
    "sample__clip_x_0": False,
}


class Toy(torch.nn.Module):
    """Stands for `Networks`: its answer tells what it was asked."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x_t, image, t, texts, drop, size):
        self.asked.append((x_t, t))
        text = torch.zeros(len(t)) if drop is None else drop.float()
        return self.gain * x_t + image.mean(1, keepdim=True) - 0.3 * text[:, None, None, None] + t[:, None, None, None] / 1000


def toy_objective(**train) -> tuple[Objective, Batch, torch.Tensor, torch.Tensor]:
    document = yaml.safe_load((Path(__file__).resolve().parents[1] / "params.yaml").read_text())
    document["train"] |= train
    study = validate_params(document)
    draw = torch.Generator().manual_seed(0)
    scheduler = make_scheduler(BETAS, study.train.prediction, study.train.zero_terminal_snr)
    objective = Objective("gs", study, scheduler.alphas_cumprod)
    mask = (torch.rand(3, 1, 8, 8, generator=draw) > 0.5).float()
    image, noise = (torch.randn(3, channels, 4, 4, generator=draw) for channels in (4, 1))
    batch = Batch(image, torch.nn.functional.avg_pool2d(mask, 2), mask, [])
    return objective, batch, noise, torch.tensor([5, 500, 999])


def test_distillation_learns_the_guided_answer_in_one_pass():
    objective, batch, noise, t = toy_objective(stages=[DISTIL])
    objective.part = training_parts(objective.study.train, 100, "gs")[1]
    teacher = objective.teacher = Toy(0.5)
    student = Toy(0.7)
    x_t = noised((2 * batch.label - 1) * objective.study.train.label_scale, noise, objective.alphas_bar, t)
    unconditional = teacher(x_t, batch.image, t, [], torch.ones(3), 128)
    conditional = teacher(x_t, batch.image, t, [], None, 128)
    wanted = unconditional + 3.0 * (conditional - unconditional)  # Eq. 10
    answer = student(x_t, batch.image, t, [], None, 128)
    losses = objective(student, batch, noise, t, torch.ones(3, dtype=torch.bool))
    assert torch.allclose(losses, (answer - wanted).square().mean((1, 2, 3)), atol=1e-5)
    losses.sum().backward()
    assert student.gain.grad is not None
    assert teacher.gain.grad is None, "frozen"


def test_the_task_stage_asks_once_from_pure_noise_at_the_size_of_the_mask():
    objective, batch, noise, t = toy_objective(stages=[TASK], task_size=8)
    objective.part = training_parts(objective.study.train, 100, "gs")[1]
    student = Toy(0.7)
    losses = objective(student, batch, noise, t, None)
    [(asked, when)] = student.asked
    assert torch.equal(asked, noise)
    assert when.tolist() == [999, 999, 999]
    scale = objective.study.train.label_scale
    estimate = scale * student(noise, batch.image, when, [], None, 128)  # the default predicts x_0
    large = torch.nn.functional.interpolate(estimate, size=(8, 8), mode="bilinear")
    assert torch.allclose(losses, task_loss(large, batch.mask, scale))


@given(st.sampled_from([0.0, 0.25, 1.0]))
def test_the_last_timestep_is_drawn_with_its_probability(p_last):
    objective, *_ = toy_objective(p_last=p_last)
    t = objective.timesteps(4000, torch.Generator().manual_seed(0))
    uniform = torch.randint(0, 1000, (4000,), generator=torch.Generator().manual_seed(0))
    last = t == 999
    assert torch.equal(t[~last], uniform[~last]), "the others are what they were"
    assert last.float().mean().item() == pytest.approx(p_last + (1 - p_last) / 1000, abs=0.03)


def test_the_control_has_the_budget_of_all_parts():
    train = toy_objective(stages=[DISTIL, TASK])[0].study.train
    parts = training_parts(train, 100, "gs")
    assert [(part.first, part.steps) for part in parts] == [(0, 1000), (1000, 2), (1002, 2)]
    assert [(part.first, part.steps) for part in training_parts(train, 100, "discriminative")] == [(0, 1004)]


def test_a_run_cut_in_a_stage_ends_with_the_same_weights(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    stages = [DISTIL | {"steps": 3}, TASK | {"steps": 3}]
    params = variant(study_copy, "staged", train__steps=2, train__checkpoint_every=1, train__stages=stages)
    shutil.rmtree(study_copy / "work/smoke/train")
    saved, save = {}, save_checkpoint

    def keep(folder, step, state):
        save(folder, step, state)
        saved[step] = (folder, (folder / f"step-{step:07d}.pt").read_bytes())

    monkeypatch.setattr("genseg.training.gs.save_checkpoint", keep)
    assert main(["train", "--params", params]) == 0
    expected = weights(study_copy / "results/smoke/model")
    assert sorted(saved) == list(range(1, 9))
    for cut in (2, 4, 6):  # at the beginning of a stage, within the first, within the second
        folder, content = saved[cut]
        for later in folder.glob("step-*.pt"):
            later.unlink()
        (folder / f"step-{cut:07d}.pt").write_bytes(content)
        assert main(["train", "--params", params]) == 0
        found = weights(study_copy / "results/smoke/model")
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"cut after step {cut}"


@pytest.mark.parametrize("changes", OTHER_CHOICES.values(), ids=OTHER_CHOICES)
def test_other_choices_train_and_predict(study_copy, monkeypatch, changes):
    monkeypatch.chdir(study_copy)
    params = variant(study_copy, "other", train__steps=2, **changes)
    assert main(["train", "--params", params]) == 0
    stages = sum(stage["steps"] for stage in changes.get("train__stages", []))
    assert json.loads((study_copy / "results/smoke/model/manifest.json").read_text())["steps"] == 2 + stages
    picture = next((study_copy / "data/smoke/scenes/val2017").glob("*.jpg"))
    out = study_copy / "out"
    assert main(["predict", str(picture), "--phrase", "the grass", "--model", "results/smoke/model", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"mask_0.png", "overlay.png", "predictions.json"}


def test_a_full_disk_is_one_line_and_training_goes_on_when_there_is_space(study_copy, monkeypatch, capsys):
    expected = weights(study_copy / "results/smoke/model")
    disk = study_copy / "work/smoke/train"
    shutil.rmtree(disk)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        monkeypatch.chdir(study_copy)
        assert main(["train", "--params", "params/smoke.yaml"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the disk is full" in error
        assert "work/smoke/train" in error
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert main(["train", "--params", "params/smoke.yaml"]) == 0
        found = weights(study_copy / "results/smoke/model")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        subprocess.run(["umount", disk], check=True)
