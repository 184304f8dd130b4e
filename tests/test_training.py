"""Training: exact resume after kill -9, independence from micro-batches and processes, what is trained, what is logged."""

import csv
import json
import os
import random
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

from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.phrases import read_phrases, row_mask
from genseg.cli import main
from genseg.diffusion.objectives import noised, task_loss
from genseg.diffusion.pipeline import load_pipeline
from genseg.diffusion.schedule import make_scheduler
from genseg.models.backbone import load_vae
from genseg.models.vae import encode_masks
from genseg.params import Optimizer, Stage, load_params, validate_params
from genseg.training.data import AHEAD, Batch, PhraseData, micro_batches, prefetched, step_indices, total_steps
from genseg.training.distributed import Ranks
from genseg.training.gs import Networks, Texts, build_networks, image_store, parameter_groups, sample_flops, text_store
from genseg.training.loop import Meter, load_checkpoint, lr_factor, save_checkpoint
from genseg.training.objective import Objective, training_parts

TRAIN = load_params(Path(__file__).resolve().parents[1] / "params/smoke.yaml").train

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


class Rows:
    """Rows that are their own numbers."""

    label_shape = (1, 4, 4)

    def __len__(self):
        return 23

    def batch(self, indices, mirrored):
        label = torch.tensor(mirrored)
        return Batch(torch.tensor(indices), label, label, [])


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 12))
def test_a_step_is_the_same_however_it_is_cut(seed, step, processes, micro_batch):
    """Processes and micro-batches cut the global batch; what is drawn for each place of it stays."""
    train = TRAIN.model_copy(update={"batch": 12, "flip": True, "p_drop": 0.5})

    def draw_t(count, generator):
        return torch.randint(0, 1000, (count,), generator=generator)

    [whole] = micro_batches(Rows(), train.model_copy(update={"micro_batch": 12}), draw_t, seed, step, range(12))
    cut = train.model_copy(update={"micro_batch": micro_batch})
    shares = [Ranks(rank, processes, torch.device("cpu")).places(12) for rank in range(processes)]
    parts = [part for share in shares for part in micro_batches(Rows(), cut, draw_t, seed, step, share)]
    assert all(len(part.t) <= micro_batch for part in parts)
    for name in ("noise", "t", "drop"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.batch.image for part in parts]), whole.batch.image)
    assert torch.equal(torch.cat([part.batch.label for part in parts]), whole.batch.label)


def test_data_are_prepared_ahead_in_order_and_what_goes_wrong_is_raised():
    made = []

    def make(step):
        made.append(step)
        if step == 8:
            raise KeyError("row 8")
        return step

    stream = prefetched(make, range(3, 12))
    assert next(stream) == 3
    deadline = time.time() + 20
    while made != [3, 4, 5] and time.time() < deadline:
        time.sleep(0.01)
    assert made == list(range(3, 4 + AHEAD)), "and not the whole epoch"
    assert [next(stream) for _ in range(4)] == [4, 5, 6, 7]
    with pytest.raises(KeyError, match="row 8"):
        next(stream)


def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "unreadable" in capsys.readouterr().out


def model_files(study: Path) -> dict[str, bytes]:
    """Everything of the model but its manifest, which holds times and params."""
    folder = study / "results/smoke/model"
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_killed_training_ends_with_the_same_bytes(study_copy, monkeypatch):
    """kill -9 at any step (before the first checkpoint, at one, between two), run again: the model's files and its log are
    those of the uncut run."""
    expected = model_files(study_copy)
    shutil.rmtree(study_copy / "results/smoke/model")
    shutil.rmtree(study_copy / "work/smoke/train")
    params = variant(study_copy, "often", train__checkpoint_every=3, train__log_every=1)
    command = [sys.executable, "-m", "genseg", "train", "--params", params]
    process = subprocess.Popen(
        command, cwd=study_copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    kill_at = random.SystemRandom().randint(1, 7)
    deadline = time.time() + 240
    while logged(study_copy)[-1:] < [kill_at] and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (study_copy / "results/smoke/model").exists(), f"killed in the middle, at step {kill_at}"
    monkeypatch.chdir(study_copy)
    assert main(["train", "--params", params]) == 0
    found = model_files(study_copy)
    assert found.keys() == expected.keys()
    differing = {name for name in expected if found[name] != expected[name]}
    assert differing == {"log.csv"}, f"killed at step {kill_at}"
    assert logged(study_copy) == list(range(1, 9)), "no step is lost or logged twice"
    rows = list(csv.DictReader(expected["log.csv"].decode().splitlines()))
    with open(next((study_copy / "work/smoke/train").glob("*/log.csv")), newline="") as handle:
        assert [row for row in csv.DictReader(handle) if int(row["step"]) % 2 == 0] == rows
    for name in ("loss", "samples_per_s", "data_wait_percent", "memory_gib"):
        curve = next((study_copy / "work/smoke/train").glob(f"*/curves/plots/metrics/{name}.tsv")).read_text().splitlines()[1:]
        assert [int(line.split("\t")[0]) for line in curve] == list(range(1, 9)), name


def logged(study: Path) -> list[int]:
    """Steps in the log of the one training run in `work`."""
    for path in (study / "work/smoke/train").glob("*/log.csv"):
        return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:] if line.count(",") == 7]
    return []


