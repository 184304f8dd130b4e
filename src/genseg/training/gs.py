"""Training label diffusion (GS, section 3) and its discriminative control: the same U-Net, inputs, data and budget.

Every random choice of a step derives from (seed, step), so a run that is cut and resumed takes the same steps, and the
micro-batch or the number of processes change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import nn

from genseg.artifacts.files import atomic_directory, atomic_path, file_sha256
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import hash_unit, read_phrases
from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.pipeline import GSPipeline
from genseg.diffusion.schedule import make_scheduler
from genseg.latents import Texts, image_store, text_store
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.backbone import load_text_encoders, load_unet, load_vae
from genseg.models.device import DTYPES, choose_device, describe, exactly
from genseg.models.flops import training_flops, unet_flops
from genseg.models.text import TextEmbedding
from genseg.models.unet import label_unet, run_unet
from genseg.params import Optimizer, Params, Train, digest
from genseg.training.data import MicroBatch, PhraseData, micro_batches, prefetched
from genseg.training.distributed import (
    Ranks,
    accumulating,
    join,
    load_whole_optimizer_state,
    load_whole_state,
    spread,
    whole_optimizer_state,
    whole_state,
)
from genseg.training.loop import Meter, TrainLog, check_finite, load_checkpoint, lr_factor, save_checkpoint, step_generator
from genseg.training.objective import Kind, Objective, Part, training_parts

FOLDERS: dict[str, str] = {"gs": "model", "discriminative": "control"}
FILES = ("data", "distributed", "gs", "loop", "objective")
CODE = ("params.py", "artifacts", "latents.py", "models", "diffusion", *(f"training/{file}.py" for file in FILES))
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
        output = run_unet(self.unet, x_t, image_latents, t, self.adapter(texts, drop), (size, size))
        if torch.is_grad_enabled() and dist.is_initialized():
            # Processes must agree on who has a gradient: a null that no row of this one used takes part with zero.
            output = output + 0 * sum(parameter.sum() for parameter in self.adapter.parameters())
        return output


def build_networks(
    params: Params, source: str, revision: str | None, empty: TextEmbedding, label_channels: int = 1
) -> Networks:
    """Label U-Net and adapter as they are before the first step (fp32 master weights)."""
    torch.manual_seed(derive_seed(params.seed, "networks") % 2**31)
    unet = label_unet(load_unet(source, revision), params.train.image_columns, label_channels)
    adapter = TextAdapter(
        token_width=empty.tokens.shape[-1],
        pooled_width=empty.pooled.shape[-1],
        widths=tuple(self_attention_widths(unet)) if params.train.inject == "all" else (),
        text=params.train.text,
        null_tokens=len(empty.tokens) if params.train.text == "tokens" else 1,
    )
    adapter.start_nulls_from(empty)
    networks = Networks(unet, adapter).requires_grad_(True).train()
    if params.train.gradient_checkpointing:
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
    return cls(parameter_groups(networks, optimizer), betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True)


def train_model(params: Params, kind: Kind) -> None:
    """Train and save `results/<study>/model` (or `control`), with `log.csv` and, last, its manifest.

    One process of one or, under `torchrun` or `accelerate launch`, of several. Checkpoints lie in
    `work/<study>/train/<hash of everything the result depends on>/`; a run that finds some there goes on from the newest
    and, with as many processes, ends with the same weights as an uncut run.

    Raises:
        UserError: latents or backbone are missing or of other data, the loss is not finite, the disk is full, no GPU for
            `device: cuda`, a batch that the processes cannot share.
    """
    with join(choose_device(params.device, params.resources["train"].threads, exact=True)) as ranks:
        _train(params, kind, ranks)


def _train(params: Params, kind: Kind, ranks: Ranks) -> None:
    started = time.time()
    train, device, first = params.train, ranks.device, ranks.rank == 0
    places = ranks.places(train.batch)
    name = describe(device) + (f" x {ranks.size}, {train.sharding}" if ranks.size > 1 else "")
    if first:
        print(f"train {kind}: device {name}, precision {train.precision}", flush=True)
    backbone = read_manifest(params.results_dir / "backbone" / "manifest.json")
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    texts = Texts(text_store(params), torch.device("cpu"))
    images = LatentStore(image_store(params, train.size))
    vae = None
    if kind == "gs" and train.label == "vae":
        vae = load_vae(backbone["pipeline"], backbone["revision"]).to(device)
    data = PhraseData(phrases[phrases["split"] == "train"], images, texts, train.task_size, vae)
    val = PhraseData(_validation_rows(phrases, train.validate_phrases, params.seed), images, texts, train.task_size, vae)
    prediction = train.prediction if kind == "gs" else "logits"
    bounded = train.label == "mask" and train.prediction != "noise"  # as the default operating points take it; see `_save`
    scheduler = make_scheduler(
        backbone["betas"], train.prediction, train.zero_terminal_snr, clip=train.label_scale if bounded else None
    )
    objective = Objective(kind, params, scheduler.alphas_cumprod.to(device), vae)

    def fresh() -> Networks:
        return build_networks(params, backbone["pipeline"], backbone["revision"], texts[""], data.label_shape[0])

    networks = fresh()
    averaged = copy.deepcopy(networks).requires_grad_(False) if train.ema else networks
    meter = Meter(device, ranks.size)
    model = spread(networks, ranks, train.sharding)
    if averaged is not networks:
        spread(averaged, ranks, train.sharding)
    optimizer = make_optimizer(networks, train.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    parts = training_parts(train, len(data), kind)
    steps = parts[-1].first + parts[-1].steps
    key = digest([kind, params.subtree("seed", "train", "latents"), backbone["weights"], code_hash(*CODE), _data_hash(params)])
    work = params.work_dir / "train" / f"{kind}-{key}"
    start = _resume(work, networks, averaged, optimizer, scaler)
    if first:
        log = TrainLog(work / "log.csv", LOG_COLUMNS, start, f"train {kind}")
        print(f"train {kind}: {len(data)} phrases, {steps} steps of {train.batch}, from step {start}", flush=True)

    since = time.monotonic()
    stream = prefetched(
        lambda step: micro_batches(data, train, objective.timesteps, params.seed, step, places), range(start, steps)
    )
    for step in range(start, steps):
        part = next(part for part in reversed(parts) if part.first <= step)
        if part is not objective.part:
            _enter(part, step, objective, networks, averaged, fresh, optimizer, ranks, train, work)
            meter.flops = sample_flops(networks, data, train, part) if device.type == "cuda" else 0.0
        factor = lr_factor(step - part.first, part.steps, train.optimizer.warmup_steps, train.optimizer.schedule)
        factor *= part.stage.lr_factor if part.stage else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        begun = time.monotonic()
        batches = next(stream)
        waited = time.monotonic() - begun
        loss = exactly(partial(_take_step, step, batches, train, ranks, model, objective, optimizer, scaler))
        if averaged is not networks:
            _average(averaged, networks, min(train.ema or 0.0, (step + 1) / (step + 10)))
        meter.add(train.batch, begun, waited)
        done = step + 1
        validate = done % train.validate_every == 0 or done == steps
        if done % train.log_every == 0 or validate:
            row: dict[str, Any] = {"step": done, "loss": f"{loss:.6f}", "lr": f"{optimizer.param_groups[0]['lr']:.3e}"}
            if validate:
                row |= _validate(objective, averaged, val, params, ranks)
            if first:
                left = (steps - done) * (time.monotonic() - since) / (done - start) / 60
                log.write(row, meter.figures(), left)
                if validate:
                    log.report()
        if done % train.checkpoint_every == 0 or done == steps:
            state = {"networks": whole_state(networks), "optimizer": whole_optimizer_state(networks, optimizer)}
            if averaged is not networks:
                state["averaged"] = whole_state(averaged)
            if first:
                save_checkpoint(work, done, state | {"scaler": scaler.state_dict()})

    trained = whole_state(averaged)
    if not first:
        return
    whole = fresh()
    whole.load_state_dict(trained)
    folder = params.results_dir / FOLDERS[kind]
    _save(params, whole, scheduler, prediction, backbone, folder)
    (folder / "log.csv").write_bytes((work / "log.csv").read_bytes())
    write_manifest(
        folder / "manifest.json",
        "train",
        params.subtree("seed", "train", "latents"),
        [params.data_dir / "phrases.parquet", params.results_dir / "backbone" / "manifest.json"],
        [folder],
        started,
        name,
        code=code_hash(*CODE),
        kind=kind,
        steps=steps,
        samples=steps * train.batch,
        parameters=sum(parameter.numel() for parameter in whole.parameters()),
        weights=digest([file_sha256(path) for path in sorted(folder.glob("*/*.safetensors"))]),
    )
    print(f"train {kind}: saved {folder}", flush=True)


def _enter(
    part: Part,
    step: int,
    objective: Objective,
    networks: Networks,
    averaged: Networks,
    fresh: Callable[[], Networks],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    train: Train,
    work: Path,
) -> None:
    """Begin a part, or go on with it after a resume: a stage begins with the averaged weights and a fresh optimiser; its
    teacher, the same weights frozen, is kept in a file for a later resume."""
    objective.part, objective.teacher = part, None
    if part.stage is None:
        return
    first, begins = ranks.rank == 0, step == part.first
    if begins:
        _average(networks, averaged, 0.0)
        optimizer.state.clear()
    if part.stage.objective == "distill":
        path = work / f"teacher-{part.first:07d}.pt"
        teacher = objective.teacher = fresh().requires_grad_(False).eval()
        spread(teacher, ranks, train.sharding)
        if begins:
            _average(teacher, averaged, 0.0)
            state = whole_state(teacher)
            if first:
                with atomic_path(path) as temporary:
                    torch.save(state, temporary)
        else:
            load_whole_state(teacher, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    if first:
        last = part.first + part.steps
        print(f"train {objective.kind}: stage {part.stage.objective}, steps {part.first} to {last}", flush=True)


def _take_step(
    step: int,
    batches: list[MicroBatch],
    train: Train,
    ranks: Ranks,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> float:
    """One optimiser step over the global batch, of which `batches` are this process's. Returns the batch's mean loss."""
    device = ranks.device
    total = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for number, micro in enumerate(batches):
        with accumulating(model, last=number == len(batches) - 1):
            with _autocast(train, device):
                losses = objective(
                    model, micro.batch.to(device), micro.noise.to(device), micro.t.to(device), micro.drop.to(device)
                )
            loss = losses.sum() / train.batch
            total += loss.detach()
            scaler.scale(loss * ranks.size).backward()  # the processes' gradients are averaged, ours is a sum
    check_finite(ranks.sum(total), step)
    scaler.unscale_(optimizer)
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not scaler.is_enabled():  # the scaler skips such a step and lowers its scale
        check_finite(norm, step, "gradient's norm")
    if train.optimizer.gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, train.optimizer.gradient_clip, norm)
    for parameter in parameters:
        if parameter.grad is None:  # a null that no row used: the optimiser sees zero, as it does with several processes
            parameter.grad = torch.zeros_like(parameter)
    scaler.step(optimizer)
    scaler.update()
    return total.item()


def sample_flops(networks: Networks, data: PhraseData, train: Train, part: Part) -> float:
    """Floating-point operations of one training sample, its phrase as long as the first; the adapter's few are left out."""
    tokens = len(data.texts[data.rows["phrase"].iloc[0]].tokens) if train.text == "tokens" else 1
    forward = unet_flops(networks.unet.config, data.label_shape[-1], tokens, train.inject == "all")
    return training_flops(forward, recomputed=False) + part.teacher_passes * forward


