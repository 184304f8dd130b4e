"""Training of the label-diffusion model (GS, section 3) and its discriminative control: same U-Net, inputs, data and budget.

All random numbers of a step derive from (train.seed, step). An interrupted and resumed run therefore takes the same steps, and
the micro-batch size and the number of processes affect only rounding.
"""

import time
from functools import partial
from pathlib import Path

import torch

from genseg.artifacts.files import file_sha256, read_json, write_text
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import is_current, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.latents import Texts, image_store, text_store
from genseg.models.backbone import load_vae
from genseg.models.device import choose_device, describe, run_deterministically
from genseg.params import Params, digest
from genseg.phases import PHASES, code_hash
from genseg.training import losses
from genseg.training.card import make_card
from genseg.training.data import PhraseData, micro_batches, prefetched
from genseg.training.distributed import Ranks, full_state_dict, process_group
from genseg.training.log import Meter, TrainLog
from genseg.training.networks import build_networks, make_training_scheduler, sample_flops, save_pipeline
from genseg.training.stages import Kind, stage_spans
from genseg.training.state import TrainingState
from genseg.training.steps import lr_factor

LOG_COLUMNS = ("step", "loss", "lr", *(f"val_t{low}_{high - 1}" for low, high in losses.BANDS), "val_loss")


def train_model(params: Params, kind: Kind) -> None:
    """Train and save `results/<study>/model/<kind>`, with `log.csv` and, written last, its manifest.

    Runs in one process or, under `torchrun` or `accelerate launch`, in several. Checkpoints are in
    `work/<study>/train/<kind>-<hash of everything the result depends on>/`. A run resumes from the newest one and, with the
    same number of processes, ends with the same weights as an uninterrupted run.

    Raises:
        UserError: latents or backbone are missing or belong to other data, the loss is not finite, the disk is full, there is
            no GPU for `device: cuda`, or the batch is not divisible by the number of processes.
    """
    inputs = [params.data_dir / "phrases.parquet", params.results_dir / "backbone" / "manifest.json"]
    if is_current(params.model_dir(kind) / "manifest.json", "train", params, inputs):
        return
    with process_group(choose_device(params.device, params.resources.train.threads, exact=True)) as ranks:
        _train(params, kind, inputs, ranks)


