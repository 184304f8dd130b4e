"""From soft label maps at latent size to masks at native size (Fig. 4 of the paper)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask
from genseg.artifacts.resample import bilinear
from genseg.models.vae import decode_latents, encode_images


def quantise(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Soft maps as they are stored (1/255 steps), so that a read-out can be redone from the stored maps exactly."""
    return (np.rint(np.clip(maps, 0, 1) * 255) / 255).astype(np.float32)


def nearest(maps: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Nearest-neighbour up-sampling of maps [..., h, w], pixel centres at half-integers."""
    rows = ((np.arange(height) + 0.5) * maps.shape[-2] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * maps.shape[-1] / width).astype(int)
    return maps[..., rows[:, None], columns[None, :]]


class VaeReadout:
    """VAE decoding of a 1-channel map: interpolate by the map between the latents of a black and a white image, decode,
    take the luminance."""

    def __init__(self, vae: AutoencoderKL, size: int) -> None:
        self.vae = vae
        plain: Any = torch.ones(1, 3, size, size, device=vae.device)
        self.black, self.white = encode_images(vae, -plain), encode_images(vae, plain)

    def __call__(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Maps [N, h, w] in [0, 1] -> luminance [N, H, W] in [0, 1] at image size."""
        weights = torch.from_numpy(maps)[:, None].to(self.black)
        pictures = decode_latents(self.vae, self.black + weights * (self.white - self.black)).float()
        red, green, blue = pictures.unbind(1)
        return ((0.299 * red + 0.587 * green + 0.114 * blue + 1) / 2).cpu().numpy()


def read_mask(soft: NDArray[np.float32], readout: str, height: int, width: int, threshold: float) -> tuple[Mask, float]:
    """Mask [height, width] and its confidence: the mean of the up-sampled map inside the mask, 0 for an empty one."""
    enlarge = nearest if readout == "nearest" else bilinear
    large = enlarge(soft[None], height, width)[0]
    mask = large >= threshold
    return mask, float(large[mask].mean()) if mask.any() else 0.0
