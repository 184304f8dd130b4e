"""Floating-point operations of the networks, counted on the meta device (shapes without memory), and what a GPU does.

Two operations per multiply-add; matrix products, convolutions and attention are counted, the rest is noise beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from genseg.models.adapter import TextCondition
from genseg.models.attention import self_attention_widths, use_injected_attention
from genseg.models.unet import run_unet
from genseg.params import canonical_json

BACKWARD = 2
"""Operations of a backward pass in forward passes: one product for the inputs' gradients, one for the weights'."""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: memory in bytes, dense operations a second in 16 bits (fp32 sums) and in fp32 (no TF32)."""

    memory: int
    half: float
    single: float


GPUS = {
    "A100-SXM4-40GB": Gpu(40 * 2**30, 312e12, 19.5e12),
    "A100": Gpu(80 * 2**30, 312e12, 19.5e12),
    "H100": Gpu(80 * 2**30, 989e12, 67e12),
    "H200": Gpu(141 * 10**9, 989e12, 67e12),
    "B200": Gpu(180 * 10**9, 2250e12, 75e12),
    "L40S": Gpu(48 * 2**30, 362e12, 91.6e12),
    "RTX 4090": Gpu(24 * 2**30, 165e12, 82.6e12),
}
"""By a part of the name that the driver gives them; NVIDIA's data sheets, SXM where there are two."""


def find_gpu(name: str) -> Gpu | None:
    """The GPU whose name (`torch.cuda.get_device_name()`) this is, or None when its figures are not known here."""
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net of this config with shapes and no memory; its attention takes injected tokens."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    use_injected_attention(unet)
    return unet


def meta_inputs(unet: UNet2DConditionModel, latent: int, tokens: int, inject: bool, batch: int = 1) -> dict[str, Any]:
    """Arguments of `run_unet` for `batch` phrases of `tokens` tokens at a `latent` x `latent` label, on the meta device."""
    config = unet.config
    labels = config.out_channels

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
    widths = self_attention_widths(unet) if inject else []
    return {
        "x_t": empty(batch, labels, latent, latent),
        "image_latent": empty(batch, config.in_channels - labels, latent, latent),
        "timestep": torch.empty(batch, device="meta"),
        "text": TextCondition(
            tokens=empty(batch, tokens, config.cross_attention_dim),
            mask=None,
            pooled=empty(batch, pooled),
            injected={width: empty(batch, tokens, width) for width in widths} or None,
        ),
        "image_size": (latent, latent),
    }


def unet_flops(config: Mapping[str, Any], latent: int, tokens: int, inject: bool) -> int:
    """Operations of one evaluation: one phrase of `tokens` tokens at a `latent` x `latent` label.

    Args:
        config: of a `UNet2DConditionModel`, e.g. `unet.config`; the channels that are not labels are the image's.
        inject: the adapter's tokens enter self-attention.
    """
    return _unet_flops(canonical_json(dict(config)), latent, tokens, inject)


@cache
def _unet_flops(config: str, latent: int, tokens: int, inject: bool) -> int:
    unet = meta_unet(json.loads(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_unet(unet, **meta_inputs(unet, latent, tokens, inject))
    return counter.get_total_flops()


def training_flops(forward: int, recomputed: bool) -> int:
    """Operations of a training sample from those of its forward pass; gradient checkpointing runs that pass twice.

    The usual "model FLOPs" of an MFU leave recomputation out: `recomputed=False`.
    """
    return forward * (1 + BACKWARD + recomputed)


@cache
def _vae_flops(config: str, size: int) -> tuple[int, int]:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads(config))
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            mean = vae.encode(torch.empty(1, 3, size, size)).latent_dist.mean
        with FlopCounterMode(display=False) as decoding, torch.no_grad():
            vae.decode(mean)
    return encoding.get_total_flops(), decoding.get_total_flops()


def vae_flops(config: Mapping[str, Any], size: int) -> tuple[int, int]:
    """Operations of (encoding, decoding) one `size` x `size` image with an `AutoencoderKL` of this config."""
    return _vae_flops(canonical_json(dict(config)), size)


def meta_text_encoder(config: Mapping[str, Any], projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of this config with shapes and no memory."""
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))


def text_flops(config: Mapping[str, Any], tokens: int, projection: bool) -> int:
    """Operations of a CLIP text encoder of this config on one phrase of `tokens` tokens."""
    model = meta_text_encoder(config, projection)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    return counter.get_total_flops()
