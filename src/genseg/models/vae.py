"""Encode and decode images with the VAE of the backbone; latents are multiplied by its scaling factor."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

DECODED_PIXELS = 1024**2
"""Maximum number of pixels decoded at once. One megapixel needs 1.6 GB of activations in bf16 and fully utilises any GPU."""


def image_tensor(image: Image.Image, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Convert an RGB image to a tensor [3, size, size] in [-1, 1], resized to a square as in the paper (1024 x 1024)."""
    resized = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).to(device)  # transfer bytes, which are a quarter of the size of floats
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def vae_factor(vae: AutoencoderKL) -> int:
    """Return the down-sampling factor f of the VAE: 8 in SDXL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _without_overflow(vae: AutoencoderKL) -> Iterator[None]:
    """Run an fp16 VAE in fp32 within the context if its config has `force_upcast`: SDXL's VAE gives NaN in fp16."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", True)
    if upcast:
        torch.nn.Module.to(vae, torch.float32)  # `ModelMixin.to` warns about every cast
    try:
        yield
    finally:
        if upcast:
            torch.nn.Module.to(vae, torch.float16)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] to scaled latents [B, C, H/f, W/f], the mean of the posterior."""
    with _without_overflow(vae):
        mean = vae.encode(images.to(vae.dtype)).latent_dist.mode()
    return (mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def encode_masks(vae: AutoencoderKL, masks: torch.Tensor) -> torch.Tensor:
    """Encode soft masks [B, 1, H, W] in [0, 1] as grey images to latents [B, C, H/f, W/f]."""
    return encode_images(vae, (2 * masks - 1).expand(-1, 3, -1, -1))


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents [B, C, h, w] to images [B, 3, H, W] in [-1, 1], at most `DECODED_PIXELS` at once."""
    size = latents.shape[-1] * vae_factor(vae)
    with _without_overflow(vae):
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        parts = raw.split(max(1, DECODED_PIXELS // size**2))
        return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in parts])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio [B] in dB of images [B, 3, H, W] in [-1, 1] after encoding and decoding."""
    error = (decode_latents(vae, encode_images(vae, images)).float() - images.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))