def _train(params: Params, kind: Kind, inputs: list[Path], ranks: Ranks) -> None:
    train, device, is_main = params.train, ranks.device, ranks.rank == 0
    positions = ranks.positions(train.batch)
    device_name = describe(device) + (f" x {ranks.size}, {train.parallelism}" if ranks.size > 1 else "")
    if is_main:
        print(f"train {kind}: device {device_name}, precision {train.precision}", flush=True)

    # 1. Load the data.
    phrases_path, backbone_path = inputs
    backbone = read_manifest(backbone_path)
    source, revision = backbone["pipeline"], backbone["revision"]
    phrases = read_phrases(phrases_path)
    texts = Texts(text_store(params), torch.device("cpu"))
    images = LatentStore(image_store(params, train.size))
    vae = load_vae(source, revision).to(device) if kind == "gs" and train.label == "vae" else None
    data = PhraseData(phrases[phrases["split"] == "train"], images, texts, vae)
    val_rows = losses.validation_rows(phrases, train.validate_phrases, params.seed)
    val_data = PhraseData(val_rows, images, texts, vae)

    # 2. Build the networks and the loss of the base training, which validation uses in every stage.
    scheduler = make_training_scheduler(train, backbone["betas"])
    alphas_bar = scheduler.alphas_cumprod.to(device)
    initial_networks = partial(build_networks, params, source, revision, texts[""], data.label_shape[0])
    state = TrainingState(initial_networks(), train, ranks)
    base_loss: losses.Loss = losses.DiffusionLoss(train, alphas_bar, vae) if kind == "gs" else losses.DiscriminativeLoss(train)

    # 3. Resume from the newest checkpoint.
    spans = stage_spans(train, len(data), kind)
    steps = spans[-1].end
    train_params, phrases_hash = params.subtree(*PHASES["train"].keys), file_sha256(phrases_path)
    key = digest([kind, train_params, backbone["weights"], code_hash("train"), phrases_hash])
    work = params.work_dir / "train" / f"{kind}-{key}"
    state.load(work)
    first_step = state.step
    if is_main:
        log = TrainLog(work / "log.csv", LOG_COLUMNS, first_step, f"train {kind}")
        print(f"train {kind}: {len(data)} phrases, {steps} steps of {train.batch}, from step {first_step}", flush=True)

    # 4. Take the steps.
    loop_start_time = time.monotonic()
    draw_batches = partial(micro_batches, data, train, len(alphas_bar), train.seed, positions)
    stream = prefetched(draw_batches, range(first_step, steps))
    meter = Meter(device, ranks.size)
    for span in spans:
        if state.step >= span.end:
            continue

        # Enter the stage, which may have begun before the resumed checkpoint.
        loss = base_loss  # `loss` holds the only reference to a teacher; this frees that of the previous stage
        if span.stage is not None:
            begins = state.step == span.first
            if begins:
                state.begin_stage()
            if span.stage.objective == "mask_loss":
                loss = losses.MaskLoss(train, alphas_bar)
            else:
                path, scale = work / f"teacher-{span.first:07d}.pt", span.stage.guidance_scale
                assert scale is not None
                loss = losses.DistillationLoss(
                    state.make_teacher(initial_networks(), path, begins), scale, train, alphas_bar, vae
                )
            if is_main:
                print(f"train {kind}: stage {span.stage.objective}, steps {span.first} to {span.end}", flush=True)
        meter.flops = sample_flops(state.networks, data, train, span) if device.type == "cuda" else 0.0

        while state.step < span.end:
            # Set the learning rate.
            factor = lr_factor(state.step - span.first, span.steps, train.optimizer.warmup_steps, train.optimizer.schedule)
            factor *= 1.0 if span.stage is None else span.stage.lr_factor
            for group in state.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

            # Update the weights.
            step_start_time = time.monotonic()
            batches = next(stream)
            waited = time.monotonic() - step_start_time
            mean_loss = run_deterministically(partial(state.update_weights, batches, loss))
            state.finish_step()
            meter.add(train.batch, step_start_time, waited)

            # Validate and log.
            is_last = state.step == steps
            is_validated = state.step % train.validate_every == 0 or is_last
            if state.step % train.log_every == 0 or is_validated:
                lr = state.optimizer.param_groups[0]["lr"]
                row = {"step": str(state.step), "loss": f"{mean_loss:.6f}", "lr": f"{lr:.3e}"}
                if is_validated:
                    row |= losses.validate(kind, base_loss, state.averaged, val_data, params, ranks)
                if is_main:
                    seconds_per_step = (time.monotonic() - loop_start_time) / (state.step - first_step)
                    log.write(row, meter.read(), minutes_left=(steps - state.step) * seconds_per_step / 60)
                    if is_validated:
                        log.report()

            # Save a checkpoint.
            if state.step % train.checkpoint_every == 0 or is_last:
                state.save(work)

    # 5. Save the averaged networks as a pipeline, and then the manifest.
    weights = full_state_dict(state.averaged)
    if not is_main:
        return
    networks = initial_networks()
    networks.load_state_dict(weights)
    folder = params.model_dir(kind)
    save_pipeline(folder, params, kind, networks, scheduler, backbone)
    (folder / "log.csv").write_bytes((work / "log.csv").read_bytes())
    parameters = sum(parameter.numel() for parameter in networks.parameters())
    card = make_card(
        params, kind, phrases, backbone, read_json(folder / "model_index.json"), steps=steps, parameters=parameters
    )
    write_text(folder / "README.md", str(card))
    facts = {
        "kind": kind,
        "steps": steps,
        "samples": steps * train.batch,
        "parameters": parameters,
        "weights": digest([file_sha256(path) for path in sorted(folder.glob("*/*.safetensors"))]),
    }
    write_manifest(folder / "manifest.json", "train", params, inputs, [folder], device_name, **facts)
    print(f"train {kind}: saved {folder}", flush=True)
