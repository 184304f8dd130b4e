"""Training label diffusion (GS, section 3) and its discriminative control: the same U-Net, inputs, data and budget.

Every random choice of a step derives from (seed, step), so a run that is cut and resumed takes the same steps, and the
micro-batch or the number of workers change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from genseg.artifacts.files import atomic_directory, file_sha256
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import hash_unit, read_phrases, row_mask
from genseg.artifacts.resample import area_reduce
from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.objectives import diffusion_loss, discriminative_loss, estimate_x_0, noised, target, task_loss
from genseg.diffusion.pipeline import DISCRIMINATIVE_TIMESTEP, GSPipeline
from genseg.diffusion.schedule import make_scheduler
from genseg.latents import Texts, image_store, text_store
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.backbone import load_text_encoders, load_unet, load_vae
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.text import TextEmbedding
from genseg.models.unet import label_unet, run_unet
from genseg.params import Optimizer, Params, Train, digest
from genseg.training.loop import TrainLog, check_finite, load_checkpoint, lr_factor, save_checkpoint, step_generator, step_rng

Kind = Literal["gs", "discriminative"]
FOLDERS: dict[str, str] = {"gs": "model", "discriminative": "control"}
CODE = ("params.py", "artifacts", "latents.py", "models", "diffusion", "training/gs.py", "training/loop.py")
BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
"""Timestep bands of the validation loss, half-open."""
LOG_COLUMNS = ("step", "loss", "lr", *(f"val_t{low}_{high - 1}" for low, high in BANDS), "val_loss")


class Networks(nn.Module):
    """The trained parts: label U-Net and text adapter."""

    def __init__(self, unet: UNet2DConditionModel, adapter: TextAdapter) -> None:
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(
        self,
        x_t: torch.Tensor,
        image_latents: torch.Tensor,
        t: torch.Tensor,
        texts: list[TextEmbedding],
        drop: torch.Tensor | None,
        size: int,
    ) -> torch.Tensor:
        return run_unet(self.unet, x_t, image_latents, t, self.adapter(texts, drop), (size, size))


@dataclass
class Batch:
    """image [B, 4, h, w]; label: soft mask [B, 1, h, w] in [0, 1]; texts: B embeddings."""

    image: torch.Tensor
    label: torch.Tensor
    texts: list[TextEmbedding]


class PhraseData:
    """Training rows: image latents from the store, labels reduced from the masks' codes, text from the store."""

    def __init__(self, rows: pd.DataFrame, images: LatentStore, texts: Texts, device: torch.device) -> None:
        self.rows, self.images, self.texts, self.device = rows.reset_index(drop=True), images, texts, device
        self._image_cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int], mirrored: list[bool]) -> Batch:
        """Rows `indices`; where `mirrored`, image latent and label are flipped left to right (the flip of a latent is
        nearly the latent of the flip: a convolutional VAE has no preferred side)."""
        images, labels, texts = [], [], []
        for index, mirror in zip(indices, mirrored, strict=True):
            row = self.rows.iloc[index]
            image = self.images[row["image_id"]]["latent"].float()
            label = torch.from_numpy(area_reduce(row_mask(row), *image.shape[-2:]))[None]
            images.append(image.flip(-1) if mirror else image)
            labels.append(label.flip(-1) if mirror else label)
            texts.append(self.texts[row["phrase"]])
        return Batch(torch.stack(images).to(self.device), torch.stack(labels).to(self.device), texts)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the rows in an epoch."""
    return np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count)


def step_indices(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Rows of the global batch of `step`: the epochs' orders, one after the other."""
    orders: dict[int, np.ndarray] = {}
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, count)
        found.append(int(orders[epoch][place]))
    return found


def total_steps(train: Train, rows: int) -> int:
    return train.steps or math.ceil((train.epochs or 0) * rows / train.batch)