def _autocast(train: Train, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision: fp32 master weights, arithmetic in `train.precision`. Each weight is used once a pass, so its cast is
    not cached (under FSDP with gradient checkpointing, which else keeps none, that would be a whole copy in every process)."""
    if train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[train.precision], cache_enabled=False)


@torch.no_grad()
def _average(averaged: Networks, networks: Networks, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * networks; with decay 0 a copy, exactly."""
    for mean, parameter in zip(averaged.parameters(), networks.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def _validation_rows(phrases: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """A fixed choice of validation phrases, by hash."""
    val = phrases[phrases["split"] == "val"]
    keys = list(zip(val["narrative_id"], val["phrase_id"], strict=True))
    order = sorted(range(len(val)), key=lambda i: hash_unit(seed, "validate", *keys[i]))
    return val.iloc[sorted(order[:count])]


@torch.no_grad()
def _validate(objective: Objective, networks: Networks, val: PhraseData, params: Params, ranks: Ranks) -> dict[str, str]:
    """Mean validation loss per timestep band (of the averaged weights), each phrase at one fixed t and noise a band; always
    the loss before the stages, so that its values compare.

    The processes share the phrases, each making as many passes: sharded weights are gathered by all of them.
    """
    networks.eval()
    train, device = params.train, ranks.device
    found: dict[str, str] = {}
    means = []
    blocks = list(_blocks(len(val), train.micro_batch))
    bands = BANDS if objective.kind == "gs" else BANDS[-1:]
    for low, high in bands:
        losses = torch.zeros(len(val), device=device)
        for number in range(ranks.rank, len(blocks) + ranks.rank, ranks.size):
            part = blocks[number % len(blocks)]
            batch = val.batch(part, [False] * len(part))
            draws = [step_generator(params.seed, "validation", low, index) for index in part]
            t = torch.cat([torch.randint(low, high, (1,), generator=draw) for draw in draws])
            noise = torch.stack([torch.randn(val.label_shape, generator=draw) for draw in draws])
            with _autocast(train, device):
                found_losses = objective.first_loss(networks, batch.to(device), noise.to(device), t.to(device), None)
            if number < len(blocks):
                losses[part] = found_losses.float()
        means.append(ranks.sum(losses).mean().item())
        if objective.kind == "gs":
            found[f"val_t{low}_{high - 1}"] = f"{means[-1]:.6f}"
    networks.train()
    return found | {"val_loss": f"{sum(means) / len(means):.6f}"}


def _blocks(count: int, size: int) -> Iterator[list[int]]:
    for low in range(0, count, size):
        yield list(range(low, min(low + size, count)))


def _data_hash(params: Params) -> str:
    return file_sha256(params.data_dir / "phrases.parquet")


def _resume(
    work: Path, networks: Networks, averaged: Networks, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> int:
    checkpoint = load_checkpoint(work)
    if checkpoint is None:
        return 0
    load_whole_state(networks, checkpoint["networks"])
    load_whole_optimizer_state(networks, optimizer, checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if averaged is not networks:
        load_whole_state(averaged, checkpoint["averaged"])
    return checkpoint["step"]


def _save(params: Params, networks: Networks, scheduler: Any, prediction: str, backbone: dict[str, Any], folder: Path) -> None:
    """Write the pipeline: trained U-Net and adapter, the backbone's VAE and text encoders."""
    source, revision = backbone["pipeline"], backbone["revision"]
    encoders = load_text_encoders(source, revision)
    distilled = any(stage.objective == "distill" for stage in params.train.stages)
    pipeline = GSPipeline(
        vae=load_vae(source, revision),
        text_encoder=encoders.models[0],
        text_encoder_2=encoders.models[1],
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        unet=networks.unet.eval(),
        adapter=networks.adapter.eval(),
        scheduler=scheduler,
        prediction=prediction,
        label_scale=params.train.label_scale,
        image_size=params.train.size,
        label="mask" if prediction == "logits" else params.train.label,
        # The paper's operating point for its objective; v and x_0 give a usable estimate in the first step already, and
        # guidance gains them little. What was distilled has its guidance in the weights.
        steps=50 if prediction == "noise" else 1,
        guidance=7.5 if prediction == "noise" and not distilled else 1.0,
    )
    with atomic_directory(folder) as temporary:
        pipeline.save_pretrained(temporary)
