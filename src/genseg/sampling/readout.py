"""Read-out: conversion of soft label maps at latent size to masks at native size (Fig. 4 of the paper)."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from genseg.artifacts.masks import Mask
from genseg.artifacts.resample import bilinear, nearest
from genseg.models.vae import decode_latents, encode_images


class VaeReadout:
    """VAE decoding of 1-channel labels: extrapolate from the latents of a black and a white image, decode the result, and
    return its luminance."""

    def __init__(self, vae: AutoencoderKL, size: int) -> None:
        self.vae = vae
        white: Any = torch.ones(1, 3, size, size, device=vae.device)
        self.black, self.white = encode_images(vae, -white), encode_images(vae, white)

    def __call__(self, labels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the luminance [N, H, W] in [0, 1] at image size of labels x_0 / b [N, h, w], about -1 (black) to 1 (white)."""
        weights = (torch.from_numpy(labels)[:, None].to(self.black) + 1) / 2
        pictures = decode_latents(self.vae, self.black + weights * (self.white - self.black)).float()
        red, green, blue = pictures.unbind(1)
        return ((0.299 * red + 0.587 * green + 0.114 * blue + 1) / 2).cpu().numpy()


def read_mask(soft: NDArray[np.float32], readout: str, height: int, width: int, threshold: float) -> tuple[Mask, float]:
    """Return the mask [height, width] of a soft map [h, w], and its score: the mean of the up-sampled map inside the mask.

    The score of an empty mask is 0.
    """
    upsample = nearest if readout == "nearest" else bilinear
    upsampled = upsample(soft[None], height, width)[0]
    mask = upsampled >= threshold
    return mask, float(upsampled[mask].mean()) if mask.any() else 0.0
