"""The phase `backbone`: record the pipeline that the study starts from, and train it on the study's images if requested.

Training a miniature replaces the pre-training of SDXL-inpainting, which is used at paper scale: the VAE is trained as an
autoencoder, the U-Net as a text-to-image in-painting model, on the training images and captions only, without object masks.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline

from genseg.artifacts.files import atomic_directory, file_sha256
from genseg.artifacts.manifest import is_current, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.seeds import derive_seed
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.models.attention import use_injected_attention
from genseg.models.backbone import noise_schedule
from genseg.models.device import DTYPES, choose_device, describe
from genseg.models.miniature import build_miniature
from genseg.models.source import study_commit, weights_hash
from genseg.models.vae import encode_images, image_tensor, psnr
from genseg.params import Params, digest
from genseg.params.backbone import BackboneTraining
from genseg.phases import code_hash
from genseg.training.steps import check_finite, load_checkpoint, lr_factor, save_checkpoint, step_generator

PSNR_IMAGES = 64
KL_WEIGHT = 1e-6
P_NO_TEXT = 0.1
VARIANTS = 3
"""Number of masked versions of each image. One of them is masked entirely, as in plain text-to-image."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 50


def prepare_backbone(params: Params) -> None:
    """Write `results/<study>/backbone/manifest.json`, whose entry `pipeline` is a diffusers directory or a hub id.

    A new (no `backbone.init`) or trained pipeline is saved next to the manifest in half precision. Otherwise nothing is
    copied, and the manifest names `backbone.init` itself.

    Raises:
        UserError: the pipeline is missing, the commit of a hub id cannot be determined, or there is no GPU for `device: cuda`.
    """
    folder, backbone = params.results_dir / "backbone", params.backbone
    commit = study_commit(params, "backbone.init", backbone.init, backbone.revision) if backbone.init else None
    local_files = sorted(path for path in Path(backbone.init).rglob("*") if path.is_file()) if backbone.init else []
    inputs = [params.data_dir / "manifest.json", *local_files]
    if is_current(folder / "manifest.json", "backbone", params, inputs):
        return
    device = choose_device(params.device, params.resources.backbone.threads)
    print(f"backbone: device {describe(device)}", flush=True)
    if backbone.init is None or backbone.vae.steps or backbone.unet.steps:
        outputs = [folder / "pipeline"]
        training_facts = _train(params, commit, folder / "pipeline", device)
        source, revision = str(folder / "pipeline"), None
    else:
        outputs, training_facts = [], {}
        source, revision = backbone.init, commit
    facts = {"pipeline": source, "revision": revision, "weights": weights_hash(source, revision)}
    facts |= {"betas": noise_schedule(source, revision)} | training_facts
    write_manifest(folder / "manifest.json", "backbone", params, inputs, outputs, describe(device), **facts)
    print(f"backbone: {source}", flush=True)