def build_networks(study: Params, source: str, revision: str | None, empty: TextEmbedding) -> Networks:
    """Label U-Net and adapter as they are before the first step (fp32 master weights)."""
    torch.manual_seed(derive_seed(study.seed, "networks") % 2**31)
    unet = label_unet(load_unet(source, revision), study.train.image_columns)
    adapter = TextAdapter(
        token_width=empty.tokens.shape[-1],
        pooled_width=empty.pooled.shape[-1],
        widths=tuple(self_attention_widths(unet)) if study.train.inject == "all" else (),
        text=study.train.text,
        null_tokens=len(empty.tokens) if study.train.text == "tokens" else 1,
    )
    adapter.start_nulls_from(empty)
    networks = Networks(unet, adapter).requires_grad_(True).train()
    if study.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return networks


def parameter_groups(networks: Networks, optimizer: Optimizer) -> list[dict[str, Any]]:
    """One group as the paper, or two: pretrained weights, and new layers (conv_in, conv_out, adapter, nulls) with `lr_new`."""
    if optimizer.lr_new is None:
        return [{"params": list(networks.parameters()), "lr": optimizer.lr, "base_lr": optimizer.lr}]
    new_ids = {
        id(p) for module in (networks.unet.conv_in, networks.unet.conv_out, networks.adapter) for p in module.parameters()
    }
    old = [parameter for parameter in networks.parameters() if id(parameter) not in new_ids]
    new = [parameter for parameter in networks.parameters() if id(parameter) in new_ids]
    return [
        {"params": old, "lr": optimizer.lr, "base_lr": optimizer.lr},
        {"params": new, "lr": optimizer.lr_new, "base_lr": optimizer.lr_new},
    ]


def make_optimizer(networks: Networks, optimizer: Optimizer) -> torch.optim.Optimizer:
    cls = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
    return cls(parameter_groups(networks, optimizer), betas=optimizer.betas, weight_decay=optimizer.weight_decay)


