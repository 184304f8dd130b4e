"""Images to latents and back, in the backbone's own scaling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

DECODED_PIXELS = 1024**2


def image_tensor(image: Image.Image, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """RGB image -> tensor [3, size, size] in [-1, 1]; the sides are stretched to a square, as the paper's 1024 x 1024."""
    resized = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).to(device)  # as bytes, a quarter of the traffic
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def vae_factor(vae: AutoencoderKL) -> int:
    """Down-sampling factor: 8 in SDXL; nothing here assumes it."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _without_overflow(vae: AutoencoderKL) -> Iterator[None]:
    """SDXL's VAE gives NaN in fp16, which its config says (`force_upcast`): it works in fp32 and is given back as it came."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", True)
    if upcast:
        torch.nn.Module.to(vae, torch.float32)  # diffusers warns of every cast
    try:
        yield
    finally:
        if upcast:
            torch.nn.Module.to(vae, torch.float16)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f], the posterior's mean in unit scale (no sampling)."""
    with _without_overflow(vae):
        mean = vae.encode(images.to(vae.dtype)).latent_dist.mode()
    return (mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def encode_masks(vae: AutoencoderKL, masks: torch.Tensor) -> torch.Tensor:
    """Soft masks [B, 1, H, W] in [0, 1] -> latents [B, C, H/f, W/f] of them as grey images."""
    return encode_images(vae, (2 * masks - 1).expand(-1, 3, -1, -1))


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] in unit scale -> images [B, 3, H, W] in [-1, 1], some at a time: see `decoded_at_once`."""
    at_once = decoded_at_once(latents.shape[-1] * vae_factor(vae))
    with _without_overflow(vae):
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in raw.split(at_once)])


def decoded_at_once(size: int) -> int:
    """Images of a `size` x `size` decoding: a megapixel's activations, 1.6 GB in bf16, keep any GPU busy."""
    return max(1, DECODED_PIXELS // size**2)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image [B, 3, H, W] in [-1, 1] after a trip through the VAE."""
    error = (decode_latents(vae, encode_images(vae, images)).float() - images.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))
