"""Training and fitting the miniature backbone: its autoencoder on the images, its U-Net as text-to-image in-painting.

This stands where SDXL-inpainting's pre-training stands at paper scale, and sees nothing but the training images and
their captions: no mask, no label.
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
from genseg.training.loop import check_finite, load_checkpoint, lr_factor, save_checkpoint, step_generator, step_rng

KL_WEIGHT = 1e-6
P_NO_TEXT = 0.1
VARIANTS = 3
"""Masked versions prepared of each image; one of them is masked entirely, which is plain text-to-image."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 50


def load_images(paths: Sequence[str], size: int) -> torch.Tensor:
    """Images as one uint8 tensor [N, 3, size, size] (a backbone's data set is small)."""
    return torch.stack([((image_tensor(load_image(path), size) + 1) * 127.5).round().to(torch.uint8) for path in paths])


def _as_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return images.to(device).float() / 127.5 - 1


def fit_vae(
    vae: AutoencoderKL, images: torch.Tensor, training: BackboneTraining, seed: int, work: Path, device: torch.device
) -> None:
    """Train the autoencoder (L1 + a little KL) on images [N, 3, S, S] uint8; set `scaling_factor` to 1 / std of latents."""
    vae.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=training.lr, weight_decay=1e-4)
    start = _resume(work, {"model": vae, "optimizer": optimizer})
    for step in range(start, training.steps):
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
        _after(step, training, loss, work, {"model": vae, "optimizer": optimizer}, "vae")
    vae.eval().requires_grad_(False)
    if training.steps:
        vae.register_to_config(scaling_factor=1.0)
        spread = torch.cat([encode_images(vae, _as_float(part, device)).cpu() for part in images[:512].split(64)]).std()
        vae.register_to_config(scaling_factor=round(1 / spread.item(), 5))