class Objective:
    """Loss per sample of either kind of model, for given noise and timesteps."""

    def __init__(self, kind: Kind, study: Params, alphas_bar: torch.Tensor) -> None:
        self.kind, self.study, self.alphas_bar = kind, study, alphas_bar

    def __call__(
        self, networks: Networks, batch: Batch, noise: torch.Tensor, t: torch.Tensor, drop: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss [B]. noise: [B, 1, h, w]; t: [B]; drop: [B] bool. The control ignores noise and t and drops no text."""
        train = self.study.train
        if self.kind == "discriminative":
            last = torch.full_like(t, DISCRIMINATIVE_TIMESTEP)
            output = networks(torch.zeros_like(batch.label), batch.image, last, batch.texts, None, train.size)
            return discriminative_loss(output, batch.label)
        x_0 = (2 * batch.label - 1) * train.label_scale
        x_t = noised(x_0, noise, self.alphas_bar, t)
        output = networks(x_t, batch.image, t, batch.texts, drop, train.size)
        scale = train.label_scale
        losses = diffusion_loss(output, target(train.prediction, x_0, noise, self.alphas_bar, t, scale))
        if train.task_weight:
            estimate = estimate_x_0(train.prediction, output.float(), x_t, self.alphas_bar, t, scale)
            losses = losses + train.task_weight * task_loss(estimate, batch.label, scale)
        return losses


def train_model(study: Params, kind: Kind) -> None:
    """Train and save `results/<study>/model` (or `control`), with `log.csv` and, last, its manifest.

    Checkpoints lie in `work/<study>/train/<hash of everything the result depends on>/`; a run that finds some there goes
    on from the newest and ends with the same weights as an uncut run.

    Raises:
        UserError: latents or backbone are missing or of other data, the loss is not finite, the disk is full, no GPU for
            `device: cuda`.
    """
    started = time.time()
    train = study.train
    device = choose_device(study.device, study.resources["train"].threads)
    print(f"train {kind}: device {describe(device)}, precision {train.precision}", flush=True)
    backbone = read_manifest(study.results_dir / "backbone" / "manifest.json")
    phrases = read_phrases(study.data_dir / "phrases.parquet")
    texts = Texts(text_store(study), device)
    images = LatentStore(image_store(study, train.size))
    data = PhraseData(phrases[phrases["split"] == "train"], images, texts, device)
    val = PhraseData(_validation_rows(phrases, train.validate_phrases, study.seed), images, texts, device)
    prediction = train.prediction if kind == "gs" else "logits"
    scheduler = make_scheduler(backbone["betas"], train.prediction, train.zero_terminal_snr)
    objective = Objective(kind, study, scheduler.alphas_cumprod.to(device))

    networks = build_networks(study, backbone["pipeline"], backbone["revision"], texts[""]).to(device)
    optimizer = make_optimizer(networks, train.optimizer)
    averaged = copy.deepcopy(networks).requires_grad_(False) if train.ema else networks
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    steps = total_steps(train, len(data))
    key = digest([kind, study.subtree("seed", "train", "latents"), backbone["weights"], code_hash(*CODE), _data_hash(study)])
    work = study.work_dir / "train" / f"{kind}-{key}"
    start = _resume(work, networks, averaged, optimizer, scaler)
    log = TrainLog(work / "log.csv", LOG_COLUMNS, start, f"train {kind}")
    print(f"train {kind}: {len(data)} phrases, {steps} steps of {train.batch}, from step {start}", flush=True)

    waited, since = 0.0, time.monotonic()
    for step in range(start, steps):
        factor = lr_factor(step, steps, train.optimizer.warmup_steps, train.optimizer.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, wait = _take_step(step, study, data, networks, objective, optimizer, scaler, device)
        waited += wait
        if averaged is not networks:
            _average(averaged, networks, min(train.ema or 0.0, (step + 1) / (step + 10)))
        done = step + 1
        validate = done % train.validate_every == 0 or done == steps
        if done % train.log_every == 0 or validate:
            seconds = time.monotonic() - since
            row: dict[str, Any] = {"step": done, "loss": f"{loss:.6f}", "lr": f"{optimizer.param_groups[0]['lr']:.3e}"}
            if validate:
                row |= _validate(objective, averaged, val, study, device)
            log.write(row, _timing(done, start, steps, seconds, waited, train.batch, device))
        if done % train.checkpoint_every == 0 or done == steps:
            state = {"networks": networks.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            if averaged is not networks:
                state["averaged"] = averaged.state_dict()
            save_checkpoint(work, done, state)

    folder = study.results_dir / FOLDERS[kind]
    _save(study, averaged, scheduler, prediction, backbone, folder)
    (folder / "log.csv").write_bytes((work / "log.csv").read_bytes())
    write_manifest(
        folder / "manifest.json",
        "train",
        study.subtree("seed", "train", "latents"),
        [study.data_dir / "phrases.parquet", study.results_dir / "backbone" / "manifest.json"],
        [folder],
        started,
        describe(device),
        code=code_hash(*CODE),
        kind=kind,
        steps=steps,
        samples=steps * train.batch,
        parameters=sum(parameter.numel() for parameter in networks.parameters()),
        weights=digest([file_sha256(path) for path in sorted(folder.glob("*/*.safetensors"))]),
    )
    print(f"train {kind}: saved {folder}", flush=True)


def _take_step(
    step: int,
    study: Params,
    data: PhraseData,
    networks: Networks,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> tuple[float, float]:
    """One optimiser step over the global batch, in micro-batches. Returns (mean loss, seconds waited for data)."""
    train = study.train
    rng, generator = step_rng(study.seed, "step", step), step_generator(study.seed, "noise", step)
    indices = step_indices(study.seed, step, train.batch, len(data))
    mirrored = [train.flip and rng.random() < 0.5 for _ in indices]
    drop = torch.tensor([rng.random() < train.p_drop for _ in indices])
    t = torch.randint(0, len(objective.alphas_bar), (len(indices),), generator=generator)
    total, waited = 0.0, 0.0
    optimizer.zero_grad(set_to_none=True)
    for low in range(0, train.batch, train.micro_batch):
        part = slice(low, low + train.micro_batch)
        begun = time.monotonic()
        batch = data.batch(indices[part], mirrored[part])
        waited += time.monotonic() - begun
        noise = torch.randn(batch.label.shape, generator=generator).to(device)
        with _autocast(train, device):
            losses = objective(networks, batch, noise, t[part].to(device), drop[part].to(device))
        loss = losses.sum() / train.batch
        check_finite(loss, step)
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    if train.optimizer.gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(networks.parameters(), train.optimizer.gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    return total, waited


def _autocast(train: Train, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision: fp32 master weights, arithmetic in `train.precision`."""
    if train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[train.precision])


