"""The phase `backbone`: name the pipeline that the study starts from, after training it on the study's images if requested."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel

from genseg.artifacts.files import atomic_directory, file_sha256
from genseg.artifacts.manifest import code_hash, read_manifest, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.errors import UserError
from genseg.models.backbone import noise_schedule
from genseg.models.device import choose_device, describe
from genseg.models.miniature import build_miniature
from genseg.params import Baselines, Params, Refine, digest
from genseg.training.backbone import fit_unet, fit_vae, load_images, measure_psnr

FILES = ("backbone", "checkpoints", "prepare", "steps")
CODE = ("params.py", "artifacts", "data/images.py", "models", *(f"training/{file}.py" for file in FILES))
PSNR_IMAGES = 64


def prepare_backbone(params: Params) -> None:
    """Write `results/<study>/backbone/manifest.json`, whose fact `pipeline` is a diffusers directory or a hub id.

    If the params have training steps, the trained pipeline is saved next to the manifest in half precision. Otherwise nothing
    is copied, and the manifest names `backbone.init` itself.

    Raises:
        UserError: the pipeline is missing or has another architecture, or there is no GPU for `device: cuda`.
    """
    start_time = time.time()
    device = choose_device(params.device, params.resources["backbone"].threads)
    print(f"backbone: device {describe(device)}", flush=True)
    folder = params.results_dir / "backbone"
    backbone = params.backbone
    facts: dict[str, Any] = {}
    if backbone.init is None or backbone.vae.steps or backbone.unet.steps:
        facts = _train(params, folder / "pipeline", device)
        source, revision = str(folder / "pipeline"), None
    else:
        source, revision = backbone.init, find_commit(backbone.init, backbone.revision)
    unet_config = load_unet_config(source, revision)
    if unet_config["in_channels"] != 9:
        raise UserError(
            f"{source}: its U-Net has {unet_config['in_channels']} input channels; GS needs an in-painting U-Net (9)"
        )
    write_manifest(
        folder / "manifest.json",
        "backbone",
        params.subtree("seed", "backbone"),
        [params.data_dir / "manifest.json"],
        [folder / "pipeline"] if source == str(folder / "pipeline") else [],
        start_time,
        describe(device),
        code=code_hash(*CODE),
        pipeline=source,
        revision=revision,
        weights=weights_hash(source, revision),
        betas=noise_schedule(source, revision),
        **facts,
    )
    print(f"backbone: {source}", flush=True)


def load_unet_config(source: str, revision: str | None) -> dict[str, Any]:
    """The U-Net's config, without its weights. Raises UserError when it cannot be had."""
    try:
        return UNet2DConditionModel.load_config(source, subfolder="unet", revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no U-Net in diffusers format there ({' '.join(str(error).split())[:200]})") from error


def find_commit(source: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub id stands for today, so that all jobs load the same; None for a local directory.

    Where the hub cannot be asked, as on many compute nodes, it is that of the copy in the hub's cache, which is said.

    Raises:
        UserError: the hub does not answer and nothing is cached.
    """
    if Path(source).is_dir():
        return None
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(source, revision=revision).sha
    except Exception as error:  # httpx and the hub raise a dozen kinds
        reason = " ".join(str(error).split())[:200]
    try:
        cached = try_to_load_from_cache(source, "model_index.json", revision=revision)
    except ValueError:  # no hub id
        cached = None
    if not isinstance(cached, str):
        raise UserError(f"{source}: the hub does not tell its commit ({reason}), and its cache has no copy")
    commit = Path(cached).parent.name
    print(f"{source}: the hub does not answer ({reason}); taking the cached commit {commit}", flush=True)
    return commit


def weights_hash(source: str, revision: str | None) -> str:
    """What identifies the pipeline's weights: hashes of its files, or the hub id and its commit (see `find_commit`)."""
    folder = Path(source)
    if folder.is_dir():
        return digest(
            {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        )
    return digest([source, revision])


def chosen_backbone(params: Params, phase: Baselines | Refine) -> tuple[str, str | None, str]:
    """Source, revision and hash of the weights of the pipeline that a phase works with: its own, else the study's."""
    if phase.backbone is not None:
        commit = find_commit(phase.backbone, phase.revision)
        return phase.backbone, commit, weights_hash(phase.backbone, commit)
    manifest = read_manifest(params.results_dir / "backbone" / "manifest.json")
    return manifest["pipeline"], manifest["revision"], manifest["weights"]


def _train(params: Params, target: Path, device: torch.device) -> dict[str, Any]:
    """Train the pipeline, save it to `target` and return facts for the manifest."""
    # 1. Load the data and the pipeline.
    backbone = params.backbone
    phrases = read_phrases(params.data_dir / "phrases.parquet")
    train = phrases[phrases["split"] == "train"]
    files, captions, noun_phrases = captions_by_image(train)
    if backbone.shape is not None:
        pipeline = build_miniature(backbone.shape, backbone.size, [text for texts in captions for text in texts], params.seed)
    else:
        try:
            pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(
                backbone.init, revision=backbone.revision, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{backbone.init}: cannot load the pipeline ({' '.join(str(error).split())[:200]})") from error
    images = load_images(files, backbone.size)

    # 2. Train the VAE and the U-Net.
    key = digest([params.subtree("seed", "backbone"), file_sha256(params.data_dir / "phrases.parquet"), code_hash(*CODE)])
    work = params.work_dir / "backbone" / key
    sample = images[:: max(1, len(images) // PSNR_IMAGES)][:PSNR_IMAGES]
    pipeline.vae.to(device)
    before = measure_psnr(pipeline.vae, sample, device)
    fit_vae(pipeline.vae, images, backbone.vae, params.seed, work / "vae", device)
    after = measure_psnr(pipeline.vae, sample, device)
    print(f"backbone: VAE PSNR {before:.2f} dB before and {after:.2f} dB after {backbone.vae.steps} training steps", flush=True)
    fit_unet(
        pipeline, images, captions, noun_phrases, backbone.unet, backbone.shape is not None, params.seed, work / "unet", device
    )

    # 3. Save the pipeline.
    with atomic_directory(target) as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary)
    return {"vae_psnr_db_before": before, "vae_psnr_db": after, "images": len(images)}


def captions_by_image(train: pd.DataFrame) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return the files of the training images, the distinct captions of each image, and their distinct noun phrases."""
    grouped = train.groupby("image_id", sort=True)
    captions, phrases = ([sorted(set(texts.dropna())) for _, texts in grouped[name]] for name in ("caption", "phrase"))
    return list(grouped["file_name"].first()), captions, phrases
