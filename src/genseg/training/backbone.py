"""Training of the miniature backbone: its autoencoder on the images, its U-Net as a text-to-image inpainting model.

This replaces SDXL-inpainting's pre-training of the paper scale. It uses only the training images and their captions, no masks
and no labels.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline

from genseg.data.images import load_image
from genseg.models.attention import use_injected_attention
from genseg.models.device import DTYPES
from genseg.models.vae import encode_images, image_tensor, psnr
from genseg.params import BackboneTraining
from genseg.training.checkpoints import load_checkpoint, save_checkpoint
from genseg.training.steps import check_finite, lr_factor, step_generator, step_rng

KL_WEIGHT = 1e-6
P_NO_TEXT = 0.1
VARIANTS = 3
"""Masked versions of each image. One of them is masked entirely, which is plain text-to-image."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 50


def load_images(paths: Sequence[str], size: int) -> torch.Tensor:
    """Return images as one uint8 tensor [N, 3, size, size]. (A miniature backbone's data set is small.)"""
    return torch.stack([((image_tensor(load_image(path), size) + 1) * 127.5).round().to(torch.uint8) for path in paths])


def _as_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert images from uint8 to floats in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def fit_vae(
    vae: AutoencoderKL, images: torch.Tensor, training: BackboneTraining, seed: int, work: Path, device: torch.device
) -> None:
    """Train the autoencoder (L1 + `KL_WEIGHT` * KL) on images [N, 3, S, S] uint8, and set `scaling_factor` to 1 / std of the
    latents. Checkpoints are in `work`, from which an interrupted run resumes."""
    vae.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=training.lr, weight_decay=1e-4)
    state = {"model": vae, "optimizer": optimizer}
    for step in range(_resume(work, state), training.steps):
        rng = step_rng(seed, "vae", step)
        batch = _as_float(_crops(images, training.batch, rng), device)
        if rng.random() < 0.5:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, "vae noise", step)).to(device)
        latents = posterior.mean + posterior.std * noise
        restored = vae.decode(latents).sample
        loss = F.l1_loss(restored, batch) + KL_WEIGHT * posterior.kl().mean()
        _update(loss, step, training, optimizer, vae.parameters())
        _log_and_save(step, training, loss, work, state, "vae")
    vae.eval().requires_grad_(False)
    if training.steps:
        vae.register_to_config(scaling_factor=1.0)
        latents = torch.cat([encode_images(vae, _as_float(batch, device)).cpu() for batch in images[:512].split(64)])
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def _crops(images: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """Return `count` random crops of half the side. (The autoencoder is convolutional and learns as much per pixel.)"""
    side = images.shape[-1] // 2
    crops = []
    for _ in range(count):
        number, top, left = rng.randrange(len(images)), rng.randint(0, side), rng.randint(0, side)
        crops.append(images[number, :, top : top + side, left : left + side])
    return torch.stack(crops)


def measure_psnr(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> float:
    """Return the mean PSNR in dB of images [N, 3, S, S] uint8 after the VAE's encoder and decoder."""
    return torch.cat([psnr(vae, _as_float(batch, device)).cpu() for batch in images.split(16)]).mean().item()


def fit_unet(
    pipeline: StableDiffusionXLInpaintPipeline,
    images: torch.Tensor,
    captions: Sequence[Sequence[str]],
    phrases: Sequence[Sequence[str]],
    training: BackboneTraining,
    train_text: bool,
    seed: int,
    work: Path,
    device: torch.device,
) -> None:
    """Train the U-Net (and text encoders) to denoise images, given a caption and the part of the image outside a mask.

    Checkpoints are in `work`, from which an interrupted run resumes.

    Args:
        images: [N, 3, S, S] uint8.
        captions: captions of each image.
        phrases: noun phrases of each image's captions. They are the text in half of the samples, so that the text encoder
            also learns short texts like the phrases of later phases.
        train_text: also train the text encoders (from scratch); otherwise they are unchanged.
    """
    if not training.steps:
        return

    # 1. Prepare the modules, the optimizer and the data.
    unet, vae = pipeline.unet.to(device), pipeline.vae.to(device)
    use_injected_attention(unet)  # nothing is injected here, but this attention is faster
    encoders = (pipeline.text_encoder.to(device), pipeline.text_encoder_2.to(device))
    modules = {"model": unet} | ({"text_encoder": encoders[0], "text_encoder_2": encoders[1]} if train_text else {})
    for module in modules.values():
        module.train().requires_grad_(True)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.99), weight_decay=0.01)
    alphas_bar = pipeline.scheduler.alphas_cumprod.float().to(device)
    clean, masks, masked = _inpainting_latents(vae, images, seed, device)
    size = images.shape[-1]
    state = modules | {"optimizer": optimizer}

    # 2. Resume, and take the steps.
    for step in range(_resume(work, state), training.steps):
        # Draw images, masks, texts, noise and timesteps.
        rng = step_rng(seed, "unet", step)
        generator = step_generator(seed, "unet noise", step)
        indices = [rng.randrange(len(images)) for _ in range(training.batch)]
        variants = [rng.randrange(VARIANTS) for _ in indices]
        texts = ["" if rng.random() < P_NO_TEXT else rng.choice(rng.choice((captions, phrases))[i]) for i in indices]
        x_0 = clean[indices].to(device)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        t = torch.randint(0, len(alphas_bar), (len(indices),), generator=generator).to(device)

        # Evaluate the loss and update the weights.
        alpha_bar = alphas_bar[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        inputs = torch.cat([x_t, masks[indices, variants].to(device), masked[indices, variants].to(device)], dim=1)
        ids = x_0.new_tensor([[size, size, 0, 0, size, size]]).expand(len(indices), -1)
        with torch.autocast(device.type, DTYPES[training.precision], enabled=training.precision != "fp32"):
            tokens, pooled = _encode(pipeline, encoders, texts, device)
            output = unet(inputs, t, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        loss = F.mse_loss(output.float(), noise)
        _update(loss, step, training, optimizer, parameters)
        _log_and_save(step, training, loss, work, state, "unet")
    for module in modules.values():
        module.eval().requires_grad_(False)


@torch.no_grad()
def _inpainting_latents(
    vae: AutoencoderKL, images: torch.Tensor, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents [N, 4, h, w], masks [N, V, 1, h, w] (1 where the image is hidden) and masked-image latents
    [N, V, 4, h, w] for V = `VARIANTS`."""
    clean, masks, masked = [], [], []
    for number, image in enumerate(images):
        rng = step_rng(seed, "inpainting mask", number)
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


def _resume(work: Path, state: dict) -> int:
    """Load the newest checkpoint of `work` into the modules and the optimizer, and return its step (0 without one)."""
    checkpoint = load_checkpoint(work)
    if checkpoint is None:
        return 0
    for name, item in state.items():
        item.load_state_dict(checkpoint[name])
    print(f"resumed {work.name} at step {checkpoint['step']}", flush=True)
    return checkpoint["step"]


def _update(
    loss: torch.Tensor,
    step: int,
    training: BackboneTraining,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
) -> None:
    """Take one optimizer step."""
    check_finite(loss, step)
    for group in optimizer.param_groups:
        group["lr"] = training.lr * lr_factor(step, training.steps, min(100, training.steps // 10), "cosine")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    optimizer.step()


def _log_and_save(step: int, training: BackboneTraining, loss: torch.Tensor, work: Path, state: dict, name: str) -> None:
    """Print the loss and write a checkpoint at their intervals and after the last step."""
    done = step + 1
    if done % LOG_EVERY == 0 or done == training.steps:
        print(f"{time.strftime('%H:%M:%S')} {name} step {done}/{training.steps} loss {loss.item():.4f}", flush=True)
    if done % CHECKPOINT_EVERY == 0 or done == training.steps:
        save_checkpoint(work, done, {key: item.state_dict() for key, item in state.items()})