def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_checkpoint(study_copy, monkeypatch, capsys):
    shutil.rmtree(study_copy / "results/smoke/model")
    shutil.rmtree(study_copy / "work/smoke/train")
    monkeypatch.chdir(study_copy)
    wild = {"train__optimizer__lr": 1e30, "train__optimizer__warmup_steps": 0, "train__ema": None}
    assert main(["train", "--params", variant(study_copy, "wild", train__checkpoint_every=1, **wild)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("genseg train: error: step 1: the ")
    assert "the last checkpoint is unharmed" in line
    assert not (study_copy / "results/smoke/model").exists()
    [work] = (study_copy / "work/smoke/train").iterdir()
    assert load_checkpoint(work)["step"] == 1
    assert all(torch.isfinite(value).all() for value in load_checkpoint(work)["networks"].values())


DISTIL = {"objective": "distill", "steps": 2, "lr_factor": 0.5, "guidance": 3.0}
TASK = {"objective": "task", "steps": 2, "lr_factor": 0.5, "guidance": None}
FEW_STEPS = {
    "train__steps": 2,
    "train__stages": [DISTIL],
    "train__checkpoint_every": 3,
    "train__validate_every": 1,
    "train__optimizer__warmup_steps": 0,
}


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_train_as_one(study_copy, monkeypatch, sharding):
    """As `genseg train` starts them where two GPUs are visible (here they find none and meet on the CPU).

    The tolerance: gradients agree to the rounding of sums in another order (1e-7 to 1e-6 of their norm), but AdamW's first
    steps are lr * sign(gradient), and the sign of a gradient that is zero but for rounding (a bias before a group norm) is
    chance. So single weights may be 2 lr apart a step, and it is the mean that must be small: 1e-3 of the mean way.
    """
    monkeypatch.chdir(study_copy)
    start = weights_at_start(study_copy)
    assert main(["train", "--params", variant(study_copy, "one", **FEW_STEPS)]) == 0
    one = weights(study_copy / "results/smoke/model")
    # The cuts fall otherwise than in one process: 4 + 4 there, 2 + 2 and 2 + 2 here; else DDP's sum has the same bits.
    changes = FEW_STEPS | {"train__sharding": sharding, "train__micro_batch": 2, "resources__train__gpu": 2}
    params = variant(study_copy, "two", **changes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "--params", params]) == 0
    two = weights(study_copy / "results/smoke/model")
    moved = torch.cat([(one[name] - start[name]).abs().flatten() for name in one]).mean()
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean()
    assert moved > 1e-5
    assert apart < 1e-3 * moved
    if sharding == "shard":  # whole tensors are stored, and dealt out again: cut in the stage, the same bytes
        expected = model_files(study_copy)
        newest = max((study_copy / "work/smoke/train").glob("*/step-0000004.pt"), key=lambda path: path.stat().st_mtime)
        newest.unlink()
        assert main(["train", "--params", params]) == 0
        assert newest.exists()
        assert model_files(study_copy) == expected


def test_a_mistake_that_all_processes_find_is_one_line(finished_study, monkeypatch, capfd, tmp_path):
    document = yaml.safe_load((finished_study / "params/smoke.yaml").read_text())
    document["resources"]["train"]["gpu"] = 2
    document["train"] |= {"batch": 9, "micro_batch": 9}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(finished_study)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert main(["train", "--params", str(tmp_path / "odd.yaml")]) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line == "genseg train: error: train.batch 9 is no multiple of the 2 processes; start another number of them"


def test_operations_are_those_of_the_layers(finished_study, monkeypatch):
    """Against a count by hand: 2 per multiply-add of every linear layer, convolution and attention product."""
    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    data = training_rows(params)
    networks = build_networks(params, "results/smoke/backbone/pipeline", None, data.texts[""]).eval()
    counted = []

    def layer(module, inputs, output):
        counted.append(2 * output.numel() * module.weight[0].numel())

    def attention(module, inputs, keywords, output):
        hidden = inputs[0]
        context = keywords["encoder_hidden_states"]
        width = hidden.shape[-1]
        keys = hidden.shape[1] + keywords["injected"][width].shape[1] if context is None else context.shape[1]
        counted.append(4 * hidden.shape[1] * keys * width)

    for module in networks.unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(layer)
        if type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    batch = data.batch([0], [False])
    with torch.no_grad():
        networks(batch.label, batch.image, torch.zeros(1), batch.texts, None, 64)
    first, distilled = training_parts(params.train.model_copy(update={"stages": [Stage(**DISTIL)]}), 100, "gs")
    assert sample_flops(networks, data, params.train, first) == 3 * sum(counted)
    assert sample_flops(networks, data, params.train, distilled) == 5 * sum(counted), "two passes of the teacher"


def test_figures_of_a_log_line(monkeypatch):
    clock = iter([12.0, 15.0])  # ends of two steps that begin at 10 and 13
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    meter = Meter(torch.device("cuda", 1), processes=2, flops=78e12)
    meter.add(16, 10.0, 0.5)
    meter.add(16, 13.0, 0.5)
    figures = meter.figures()
    assert figures == {
        "samples_per_s": 8.0,
        "data_wait_percent": 25.0,
        "memory_gib": 1.5,
        "tflops": 312.0,  # 8 samples/s of 78 T in two processes
        "mfu_percent": 100.0,
    }


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


def training_rows(params, *labels) -> PhraseData:
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    texts, images = Texts(text_store(params), torch.device("cpu")), LatentStore(image_store(params, params.train.size))
    return PhraseData(phrases[phrases["split"] == "train"], images, texts, *labels)


def test_labels_are_the_area_reduced_masks_and_mirrored_with_the_image(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    data = training_rows(load_params("params/smoke.yaml"))
    batch = data.batch([0, 0], [False, True])
    mask = torch.from_numpy(row_mask(data.rows.iloc[0])).float()
    assert torch.allclose(batch.label[0, 0], mask.reshape(16, 4, 16, 4).mean((1, 3)), atol=1e-6)
    assert torch.equal(batch.label[1], batch.label[0].flip(-1))
    assert torch.equal(batch.image[1], batch.image[0].flip(-1))
    assert data.label_shape == batch.label.shape[1:]
    assert torch.equal(batch.mask, batch.label)
    finer = training_rows(load_params("params/smoke.yaml"), 32).batch([0, 0], [False, True])
    assert torch.equal(finer.label, batch.label)
    assert torch.allclose(finer.mask[0, 0], mask.reshape(32, 2, 32, 2).mean((1, 3)), atol=1e-6)
    assert torch.equal(finer.mask[1], finer.mask[0].flip(-1))


def test_labels_of_the_vae_are_encoded_in_full_precision_where_the_loss_is_computed(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    document["train"] |= {"label": "vae", "task_weight": 0.0}
    document["sample"]["clip_x_0"] = False
    params = validate_params(document)
    vae = load_vae("results/smoke/backbone/pipeline", None)
    data = training_rows(params, None, vae)
    batch = data.batch([0, 1], [False, False])
    assert batch.label.shape == (2, 1, 64, 64)
    latents = encode_masks(vae, batch.label)
    assert data.label_shape == latents.shape[1:]
    scheduler = make_scheduler(BETAS, params.train.prediction, params.train.zero_terminal_snr)
    objective, student, t = Objective("gs", params, scheduler.alphas_cumprod, vae), Toy(0.7), torch.tensor([5, 500])
    noise = torch.randn(2, *data.label_shape)
    with torch.autocast("cpu", torch.bfloat16):
        objective(student, batch, noise, t, None)
    [(asked, _)] = student.asked
    assert torch.equal(asked, noised(params.train.label_scale * latents, noise, objective.alphas_bar, t))


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
    objective.part = training_parts(objective.params.train, 100, "gs")[1]
    teacher = objective.teacher = Toy(0.5)
    student = Toy(0.7)
    x_t = noised((2 * batch.label - 1) * objective.params.train.label_scale, noise, objective.alphas_bar, t)
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
    objective.part = training_parts(objective.params.train, 100, "gs")[1]
    student = Toy(0.7)
    losses = objective(student, batch, noise, t, None)
    [(asked, when)] = student.asked
    assert torch.equal(asked, noise)
    assert when.tolist() == [999, 999, 999]
    scale = objective.params.train.label_scale
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
    train = toy_objective(steps=1000, stages=[DISTIL, TASK])[0].params.train
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
