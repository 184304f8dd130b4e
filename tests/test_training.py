"""Training: exact resume after kill -9, independence from micro-batches and processes, losses, trained weights, the log."""

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
from genseg.diffusion.objectives import add_noise, make_scheduler, mask_loss
from genseg.diffusion.pipeline import load_pipeline
from genseg.latents import Texts, image_store, text_store
from genseg.models.backbone import load_vae
from genseg.models.vae import encode_masks
from genseg.params import load_params, validate_params
from genseg.params.train import Optimizer, Stage, Train
from genseg.training.data import AHEAD, Batch, MicroBatch, PhraseData, draw_timesteps, micro_batches, prefetched, step_indices
from genseg.training.distributed import Ranks
from genseg.training.log import Meter
from genseg.training.losses import DiffusionLoss, DistillationLoss, MaskLoss
from genseg.training.networks import Networks, build_networks, parameter_groups, sample_flops
from genseg.training.stages import stage_spans, total_steps
from genseg.training.steps import load_checkpoint, lr_factor, save_checkpoint

TRAIN = load_params(Path(__file__).resolve().parents[1] / "params/smoke.yaml").train

MODEL = "results/smoke/model/gs"
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v
        for part in ("unet", "adapter")
        for k, v in load_file(next((folder / part).glob("*.safetensors"))).items()
    }


def variant(study: Path, name: str, **changes) -> str:
    """Write a params file of the finished study with other values, and return its path relative to the study."""
    document = yaml.safe_load((study / "params/smoke.yaml").read_text())
    for key, value in changes.items():
        node = document
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (study / f"params/{name}.yaml").write_text(yaml.safe_dump(document))
    return f"params/{name}.yaml"


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 40))
def test_every_row_is_seen_once_per_epoch_for_any_batch_size(seed, batch, count):
    steps = -(-count // batch)
    seen = [index for step in range(steps) for index in step_indices(seed, step, batch, count)][:count]
    assert Counter(seen) == Counter(range(count))


def test_learning_rate_warms_up_and_decays():
    values = [lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert values[0] == pytest.approx(1 / 11, rel=1e-3)
    assert max(values) == pytest.approx(values[10], rel=0.05)
    assert values[-1] < 0.001
    assert lr_factor(99, 100, 0, "constant") == 1


class Rows:
    """Training rows whose image is their index."""

    label_shape = (1, 4, 4)

    def __len__(self):
        return 23

    def batch(self, indices, mirrored):
        return Batch(torch.tensor(indices), torch.tensor(mirrored), [])


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 12))
def test_step_is_the_same_for_any_number_of_processes_and_micro_batch(seed, step, processes, micro_batch):
    """Processes and micro-batches divide the global batch; the random numbers of each position stay the same."""
    train = TRAIN.model_copy(update={"batch": 12, "flip": True, "cond_drop_prob": 0.5, "terminal_timestep_prob": 0.25})
    [whole] = micro_batches(Rows(), train.model_copy(update={"micro_batch": 12}), 1000, seed, range(12), step)
    cut = train.model_copy(update={"micro_batch": micro_batch})
    shares = [Ranks(rank, processes, torch.device("cpu")).positions(12) for rank in range(processes)]
    parts = [part for share in shares for part in micro_batches(Rows(), cut, 1000, seed, share, step)]
    assert all(len(part.t) <= micro_batch for part in parts)
    for name in ("noise", "t", "drop"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.batch.image for part in parts]), whole.batch.image)
    assert torch.equal(torch.cat([part.batch.label for part in parts]), whole.batch.label)


def test_every_sample_of_the_warmup_is_at_the_last_timestep():
    train = TRAIN.model_copy(update={"batch": 12, "micro_batch": 12, "steps": 10, "terminal_warmup": 0.3})
    for prob in (0.0, 1.0):
        train = train.model_copy(update={"terminal_timestep_prob": prob})
        steps = [micro_batches(Rows(), train, 1000, 0, range(12), step)[0].t for step in range(10)]
        assert [step for step, t in enumerate(steps) if (t == 999).all()] == list(range(10 if prob else 3))


