"""The phase `preflight`, the first job of a study: checks what would otherwise fail after hours or days of other jobs."""

import shutil
from pathlib import Path
from typing import Any

import torch

from genseg.artifacts.files import write_json
from genseg.baselines.attend import attention_grids, recorded_layers, recordings
from genseg.baselines.attention import find_grid
from genseg.data.download import DOWNLOADS, SOURCES, read_sources
from genseg.errors import UserError
from genseg.models.device import choose_device, describe
from genseg.models.flops import gpu_model
from genseg.models.source import backbones, commits_path, read_repository, study_backbone
from genseg.params import Params
from genseg.plan.cost import backbone_configs, make_plan
from genseg.plan.describe import jobs_table
from genseg.plan.generator import Configs, study_configs
from genseg.plan.jobs import gpu_bytes, job_warnings

MFU = 0.4
"""Assumed fraction of the GPU's peak rate."""
PREDICTION_TYPES = ("epsilon", "v_prediction")


def preflight(params: Params) -> None:
    """Check a study before its other jobs, and write the commit and licence of each backbone to `commits_path`.

    On a GPU, the study is also planned: shortage of GPU memory or disk space is an error; planned hours or host memory above
    the requested resources are printed as warnings.

    Raises:
        UserError: a backbone is missing or has another architecture, a size, attention grid or layer does not exist in it, the
            GPU or its memory is missing, or the disk is too small.
    """
    is_new = not commits_path(params).exists()
    try:
        records = _check(params)
    except UserError:
        if is_new:  # or Snakemake would keep the file and consider the job done
            commits_path(params).unlink(missing_ok=True)
        raise
    write_json(commits_path(params), records)
    print(f"preflight: {commits_path(params)}: {len(records)} backbones", flush=True)


def _check(params: Params) -> dict[str, dict[str, Any]]:
    """Return the records of the backbones by params key. Raises UserError as `preflight` does."""
    # 1. Resolve the backbones.
    records = {key: study_backbone(params, key, *source) for key, source in backbones(params).items()}
    commits = {key: record["commit"] for key, record in records.items()}
    for key, record in records.items():
        if record["commit"] is not None:
            licence = record["licence"] or "not stated; read the model card"
            print(f"{key}: {record['source']} at {record['commit']}, licence: {licence}", flush=True)

    # 2. Check that they have what the params name.
    configs = {key: study_configs(params, key, commits) for key in records}
    for key, record in records.items():
        _check_files(key, record, configs[key])
    study = configs.get("backbone.init") or backbone_configs(params, commits)[0]
    _check_sizes(params, study)
    if params.sample.has_tables():
        _check_baselines(params, configs.get("baselines.backbone", study))
        _check_refinement(params, configs.get("refine.backbone", study))

    # 3. Check the machine.
    device = choose_device(params.device)
    print(f"preflight: device {describe(device)}", flush=True)
    needed = {DOWNLOADS: _missing_downloads(params)}
    if device.type == "cuda":
        needed[params.results_dir] = _check_plan(params, device, commits)
    _check_disk(needed)
    return records


