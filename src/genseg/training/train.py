"""Training of the label-diffusion model (GS, section 3) and its discriminative control: same U-Net, inputs, data and budget.

Every random choice of a step derives from (seed, step). So an interrupted and resumed run takes the same steps, and the
micro-batch and the number of processes change nothing but rounding.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from genseg.artifacts.files import atomic_path, file_sha256
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.latents import Texts, image_store, text_store
from genseg.models.backbone import load_vae
from genseg.models.device import choose_device, describe, exactly
from genseg.params import Params, Train, digest
from genseg.training.data import MicroBatch, PhraseData, micro_batches, prefetched
from genseg.training.distributed import Ranks, accumulate, full_state_dict, load_full_state_dict, parallelize, process_group
from genseg.training.export import FOLDERS, make_training_scheduler, save_pipeline
from genseg.training.log import Meter, TrainLog
from genseg.training.losses import DistillationLoss, Loss, MaskLoss, make_base_loss
from genseg.training.networks import Networks, average_weights, build_networks, sample_flops
from genseg.training.stages import Kind, StageSpan, span_at, stage_spans
from genseg.training.state import TrainingState
from genseg.training.steps import check_finite, lr_factor, mixed_precision
from genseg.training.validation import BANDS, validate, validation_rows

FILES = (
    "checkpoints",
    "data",
    "distributed",
    "export",
    "log",
    "losses",
    "networks",
    "stages",
    "state",
    "steps",
    "train",
    "validation",
)
CODE = ("params.py", "artifacts", "latents.py", "models", "diffusion", *(f"training/{file}.py" for file in FILES))
LOG_COLUMNS = ("step", "loss", "lr", *(f"val_t{low}_{high - 1}" for low, high in BANDS), "val_loss")


def train_model(params: Params, kind: Kind) -> None:
    """Train and save `results/<study>/model` (or `control`), with `log.csv` and, written last, its manifest.

    Runs in one process or, under `torchrun` or `accelerate launch`, in several. Checkpoints are in
    `work/<study>/train/<kind>-<hash of everything the result depends on>/`. A run resumes from the newest one and, with the
    same number of processes, ends with the same weights as an uninterrupted run.

    Raises:
        UserError: latents or backbone are missing or belong to other data, the loss is not finite, the disk is full, there
            is no GPU for `device: cuda`, or the batch is not divisible by the number of processes.
    """
    with process_group(choose_device(params.device, params.resources["train"].threads, exact=True)) as ranks:
        _train(params, kind, ranks)


def _train(params: Params, kind: Kind, ranks: Ranks) -> None:
    start_time = time.time()
    train, device, is_main = params.train, ranks.device, ranks.rank == 0
    positions = ranks.positions(train.batch)
    device_name = describe(device) + (f" x {ranks.size}, {train.sharding}" if ranks.size > 1 else "")
    if is_main:
        print(f"train {kind}: device {device_name}, precision {train.precision}", flush=True)

    # 1. Load the data.
    backbone = read_manifest(params.results_dir / "backbone" / "manifest.json")
    source, revision = backbone["pipeline"], backbone["revision"]
    phrases_path = params.data_dir / "phrases.parquet"
    phrases = read_phrases(phrases_path)
    texts = Texts(text_store(params), torch.device("cpu"))
    images = LatentStore(image_store(params, train.size))
    vae = load_vae(source, revision).to(device) if kind == "gs" and train.label == "vae" else None
    data = PhraseData(phrases[phrases["split"] == "train"], images, texts, train.task_size, vae)
    val_rows = validation_rows(phrases, train.validate_phrases, params.seed)
    val_data = PhraseData(val_rows, images, texts, train.task_size, vae)

    # 2. Build the networks and the loss.
    scheduler = make_training_scheduler(train, backbone["betas"])
    alphas_bar = scheduler.alphas_cumprod.to(device)
    initial_networks = partial(build_networks, params, source, revision, texts[""], data.label_shape[0])
    state = TrainingState(initial_networks(), train, ranks)
    base_loss = make_base_loss(kind, train, alphas_bar, vae)

    # 3. Resume from the newest checkpoint.
    spans = stage_spans(train, len(data), kind)
    steps = spans[-1].end
    inputs = [backbone["weights"], code_hash(*CODE), file_sha256(phrases_path)]
    key = digest([kind, params.subtree("seed", "train", "latents"), *inputs])
    work = params.work_dir / "train" / f"{kind}-{key}"
    state.load(work)
    first_step = state.step
    if is_main:
        log = TrainLog(work / "log.csv", LOG_COLUMNS, first_step, f"train {kind}")
        print(f"train {kind}: {len(data)} phrases, {steps} steps of {train.batch}, from step {first_step}", flush=True)

    # 4. Take the steps.
    span: StageSpan | None = None
    meter = Meter(device, ranks.size)
    loop_start_time = time.monotonic()
    draw_batches = partial(micro_batches, data, train, len(alphas_bar), params.seed, positions)
    stream = prefetched(draw_batches, range(first_step, steps))
    while state.step < steps:
        # Enter the stage of this step, which may have begun before the resumed checkpoint.
        if span is None or state.step == span.end:
            span = span_at(spans, state.step)
            loss = base_loss  # frees the teacher of the previous stage
            if span.stage is not None:
                begins = state.step == span.first
                if begins:
                    state.begin_stage()
                if span.stage.objective == "task":
                    loss = MaskLoss(train, alphas_bar)
                else:
                    assert span.stage.guidance is not None
                    path = work / f"teacher-{span.first:07d}.pt"
                    loss = DistillationLoss(
                        _make_teacher(initial_networks(), state, train.sharding, path, begins),
                        span.stage.guidance,
                        train,
                        alphas_bar,
                        vae,
                    )
                if is_main:
                    print(f"train {kind}: stage {span.stage.objective}, steps {span.first} to {span.end}", flush=True)
            meter.flops = sample_flops(state.networks, data, train, span) if device.type == "cuda" else 0.0

        # Set the learning rate.
        factor = lr_factor(state.step - span.first, span.steps, train.optimizer.warmup_steps, train.optimizer.schedule)
        factor *= span.lr_factor
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

        # Update the weights.
        step_start_time = time.monotonic()
        batches = next(stream)
        waited = time.monotonic() - step_start_time
        mean_loss = exactly(partial(_update_weights, state, batches, loss, train))
        state.finish_step()
        meter.add(train.batch, step_start_time, waited)

        # Validate and log.
        is_last = state.step == steps
        is_validated = state.step % train.validate_every == 0 or is_last
        if state.step % train.log_every == 0 or is_validated:
            lr = state.optimizer.param_groups[0]["lr"]
            row: dict[str, Any] = {"step": state.step, "loss": f"{mean_loss:.6f}", "lr": f"{lr:.3e}"}
            if is_validated:
                row |= validate(kind, base_loss, state.averaged, val_data, params, ranks)
            if is_main:
                seconds_per_step = (time.monotonic() - loop_start_time) / (state.step - first_step)
                log.write(row, meter.read(), minutes_left=(steps - state.step) * seconds_per_step / 60)
                if is_validated:
                    log.report()

        # Save a checkpoint.
        if state.step % train.checkpoint_every == 0 or is_last:
            state.save(work)

    # 5. Save the averaged networks as a pipeline, and last the manifest.
    weights = full_state_dict(state.averaged)
    if not is_main:
        return
    networks = initial_networks()
    networks.load_state_dict(weights)
    folder = params.results_dir / FOLDERS[kind]
    save_pipeline(folder, params, kind, networks, scheduler, backbone)
    (folder / "log.csv").write_bytes((work / "log.csv").read_bytes())
    write_manifest(
        folder / "manifest.json",
        "train",
        params.subtree("seed", "train", "latents"),
        [phrases_path, params.results_dir / "backbone" / "manifest.json"],
        [folder],
        start_time,
        device_name,
        code=code_hash(*CODE),
        kind=kind,
        steps=steps,
        samples=steps * train.batch,
        parameters=sum(parameter.numel() for parameter in networks.parameters()),
        weights=digest([file_sha256(path) for path in sorted(folder.glob("*/*.safetensors"))]),
    )
    print(f"train {kind}: saved {folder}", flush=True)


def _make_teacher(
    networks: Networks, state: TrainingState, sharding: Literal["replicate", "shard"], path: Path, begins: bool
) -> Networks:
    """Turn `networks` into the frozen teacher of a distillation: the averaged networks at the beginning of its stage.

    When the stage begins, the teacher is saved to `path`; when a run resumes within the stage, it is loaded from there.
    """
    networks.requires_grad_(False).eval()
    parallelize(networks, state.ranks, sharding)
    if begins:
        average_weights(networks, state.averaged, 0.0)
        weights = full_state_dict(networks)
        if state.ranks.rank == 0:
            with atomic_path(path) as temporary:
                torch.save(weights, temporary)
    else:
        load_full_state_dict(networks, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    return networks


def _update_weights(state: TrainingState, batches: list[MicroBatch], loss: Loss, train: Train) -> float:
    """Take one optimizer step on the global batch and return its mean loss. `batches` are this process's part of it."""
    model, optimizer, scaler, ranks = state.model, state.optimizer, state.scaler, state.ranks
    device = ranks.device

    # Evaluate the loss and accumulate gradients.
    batch_loss = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for number, micro in enumerate(batches):
        with accumulate(model, last=number == len(batches) - 1):
            with mixed_precision(train, device):
                losses = loss(model, micro.batch.to(device), micro.noise.to(device), micro.t.to(device), micro.drop.to(device))
            micro_loss = losses.sum() / train.batch
            batch_loss += micro_loss.detach()
            # The processes' gradients are averaged, but the loss is a sum over them.
            scaler.scale(micro_loss * ranks.size).backward()
    check_finite(ranks.sum(batch_loss), state.step)

    # Check and clip gradients.
    scaler.unscale_(optimizer)
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not scaler.is_enabled():  # an enabled scaler skips a step that is not finite and lowers its scale
        check_finite(norm, state.step, "gradient's norm")
    if train.optimizer.gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, train.optimizer.gradient_clip, norm)

    # Update the weights. With several processes, nulls that no row used have a gradient of zero; do the same with one.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    scaler.step(optimizer)
    scaler.update()
    return batch_loss.item()