def test_data_are_prepared_ahead_in_order_and_errors_are_raised():
    prepared = []

    def make(step):
        prepared.append(step)
        if step == 8:
            raise KeyError("row 8")
        return step

    stream = prefetched(make, range(3, 12))
    assert next(stream) == 3
    deadline = time.time() + 20
    while prepared != [3, 4, 5] and time.time() < deadline:
        time.sleep(0.01)
    assert prepared == list(range(3, 4 + AHEAD)), "the whole epoch is not prepared at once"
    assert [next(stream) for _ in range(4)] == [4, 5, 6, 7]
    with pytest.raises(KeyError, match="row 8"):
        next(stream)


def test_truncated_checkpoint_is_skipped(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})
    save_checkpoint(tmp_path, 2, {"x": torch.zeros(3)})
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "unreadable" in capsys.readouterr().out


def model_files(study: Path) -> dict[str, bytes]:
    """Return all files of the model except its manifest, which holds params."""
    folder = study / MODEL
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_killed_training_ends_with_the_same_bytes(study_copy, monkeypatch):
    """After kill -9 at a random step (before, at or between checkpoints), a second run ends with the same model files and log
    as an uninterrupted run."""
    expected = model_files(study_copy)
    shutil.rmtree(study_copy / MODEL)
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
    assert not (study_copy / MODEL).exists(), f"killed at step {kill_at}, before the end"
    monkeypatch.chdir(study_copy)
    assert main(["train", "--params", params]) == 0
    files = model_files(study_copy)
    assert files.keys() == expected.keys()
    differing = {name for name in expected if files[name] != expected[name]}
    assert differing == {"log.csv"}, f"killed at step {kill_at}"
    assert logged(study_copy) == list(range(1, 9)), "no step is missing or logged twice"
    rows = list(csv.DictReader(expected["log.csv"].decode().splitlines()))
    with open(next((study_copy / "work/smoke/train").glob("*/log.csv")), newline="") as handle:
        assert [row for row in csv.DictReader(handle) if int(row["step"]) % 2 == 0] == rows
    for name in ("loss", "samples_per_s", "data_wait_percent", "memory_gib"):
        curve = next((study_copy / "work/smoke/train").glob(f"*/curves/plots/metrics/{name}.tsv")).read_text().splitlines()[1:]
        assert [int(line.split("\t")[0]) for line in curve] == list(range(1, 9)), name


def logged(study: Path) -> list[int]:
    """Return the steps in the log of the only training run in `work`."""
    for path in (study / "work/smoke/train").glob("*/log.csv"):
        return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:] if line.count(",") == 7]
    return []