def _train(params: Params, commit: str | None, target: Path, device: torch.device) -> dict[str, Any]:
    """Train the pipeline of `backbone.init` at a commit, save it to `target` and return facts for the manifest."""
    # 1. Load the data and the pipeline.
    backbone, phrases_path = params.backbone, params.data_dir / "phrases.parquet"
    phrases = read_phrases(phrases_path)
    by_image = phrases[phrases["split"] == "train"].groupby("image_id", sort=True)
    captions, noun_phrases = ([sorted(set(texts.dropna())) for _, texts in by_image[name]] for name in ("caption", "phrase"))
    if backbone.shape is not None:
        pipeline = build_miniature(backbone.shape, backbone.size, [text for texts in captions for text in texts], params.seed)
    else:
        try:
            pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(backbone.init, revision=commit, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"{backbone.init}: cannot load the pipeline ({' '.join(str(error).split())[:200]})") from error
    pixels = (image_tensor(load_image(path), backbone.size) for path in by_image["file_name"].first())
    images = torch.stack([((image + 1) * 127.5).round().to(torch.uint8) for image in pixels])  # the data set fits in memory

    # 2. Train the VAE and the U-Net. They resume from checkpoints in subfolders of `work`.
    key = digest([params.subtree("seed", "backbone"), file_sha256(phrases_path), code_hash("backbone")])
    work = params.work_dir / "backbone" / key
    sample = images[:: max(1, len(images) // PSNR_IMAGES)][:PSNR_IMAGES]
    pipeline.vae.to(device)
    before = _measure_psnr(pipeline.vae, sample, device)
    if backbone.vae.steps:
        _fit_vae(pipeline.vae, images, params, work / "vae", device)
    after = _measure_psnr(pipeline.vae, sample, device)
    print(f"backbone: VAE PSNR {before:.2f} dB before and {after:.2f} dB after {backbone.vae.steps} training steps", flush=True)
    if backbone.unet.steps:
        _fit_unet(pipeline, images, captions, noun_phrases, params, work / "unet", device)

    # 3. Save the pipeline. Reset padding and truncation: tokenizers save those of the last call, which a resumed run may skip.
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    with atomic_directory(target) as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary)
    return {"vae_psnr_db_before": before, "vae_psnr_db": after, "images": len(images)}


def _as_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert images from uint8 to floats in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def _measure_psnr(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> float:
    """Return the mean PSNR in dB of images [N, 3, S, S] uint8 after the VAE's encoder and decoder."""
    return torch.cat([psnr(vae, _as_float(batch, device)).cpu() for batch in images.split(16)]).mean().item()


def _fit_vae(vae: AutoencoderKL, images: torch.Tensor, params: Params, work: Path, device: torch.device) -> None:
    """Train the VAE (L1 + `KL_WEIGHT` * KL) on uint8 images [N, 3, S, S] and set `scaling_factor` to 1 / std of its latents."""
    training, seed = params.backbone.vae, params.seed
    optimizer = torch.optim.AdamW(vae.to(device).parameters(), lr=training.lr, weight_decay=1e-4)
    side = images.shape[-1] // 2  # of random crops; a convolutional VAE learns as much per pixel from crops

    def compute_loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(seed, "vae", step))
        crops = []
        for _ in range(training.batch):
            number, top, left = rng.randrange(len(images)), rng.randint(0, side), rng.randint(0, side)
            crops.append(images[number, :, top : top + side, left : left + side])
        batch = _as_float(torch.stack(crops), device)
        if rng.random() < 0.5:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, "vae noise", step)).to(device)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(restored, batch) + KL_WEIGHT * posterior.kl().mean()

    _fit({"model": vae}, optimizer, compute_loss, training, work)
    vae.register_to_config(scaling_factor=1.0)
    latents = torch.cat([encode_images(vae, _as_float(batch, device)).cpu() for batch in images[:512].split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def _fit_unet(
    pipeline: StableDiffusionXLInpaintPipeline,
    images: torch.Tensor,
    captions: list[list[str]],
    phrases: list[list[str]],
    params: Params,
    work: Path,
    device: torch.device,
) -> None:
    """Train the U-Net to denoise images [N, 3, S, S] uint8, given a text and the image outside a mask.

    The text is a caption of the image or, in half of the samples, a noun phrase of its captions, so that the text encoders
    also learn short texts like those of later phases. Text encoders are trained only if they start from random weights.
    """
    training, seed = params.backbone.unet, params.seed

    # 1. Prepare the modules, the optimizer and the data.
    unet, vae = pipeline.unet.to(device), pipeline.vae.to(device)
    use_injected_attention(unet)  # nothing is injected here, but this attention is faster
    encoders = (pipeline.text_encoder.to(device), pipeline.text_encoder_2.to(device))
    modules: dict[str, torch.nn.Module] = {"model": unet}
    if params.backbone.shape is not None:
        modules |= {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.99), weight_decay=0.01)
    alphas_bar = pipeline.scheduler.alphas_cumprod.float().to(device)
    clean, masks, masked = _inpainting_latents(vae, images, seed, device)
    size = images.shape[-1]

    def compute_loss(step: int) -> torch.Tensor:
        # 2. Draw images, masks, texts, noise and timesteps.
        rng, generator = random.Random(derive_seed(seed, "unet", step)), step_generator(seed, "unet noise", step)
        indices = [rng.randrange(len(images)) for _ in range(training.batch)]
        variants = [rng.randrange(VARIANTS) for _ in indices]
        texts = ["" if rng.random() < P_NO_TEXT else rng.choice(rng.choice((captions, phrases))[i]) for i in indices]
        x_0 = clean[indices].to(device)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        t = torch.randint(0, len(alphas_bar), (len(indices),), generator=generator).to(device)

        # 3. Predict the noise.
        alpha_bar = alphas_bar[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        inputs = torch.cat([x_t, masks[indices, variants].to(device), masked[indices, variants].to(device)], dim=1)
        time_ids = x_0.new_tensor([[size, size, 0, 0, size, size]]).expand(len(indices), -1)
        with torch.autocast(device.type, DTYPES[training.precision], enabled=training.precision != "fp32"):
            tokens, pooled = _encode(pipeline, encoders, texts, device)
            output = unet(inputs, t, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
        return F.mse_loss(output.float(), noise)

    _fit(modules, optimizer, compute_loss, training, work)


@torch.no_grad()
def _inpainting_latents(
    vae: AutoencoderKL, images: torch.Tensor, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents [N, 4, h, w], masks [N, V, 1, h, w] (1 where the image is hidden) and masked-image latents
    [N, V, 4, h, w] for V = `VARIANTS`."""
    clean, masks, masked = [], [], []
    for number, image in enumerate(images):
        rng = random.Random(derive_seed(seed, "inpainting mask", number))
        pixels = _as_float(image[None], device)
        latent = encode_images(vae, pixels)
        grid, factor = latent.shape[-1], image.shape[-1] // latent.shape[-1]
        variants = torch.ones(VARIANTS, 1, grid, grid, device=device)
        for variant in range(1, VARIANTS):
            side = [rng.randint(grid // 3, grid) for _ in range(2)]
            corner = [rng.randint(0, grid - length) for length in side]
            variants[variant] = 0
            variants[variant, :, corner[0] : corner[0] + side[0], corner[1] : corner[1] + side[1]] = 1
        visible = pixels * (1 - F.interpolate(variants, scale_factor=factor))
        clean.append(latent.cpu())
        masks.append(variants[None].cpu())
        masked.append(encode_images(vae, visible)[None].cpu())
    return torch.cat(clean), torch.cat(masks), torch.cat(masked)


def _encode(
    pipeline: StableDiffusionXLInpaintPipeline, encoders: tuple[torch.nn.Module, ...], texts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token embeddings [B, M, D], padded with end tokens to the longest text of the batch as in SDXL's training, and
    pooled embeddings [B, P]."""
    hidden = []
    for tokenizer, encoder in zip((pipeline.tokenizer, pipeline.tokenizer_2), encoders, strict=True):
        ids = tokenizer(texts, padding="longest", truncation=True, return_tensors="pt").input_ids.to(device)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, dim=-1), output.text_embeds


def _fit(
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    compute_loss: Callable[[int], torch.Tensor],
    training: BackboneTraining,
    work: Path,
) -> None:
    """Train the modules up to `training.steps`, from the newest checkpoint in `work`. `compute_loss` receives the step."""
    for module in modules.values():
        module.train().requires_grad_(True)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    state: dict[str, Any] = {**modules, "optimizer": optimizer}
    checkpoint = load_checkpoint(work)
    if checkpoint is not None:
        for key, item in state.items():
            item.load_state_dict(checkpoint[key])
        print(f"resumed {work.name} at step {checkpoint['step']}", flush=True)
    for step in range(checkpoint["step"] if checkpoint else 0, training.steps):
        # Update the weights.
        loss = compute_loss(step)
        check_finite(loss, step)
        for group in optimizer.param_groups:
            group["lr"] = training.lr * lr_factor(step, training.steps, min(100, training.steps // 10), "cosine")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        # Log the loss and save a checkpoint.
        done = step + 1
        if done % LOG_EVERY == 0 or done == training.steps:
            print(f"{time.strftime('%H:%M:%S')} {work.name} step {done}/{training.steps} loss {loss.item():.4f}", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == training.steps:
            save_checkpoint(work, done, {key: item.state_dict() for key, item in state.items()})
    for module in modules.values():
        module.eval().requires_grad_(False)