@torch.no_grad()
def _average(averaged: Networks, networks: Networks, decay: float) -> None:
    for mean, parameter in zip(averaged.parameters(), networks.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def _validation_rows(phrases: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """A fixed choice of validation phrases, by hash."""
    val = phrases[phrases["split"] == "val"]
    keys = list(zip(val["narrative_id"], val["phrase_id"], strict=True))
    order = sorted(range(len(val)), key=lambda i: hash_unit(seed, "validate", *keys[i]))
    return val.iloc[sorted(order[:count])]


@torch.no_grad()
def _validate(objective: Objective, networks: Networks, val: PhraseData, study: Params, device: torch.device) -> dict[str, str]:
    """Mean validation loss per timestep band (of the averaged weights), each phrase at one fixed t and noise a band."""
    networks.eval()
    train = study.train
    found: dict[str, str] = {}
    means = []
    bands = BANDS if objective.kind == "gs" else BANDS[-1:]
    for low, high in bands:
        losses = []
        for part in _blocks(len(val), train.micro_batch):
            batch = val.batch(part, [False] * len(part))
            draws = [step_generator(study.seed, "validation", low, index) for index in part]
            t = torch.cat([torch.randint(low, high, (1,), generator=draw) for draw in draws])
            noise = torch.stack([torch.randn(batch.label.shape[1:], generator=draw) for draw in draws])
            with _autocast(train, device):
                losses.append(objective(networks, batch, noise.to(device), t.to(device), None))
        means.append(torch.cat(losses).mean().item())
        if objective.kind == "gs":
            found[f"val_t{low}_{high - 1}"] = f"{means[-1]:.6f}"
    networks.train()
    return found | {"val_loss": f"{sum(means) / len(means):.6f}"}


def _blocks(count: int, size: int) -> Iterator[list[int]]:
    for low in range(0, count, size):
        yield list(range(low, min(low + size, count)))


def _timing(done: int, start: int, steps: int, seconds: float, waited: float, batch: int, device: torch.device) -> str:
    rate = (done - start) * batch / seconds
    left = (steps - done) * seconds / (done - start)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return f"| {rate:.1f} samples/s, data wait {100 * waited / seconds:.1f} %, {left / 60:.1f} min left{memory}"


def _data_hash(study: Params) -> str:
    return file_sha256(study.data_dir / "phrases.parquet")


def _resume(
    work: Path, networks: Networks, averaged: Networks, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> int:
    checkpoint = load_checkpoint(work)
    if checkpoint is None:
        return 0
    networks.load_state_dict(checkpoint["networks"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if averaged is not networks:
        averaged.load_state_dict(checkpoint["averaged"])
    return checkpoint["step"]


def _save(study: Params, networks: Networks, scheduler: Any, prediction: str, backbone: dict[str, Any], folder: Path) -> None:
    """Write the pipeline: trained U-Net and adapter, the backbone's VAE and text encoders."""
    source, revision = backbone["pipeline"], backbone["revision"]
    encoders = load_text_encoders(source, revision)
    pipeline = GSPipeline(
        vae=load_vae(source, revision),
        text_encoder=encoders.models[0],
        text_encoder_2=encoders.models[1],
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        unet=networks.unet.cpu().eval(),
        adapter=networks.adapter.cpu().eval(),
        scheduler=scheduler,
        prediction=prediction,
        label_scale=study.train.label_scale,
        image_size=study.train.size,
        # The paper's operating point needs its 100 evaluations; a usable estimate in the first step needs few.
        **({"steps": 50, "guidance": 7.5} if prediction == "noise" else {"steps": 4, "guidance": 2.0}),
    )
    with atomic_directory(folder) as temporary:
        pipeline.save_pretrained(temporary)