def test_non_finite_loss_stops_training_before_a_checkpoint(study_copy, monkeypatch, capsys):
    shutil.rmtree(study_copy / MODEL)
    shutil.rmtree(study_copy / "work/smoke/train")
    monkeypatch.chdir(study_copy)
    diverging = {"train__optimizer__lr": 1e30, "train__optimizer__warmup_steps": 0, "train__ema": None}
    assert main(["train", "--params", variant(study_copy, "diverging", train__checkpoint_every=1, **diverging)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("genseg train: error: step 1: the ")
    assert "the last checkpoint is valid" in line
    assert not (study_copy / MODEL).exists()
    [work] = (study_copy / "work/smoke/train").iterdir()
    assert load_checkpoint(work)["step"] == 1
    assert all(torch.isfinite(value).all() for value in load_checkpoint(work)["networks"].values())


DISTIL = {"objective": "distill", "steps": 2, "lr_factor": 0.5, "guidance_scale": 3.0}
MASK_LOSS = {"objective": "mask_loss", "steps": 2, "lr_factor": 0.5}
FEW_STEPS = {
    "train__steps": 2,
    "train__stages": [DISTIL],
    "train__checkpoint_every": 3,
    "train__validate_every": 1,
    "train__optimizer__warmup_steps": 0,
}


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_processes_train_like_one(study_copy, monkeypatch, parallelism):
    """`genseg train` starts two processes because two GPUs seem visible; they run on the CPU.

    Tolerance: gradients agree up to the rounding of sums in another order (1e-7 to 1e-6 of their norm). But AdamW's first
    steps are lr * sign(gradient), and the sign of a gradient that is zero up to rounding (of a bias before a group norm) is
    random. So single weights may differ by 2 lr per step, and the mean difference must be small: 1e-3 of the mean movement.
    """
    monkeypatch.chdir(study_copy)
    start = weights_at_start(study_copy)
    assert main(["train", "--params", variant(study_copy, "one", **FEW_STEPS)]) == 0
    one = weights(study_copy / MODEL)
    # Use other micro-batches than the one process (2 + 2 and 2 + 2 instead of 4 + 4), because otherwise DDP's sum is bit-equal.
    changes = FEW_STEPS | {"train__parallelism": parallelism, "train__micro_batch": 2, "resources__train__gpu": 2}
    params = variant(study_copy, "two", **changes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "--params", params]) == 0
    two = weights(study_copy / MODEL)
    moved = torch.cat([(one[name] - start[name]).abs().flatten() for name in one]).mean()
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean()
    assert moved > 1e-5
    assert apart < 1e-3 * moved
    if parallelism == "fsdp":  # whole tensors are saved and sharded again: a run cut in the stage ends with the same bytes
        expected = model_files(study_copy)
        newest = max((study_copy / "work/smoke/train").glob("*/step-0000004.pt"), key=lambda path: path.stat().st_mtime)
        newest.unlink()
        (study_copy / MODEL / "model_index.json").unlink()  # the model is incomplete
        assert main(["train", "--params", params]) == 0
        assert newest.exists()
        assert model_files(study_copy) == expected


def test_error_of_all_processes_is_reported_in_one_line(finished_study, monkeypatch, capfd, tmp_path):
    document = yaml.safe_load((finished_study / "params/smoke.yaml").read_text())
    document["resources"]["train"]["gpu"] = 2
    document["train"] |= {"batch": 9, "micro_batch": 9}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(finished_study)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert main(["train", "--params", str(tmp_path / "odd.yaml")]) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line == ("genseg train: error: train.batch (9) must be divisible by the number of processes (2)")


def test_flops_equal_the_sum_over_layers(finished_study, monkeypatch):
    """The reference counts two FLOPs per multiply-add of every linear layer, convolution and attention product."""
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
    first, distilled = stage_spans(params.train.model_copy(update={"stages": [Stage(**DISTIL)]}), 100, "gs")
    train = params.train
    own = train.self_estimate_prob * (1 - train.terminal_warmup) * (1 - train.terminal_timestep_prob)
    assert sample_flops(networks, data, params.train, first) == pytest.approx((3 + own) * sum(counted))
    assert sample_flops(networks, data, params.train, distilled) == 5 * sum(counted), "two forward passes of the teacher"


def test_meter_measures_speed_and_memory(monkeypatch):
    clock = iter([12.0, 15.0])  # end times of two steps that begin at 10 and 13
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    meter = Meter(torch.device("cuda", 1), processes=2, flops=78e12)
    meter.add(16, 10.0, 0.5)
    meter.add(16, 13.0, 0.5)
    assert meter.read() == {
        "samples_per_s": 8.0,
        "data_wait_percent": 25.0,
        "memory_gib": 1.5,
        "tflops": 312.0,  # 8 samples/s with 78 TFLOP each, in two processes
        "mfu_percent": 100.0,
    }


def test_micro_batches_change_rounding_only(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    before = weights(study_copy / MODEL)
    params = variant(study_copy, "whole", train__micro_batch=8)
    assert main(["train", "--params", params]) == 0
    after = weights(study_copy / MODEL)
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


def test_all_weights_are_trained_and_new_layers_have_their_own_learning_rate(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    start, end = weights_at_start(finished_study), weights(finished_study / MODEL)
    unchanged = [name for name in start if torch.equal(start[name], end[name])]
    assert not unchanged
    params = load_params("params/smoke.yaml")
    pipeline = load_pipeline(MODEL)
    networks = Networks(pipeline.unet, pipeline.adapter)
    groups = parameter_groups(networks, params.train.optimizer)
    assert [group["lr"] for group in groups] == [params.train.optimizer.lr, params.train.optimizer.lr_new]
    new = {id(parameter) for parameter in groups[1]["params"]}
    assert {id(p) for p in networks.adapter.parameters()} <= new
    assert {id(p) for p in pipeline.unet.conv_in.parameters()} <= new
    assert sum(len(group["params"]) for group in groups) == len(list(networks.parameters()))
    one = Optimizer.model_validate(params.train.optimizer.model_dump() | {"lr_new": None})
    assert len(parameter_groups(networks, one)) == 1, "the paper has one parameter group"


def test_log_has_the_validation_loss_of_each_timestep_band(finished_study):
    with open(finished_study / MODEL / "log.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    last = rows[-1]
    assert int(last["step"]) == 8
    bands = [float(last[name]) for name in ("val_t0_249", "val_t250_499", "val_t500_749", "val_t750_999")]
    assert float(last["val_loss"]) == pytest.approx(sum(bands) / 4, rel=1e-4)


def training_rows(params, vae=None) -> PhraseData:
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    texts, images = Texts(text_store(params), torch.device("cpu")), LatentStore(image_store(params, params.train.size))
    return PhraseData(phrases[phrases["split"] == "train"], images, texts, vae)


def test_labels_are_area_reduced_masks_and_are_mirrored_with_the_image(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    data = training_rows(load_params("params/smoke.yaml"))
    batch = data.batch([0, 0], [False, True])
    mask = torch.from_numpy(row_mask(data.rows.iloc[0])).float()
    assert torch.allclose(batch.label[0, 0], mask.reshape(16, 4, 16, 4).mean((1, 3)), atol=1e-6)
    assert torch.equal(batch.label[1], batch.label[0].flip(-1))
    assert torch.equal(batch.image[1], batch.image[0].flip(-1))
    assert data.label_shape == batch.label.shape[1:]


def test_loss_encodes_vae_labels_in_full_precision(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    document["train"] |= {"label": "vae", "mask_loss_weight": 0.0}
    document["sample"]["clip_sample"] = False
    params = validate_params(document)
    vae = load_vae("results/smoke/backbone/pipeline", None)
    data = training_rows(params, vae)
    batch = data.batch([0, 1], [False, False])
    assert batch.label.shape == (2, 1, 64, 64)
    latents = encode_masks(vae, batch.label)
    assert data.label_shape == latents.shape[1:]
    scheduler = make_scheduler(BETAS, params.train.prediction_type, params.train.zero_terminal_snr)
    alphas_bar, student, t = scheduler.alphas_cumprod, ToyNetworks(0.7), torch.tensor([5, 500])
    noise = torch.randn(2, *data.label_shape)
    with torch.autocast("cpu", torch.bfloat16):
        DiffusionLoss(params.train, alphas_bar, vae)(student, MicroBatch(batch, noise, t, None))
    [(x_t, _)] = student.inputs
    assert torch.equal(x_t, add_noise(params.train.label_scale * latents, noise, alphas_bar, t))


def test_epochs_are_converted_to_steps():
    train = Train(steps=None, epochs=3, batch=16)
    assert total_steps(train, 100) == 19


OTHER_PARAMS = {
    "noise prediction, no injection": {
        "train__prediction_type": "epsilon",
        "train__self_estimate_prob": 0.0,
        "train__zero_terminal_snr": False,
        "train__mask_loss_weight": 0.0,
        "train__token_injection": False,
    },
    "v prediction, pooled text, one parameter group": {
        "train__prediction_type": "v_prediction",
        "train__text": "pooled",
        "train__conv_in_init": "latent",
        "train__ema": None,
        "train__precision": "bf16",
        "train__gradient_checkpointing": True,
        "train__optimizer__lr_new": None,
        "train__optimizer__name": "adam",
    },
    "VAE labels, distilled": {
        "train__label": "vae",
        "train__mask_loss_weight": 0.0,
        "train__terminal_timestep_prob": 0.5,
        "train__stages": [DISTIL],
        "sample__clip_sample": False,
    },
}


class ToyNetworks(torch.nn.Module):
    """Replaces `Networks`: a simple function of every input, which also records its inputs."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x_t, image, t, texts, drop, size):
        self.inputs.append((x_t, t))
        text = torch.zeros(len(t)) if drop is None else drop.float()
        return self.gain * x_t + image.mean(1, keepdim=True) - 0.3 * text[:, None, None, None] + t[:, None, None, None] / 1000


def toy_batch(train: Train) -> tuple[torch.Tensor, Batch, torch.Tensor, torch.Tensor]:
    """Return alphas_bar, a batch of three samples, their noise and their timesteps."""
    generator = torch.Generator().manual_seed(0)
    scheduler = make_scheduler(BETAS, train.prediction_type, train.zero_terminal_snr)
    mask = (torch.rand(3, 1, 8, 8, generator=generator) > 0.5).float()
    image, noise = (torch.randn(3, channels, 4, 4, generator=generator) for channels in (4, 1))
    batch = Batch(image, torch.nn.functional.avg_pool2d(mask, 2), [])
    return scheduler.alphas_cumprod, batch, noise, torch.tensor([5, 500, 999])


def test_distillation_fits_the_guided_output_in_one_forward_pass():
    train = Train()
    alphas_bar, batch, noise, t = toy_batch(train)
    teacher, student = ToyNetworks(0.5), ToyNetworks(0.7)
    x_t = add_noise((2 * batch.label - 1) * train.label_scale, noise, alphas_bar, t)
    unconditional = teacher(x_t, batch.image, t, [], torch.ones(3), 128)
    conditional = teacher(x_t, batch.image, t, [], None, 128)
    guided = unconditional + 3.0 * (conditional - unconditional)  # Eq. 10
    output = student(x_t, batch.image, t, [], None, 128)
    loss = DistillationLoss(teacher, 3.0, train, alphas_bar)
    losses = loss(student, MicroBatch(batch, noise, t, torch.ones(3, dtype=torch.bool)))
    assert torch.allclose(losses, (output - guided).square().mean((1, 2, 3)), atol=1e-5)
    losses.sum().backward()
    assert student.gain.grad is not None
    assert teacher.gain.grad is None, "the teacher is not trained"


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_x_t_of_a_self_estimated_row_is_the_noised_clipped_estimate_from_pure_noise(prediction_type):
    train = Train(prediction_type=prediction_type)
    alphas_bar, batch, noise, t = toy_batch(train)
    texts = Batch(batch.image, batch.label, [None] * 3)
    student = ToyNetworks(0.7)
    loss = DiffusionLoss(train, alphas_bar)
    loss(student, MicroBatch(texts, noise, t, None, torch.tensor([False, True, False]))).sum().backward()
    (first_input, first_t), (x_t, trained_t) = student.inputs
    assert torch.equal(first_input, noise[1:2]), "only the chosen row is evaluated twice"
    assert (first_t.tolist(), trained_t.tolist()) == ([999], t.tolist())
    with torch.no_grad():
        output = student(noise[1:2], batch.image[1:2], first_t, [], None, 128)
    # With zero terminal SNR, x_T is the noise, and v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 is -x_0.
    x_0 = train.label_scale * output if prediction_type == "sample" else -output
    clipped = x_0.clamp(-train.label_scale, train.label_scale)
    signal, sigma = alphas_bar[500].sqrt(), (1 - alphas_bar[500]).sqrt()
    assert torch.allclose(x_t[1], signal * clipped[0] + sigma * noise[1], atol=1e-6)
    true = add_noise((2 * batch.label - 1) * train.label_scale, noise, alphas_bar, t)
    assert torch.equal(x_t[[0, 2]], true[[0, 2]])
    assert student.gain.grad is not None


def test_rows_at_the_last_timestep_are_never_self_estimated(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    params = load_params("params/smoke.yaml")
    train = params.train.model_copy(update={"terminal_timestep_prob": 0.5, "self_estimate_prob": 1.0})
    for step in range(4):
        [*micros] = micro_batches(training_rows(params), train, 1000, 0, range(train.batch), step)
        for micro in micros:
            assert micro.self_estimated.tolist() == (micro.t < 999).tolist()


def test_mask_loss_evaluates_pure_noise_once():
    train = Train()
    alphas_bar, batch, noise, t = toy_batch(train)
    student = ToyNetworks(0.7)
    losses = MaskLoss(train, alphas_bar)(student, MicroBatch(batch, noise, t, None))
    [(x_t, last)] = student.inputs
    assert torch.equal(x_t, noise)
    assert last.tolist() == [999, 999, 999]
    scale = train.label_scale
    estimate = scale * student(noise, batch.image, last, [], None, 128)  # the default predicts x_0
    assert torch.allclose(losses, mask_loss(estimate, batch.label, scale))


@given(st.sampled_from([0.0, 0.25, 1.0]))
def test_last_timestep_is_drawn_with_its_probability(p_last):
    t = draw_timesteps(4000, 1000, p_last, torch.Generator().manual_seed(0))
    uniform = torch.randint(0, 1000, (4000,), generator=torch.Generator().manual_seed(0))
    last = t == 999
    assert torch.equal(t[~last], uniform[~last]), "the other timesteps are unchanged"
    assert last.float().mean().item() == pytest.approx(p_last + (1 - p_last) / 1000, abs=0.03)


def test_control_has_the_total_steps_of_all_stages():
    train = Train(steps=1000, stages=[DISTIL, MASK_LOSS])
    assert [(span.first, span.steps) for span in stage_spans(train, 100, "gs")] == [(0, 1000), (1000, 2), (1002, 2)]
    assert [(span.first, span.steps) for span in stage_spans(train, 100, "discriminative")] == [(0, 1004)]


def test_run_interrupted_in_a_stage_ends_with_the_same_weights(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    stages = [DISTIL | {"steps": 3}, MASK_LOSS | {"steps": 3}]
    params = variant(study_copy, "staged", train__steps=2, train__checkpoint_every=1, train__stages=stages)
    shutil.rmtree(study_copy / "work/smoke/train")
    saved, save = {}, save_checkpoint

    def keep(folder, step, state):
        save(folder, step, state)
        saved[step] = (folder, (folder / f"step-{step:07d}.pt").read_bytes())

    monkeypatch.setattr("genseg.training.state.save_checkpoint", keep)
    assert main(["train", "--params", params]) == 0
    expected = weights(study_copy / MODEL)
    assert sorted(saved) == list(range(1, 9))
    for cut in (2, 4, 6):  # at the beginning of the first stage, within the first, within the second
        folder, content = saved[cut]
        for later in folder.glob("step-*.pt"):
            later.unlink()
        (folder / f"step-{cut:07d}.pt").write_bytes(content)
        (study_copy / MODEL / "model_index.json").unlink()  # the model is incomplete
        assert main(["train", "--params", params]) == 0
        resumed = weights(study_copy / MODEL)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected), f"interrupted after step {cut}"


@pytest.mark.parametrize("changes", OTHER_PARAMS.values(), ids=OTHER_PARAMS)
def test_other_params_train_and_predict(study_copy, monkeypatch, changes):
    monkeypatch.chdir(study_copy)
    params = variant(study_copy, "other", train__steps=2, **changes)
    assert main(["train", "--params", params]) == 0
    stages = sum(stage["steps"] for stage in changes.get("train__stages", []))
    assert json.loads((study_copy / MODEL / "manifest.json").read_text())["steps"] == 2 + stages
    picture = next((study_copy / "data/smoke/scenes/val2017").glob("*.jpg"))
    out = study_copy / "out"
    assert main(["predict", str(picture), "--phrase", "the grass", "--model", MODEL, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"mask_0.png", "overlay.png", "predictions.json"}


def test_full_disk_is_reported_in_one_line_and_training_resumes_with_space(study_copy, monkeypatch, capsys):
    expected = weights(study_copy / MODEL)
    shutil.rmtree(study_copy / MODEL)
    disk = study_copy / "work/smoke/train"
    shutil.rmtree(disk)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted")
    try:
        monkeypatch.chdir(study_copy)
        assert main(["train", "--params", "params/smoke.yaml"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the disk is full" in error
        assert "work/smoke/train" in error
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert main(["train", "--params", "params/smoke.yaml"]) == 0
        resumed = weights(study_copy / MODEL)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    finally:
        subprocess.run(["umount", disk], check=True)