def _crops(images: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """Random crops of half the side: the autoencoder is convolutional, so they teach it as much per pixel."""
    side = images.shape[-1] // 2
    parts = []
    for _ in range(count):
        number, top, left = rng.randrange(len(images)), rng.randint(0, side), rng.randint(0, side)
        parts.append(images[number, :, top : top + side, left : left + side])
    return torch.stack(parts)


def measure_psnr(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> float:
    """Mean PSNR in dB of images [N, 3, S, S] uint8 through the VAE."""
    return torch.cat([psnr(vae, _as_float(part, device)).cpu() for part in images.split(16)]).mean().item()


def fit_unet(
    pipeline: StableDiffusionXLInpaintPipeline,
    images: torch.Tensor,
    captions: Sequence[Sequence[str]],
    parts: Sequence[Sequence[str]],
    training: BackboneTraining,
    train_text: bool,
    seed: int,
    work: Path,
    device: torch.device,
) -> None:
    """Train U-Net (and text encoders) to denoise images from captions and what an in-painting mask leaves visible.

    Args:
        images: [N, 3, S, S] uint8, N images.
        captions, parts: of each image, its captions and their noun phrases; half of the time one of the first, else one of
            the second, so that the text encoder also knows the short texts that it will be asked for.
        train_text: also train the text encoders (from scratch); else they stay as they are.
    """
    if not training.steps:
        return
    unet, vae = pipeline.unet.to(device), pipeline.vae.to(device)
    use_injected_attention(unet)  # nothing is injected here, but its attention is the faster one
    encoders = (pipeline.text_encoder.to(device), pipeline.text_encoder_2.to(device))
    modules = {"model": unet} | ({"text_encoder": encoders[0], "text_encoder_2": encoders[1]} if train_text else {})
    for module in modules.values():
        module.train().requires_grad_(True)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.99), weight_decay=0.01)
    alphas = _alphas(pipeline).to(device)
    clean, masks, masked = _prepare(vae, images, seed, device)
    size = images.shape[-1]
    state = modules | {"optimizer": optimizer}
    for step in range(_resume(work, state), training.steps):
        rng = step_rng(seed, "unet", step)
        generator = step_generator(seed, "unet noise", step)
        chosen = [rng.randrange(len(images)) for _ in range(training.batch)]
        variant = [rng.randrange(VARIANTS) for _ in chosen]
        texts = ["" if rng.random() < P_NO_TEXT else rng.choice(rng.choice((captions, parts))[i]) for i in chosen]
        x_0 = clean[chosen].to(device)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        t = torch.randint(0, len(alphas), (len(chosen),), generator=generator).to(device)
        alpha = alphas[t][:, None, None, None]
        x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
        inputs = torch.cat([x_t, masks[chosen, variant].to(device), masked[chosen, variant].to(device)], dim=1)
        ids = x_0.new_tensor([[size, size, 0, 0, size, size]]).expand(len(chosen), -1)
        with torch.autocast(device.type, DTYPES[training.precision], enabled=training.precision != "fp32"):
            tokens, pooled = _encode(pipeline, encoders, texts, device)
            predicted = unet(inputs, t, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        loss = F.mse_loss(predicted.float(), noise)
        _update(loss, step, training, optimizer, parameters)
        _after(step, training, loss, work, state, "unet")
    for module in modules.values():
        module.eval().requires_grad_(False)


def _alphas(pipeline: StableDiffusionXLInpaintPipeline) -> torch.Tensor:
    return pipeline.scheduler.alphas_cumprod.float()


@torch.no_grad()
def _prepare(
    vae: AutoencoderKL, images: torch.Tensor, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [N, 4, h, w], masks [N, V, 1, h, w] (1 = to be painted) and masked-image latents [N, V, 4, h, w]."""
    clean, masks, masked = [], [], []
    for number, image in enumerate(images):
        rng = step_rng(seed, "inpainting mask", number)
        picture = _as_float(image[None], device)
        latent = encode_images(vae, picture)
        grid, factor = latent.shape[-1], image.shape[-1] // latent.shape[-1]
        variants = torch.ones(VARIANTS, 1, grid, grid, device=device)
        for variant in range(1, VARIANTS):
            side = [rng.randint(grid // 3, grid) for _ in range(2)]
            corner = [rng.randint(0, grid - length) for length in side]
            variants[variant] = 0
            variants[variant, :, corner[0] : corner[0] + side[0], corner[1] : corner[1] + side[1]] = 1
        hidden = picture * (1 - F.interpolate(variants, scale_factor=factor))
        clean.append(latent.cpu())
        masks.append(variants[None].cpu())
        masked.append(encode_images(vae, hidden)[None].cpu())
    return torch.cat(clean), torch.cat(masks), torch.cat(masked)


def _encode(
    pipeline: StableDiffusionXLInpaintPipeline, encoders: tuple[torch.nn.Module, ...], texts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings [B, M, D] padded to the batch's longest text with end tokens, as SDXL is trained, and pooled ones."""
    hidden = []
    for tokenizer, encoder in zip((pipeline.tokenizer, pipeline.tokenizer_2), encoders, strict=True):
        ids = tokenizer(texts, padding="longest", truncation=True, return_tensors="pt").input_ids.to(device)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, dim=-1), output.text_embeds


def _resume(work: Path, state: dict) -> int:
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
    check_finite(loss, step)
    for group in optimizer.param_groups:
        group["lr"] = training.lr * lr_factor(step, training.steps, min(100, training.steps // 10), "cosine")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    optimizer.step()


def _after(step: int, training: BackboneTraining, loss: torch.Tensor, work: Path, state: dict, name: str) -> None:
    done = step + 1
    if done % LOG_EVERY == 0 or done == training.steps:
        print(f"{time.strftime('%H:%M:%S')} {name} step {done}/{training.steps} loss {loss.item():.4f}", flush=True)
    if done % CHECKPOINT_EVERY == 0 or done == training.steps:
        save_checkpoint(work, done, {key: item.state_dict() for key, item in state.items()})