# ---------------------------------------------------------------------------------------------------------- backbones
def _check_files(key: str, record: dict[str, Any], configs: Configs) -> None:
    """Raise UserError if a pipeline lacks a tokenizer, or its channels or its prediction type do not suit the phase."""
    source, commit, unet = record["source"], record["commit"], configs["unet"]
    for name in ("tokenizer", "tokenizer_2")[: sum(part.startswith("text_encoder") for part in configs)]:
        read_repository(source, f"{name}/tokenizer_config.json", commit, key)
    channels, expected = unet["in_channels"], (9,) if key == "backbone.init" else (4, 9)
    if channels not in expected:
        kind = "an in-painting U-Net (9)" if expected == (9,) else "a text-to-image (4) or in-painting (9) Stable Diffusion"
        raise UserError(f"{key}: {source}: its U-Net has {channels} input channels; set {key} to {kind}")
    if key == "backbone.init" and "text_encoder_2" not in configs:
        raise UserError(f"{key}: {source}: missing second text encoder; GS needs an SDXL-inpainting pipeline")
    if unet["out_channels"] != 4 or configs["vae"]["latent_channels"] != 4:
        raise UserError(
            f"{key}: {source}: its latents do not have 4 channels; set {key} to a Stable Diffusion or SDXL pipeline"
        )
    schedule = read_repository(source, "scheduler/scheduler_config.json", commit, key)
    if (prediction := schedule.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise UserError(f"{key}: {source}: prediction type {prediction}; expected one of {', '.join(PREDICTION_TYPES)}")


def _factor(configs: Configs) -> int:
    """Return the down-sampling factor of the VAE."""
    return 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def _check_size(key: str, size: int, configs: Configs) -> None:
    """Raise UserError if the VAE of a pipeline has no latent for images of this size."""
    factor = _factor(configs)
    if size % factor:
        near = sorted({max(factor, size // factor * factor), -(-size // factor) * factor})
        raise UserError(f"{key}: {size}: not a multiple of the VAE's factor {factor}; set it to {' or '.join(map(str, near))}")


def _check_sizes(params: Params, configs: Configs) -> None:
    sample = params.sample
    sizes = [("train.size", params.train.size), ("sample.main.size", sample.main.size), ("sample.base.size", sample.base.size)]
    for key, size in [*sizes, *(("sample.grid.sizes", size) for size in sample.grid.sizes)] if sample.runs else ():
        _check_size(key, size, configs)


def _check_baselines(params: Params, configs: Configs) -> None:
    """Raise UserError if the attention baselines need an image size or an attention grid that the pipeline does not have."""
    baselines = params.baselines
    if baselines.attention:
        _check_size("baselines.size", baselines.size, configs)
        side = baselines.size // _factor(configs)
        grids = attention_grids(configs["unet"], side, side)
        for method in baselines.attention:
            recorded_layers(baselines, grids, recordings(baselines)[method].self_attention)
            if method.startswith("diffpng"):
                find_grid(grids, baselines.diffpng.cross_side, "baselines.diffpng.cross_side")
            if method == "diffseg":
                for diffseg_side in baselines.diffseg.sides:
                    find_grid(grids, diffseg_side, "baselines.diffseg.sides")


def _check_refinement(params: Params, configs: Configs) -> None:
    """Raise UserError if G4Seg needs an image size or an up-block that the pipeline does not have."""
    refine = params.refine
    _check_size("refine.size", refine.size, configs)
    layers = len(configs["unet"]["up_block_types"])
    for key, values in (("refine.layers", refine.layers), ("refine.sensitivity.layer", refine.sensitivity.layer)):
        if missing := [value for value in values if value >= layers]:
            raise UserError(
                f"{key}: {missing[0]}: the backbone has no such up-block; it has {', '.join(map(str, range(layers)))}"
            )


# ------------------------------------------------------------------------------------------------------------ machine
def _check_plan(params: Params, device: torch.device, commits: dict[str, str | None]) -> int:
    """Print the planned jobs with warnings, write the plan to `work/<study>/plan.json`, and return the bytes that the study
    will still write.

    Raises UserError if a phase needs more memory than the GPU has. Counts of subsets of COCO are not known before their
    assembly, so their disk space is not checked: 0 is returned.
    """
    name = torch.cuda.get_device_name(device)
    model = gpu_model(name)
    if model is None:
        print(f"preflight: warning: {name}: unknown rates, so hours and memory are not checked", flush=True)
        return 0
    plan = make_plan(params, model, max(1, params.resources.train.gpu), MFU, commits)
    write_json(params.work_dir / "plan.json", plan)
    print(jobs_table(plan), flush=True)
    for warning in job_warnings(plan["jobs"]):
        print(f"preflight: warning: {warning}", flush=True)
    memory = torch.cuda.get_device_properties(device).total_memory
    for phase, planned in gpu_bytes(params, plan["memory"]).items():
        if planned > memory:
            batch = "train.micro_batch, or set train.gradient_checkpointing" if phase == "train" else f"{phase}.batch"
            sizes = f"{planned / 1e9:.1f} GB are planned, but {name} has {memory / 1e9:.1f} GB"
            raise UserError(f"{phase}: {sizes}; lower {batch}, or use a larger GPU")
    is_counted = plan["counts"]["exact"] or (params.data.png is not None and params.data.png.download)
    missing = [
        max(0, row["bytes"] - (row["measured"] or 0))
        for row in plan["artifacts"]
        if not row["artifact"].startswith("downloads")
    ]
    return sum(missing) if is_counted else 0


def _missing_downloads(params: Params) -> int:
    """Return the bytes of the missing downloads, with the unpacked files, which need the same again."""
    png = params.data.png
    if params.data.source != "png" or png is None or not png.download:
        return 0
    folders = {"images": png.images, "annotations": png.annotations, "narratives": png.narratives}
    remotes = [remote for remote in read_sources(SOURCES, folders) if not all(path.exists() for path in remote.targets)]
    received = [path.stat().st_size for remote in remotes for path in DOWNLOADS.glob(f"{remote.name}*")]
    return max(0, 2 * sum(remote.bytes or 0 for remote in remotes) - sum(received))


def _check_disk(needed: dict[Path, int]) -> None:
    """Raise UserError if a disk has less free space than all folders on it need. `needed`: bytes by folder."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        device = existing.stat().st_dev
        disks[device] = existing, disks.get(device, (existing, 0))[1] + size
    for folder, size in disks.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"{folder}: {size / 1e9:.1f} GB are needed, but the disk has {free / 1e9:.1f} GB free; free some space, or "
                "link data, results and work to a larger disk"
            )
