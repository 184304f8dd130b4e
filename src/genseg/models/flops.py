"""Floating-point operations of the networks, counted on the meta device (shapes without data), and peak rates of GPUs.

A multiply-add counts as two operations. Only matrix products, convolutions and attention are counted; the rest is negligible.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from genseg.models.adapter import TextCondition
from genseg.models.attention import self_attention_widths, use_injected_attention
from genseg.models.unet import run_unet
from genseg.models.vae import vae_factor
from genseg.params import canonical_json

Result = TypeVar("Result")

BACKWARD = 2
"""Cost of a backward pass relative to a forward pass: one product for input gradients, one for weight gradients."""


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, and peak dense FLOP/s in 16 bits (with fp32 accumulation) and in fp32 (without TF32)."""

    memory: int
    half: float
    single: float


GPUS = {
    "A100-SXM4-40GB": Gpu(40 * 2**30, 312e12, 19.5e12),
    "A100": Gpu(80 * 2**30, 312e12, 19.5e12),
    "A800": Gpu(80 * 2**30, 312e12, 19.5e12),
    "H100 PCIe": Gpu(80 * 2**30, 756e12, 51e12),
    "H100 NVL": Gpu(94 * 10**9, 835e12, 60e12),
    "H100": Gpu(80 * 2**30, 989e12, 67e12),
    "H800": Gpu(80 * 2**30, 989e12, 67e12),
    "GH200": Gpu(96 * 10**9, 989e12, 67e12),
    "H200": Gpu(141 * 10**9, 989e12, 67e12),
    "B200": Gpu(180 * 10**9, 2250e12, 75e12),
    "A40": Gpu(48 * 2**30, 150e12, 37.4e12),
    "A30": Gpu(24 * 2**30, 165e12, 10.3e12),
    "A10": Gpu(24 * 2**30, 125e12, 31.2e12),
    "L40S": Gpu(48 * 2**30, 362e12, 91.6e12),
    "L40": Gpu(48 * 2**30, 181e12, 90.5e12),
    "L4": Gpu(24 * 2**30, 121e12, 30.3e12),
    "RTX A6000": Gpu(48 * 2**30, 155e12, 38.7e12),
    "RTX 4090": Gpu(24 * 2**30, 165e12, 82.6e12),
    "RTX 3090": Gpu(24 * 2**30, 71e12, 35.6e12),
    "V100": Gpu(32 * 2**30, 125e12, 15.7e12),
    "T4": Gpu(16 * 2**30, 65e12, 8.1e12),
}
"""Specifications by part of the device name; the first match applies. Source: NVIDIA's data sheets (SXM where it exists)."""


def gpu_model(name: str) -> str | None:
    """Return the key in `GPUS` of a device name (`torch.cuda.get_device_name()`), or None for an unknown GPU."""
    return next((key for key in GPUS if re.search(rf"\b{key}(?!\w| Ti| D\b| Laptop)", name)), None)


def find_gpu(name: str) -> Gpu | None:
    """Return the specifications for a device name, or None for an unknown GPU."""
    key = gpu_model(name)
    return None if key is None else GPUS[key]


def cache_by_config(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Cache a function of a config and other JSON values. `functools.cache` does not accept a config: it is not hashable."""
    results: dict[str, Result] = {}

    @wraps(compute)
    def cached(config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Result:
        key = canonical_json([dict(config), args, kwargs])
        if key not in results:
            results[key] = compute(config, *args, **kwargs)
        return results[key]

    return cached


def _count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build a U-Net on the meta device; its attention accepts injected tokens."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    use_injected_attention(unet)
    return unet


def meta_inputs(unet: UNet2DConditionModel, latent: int, tokens: int, inject: bool, batch: int = 1) -> dict[str, Any]:
    """Return arguments of `run_unet` on the meta device for `batch` phrases of `tokens` tokens and labels of side `latent`.

    The label has the output channels of the U-Net; the remaining input channels are those of the image. With `inject`, the
    adapter's tokens enter self-attention.
    """
    config, empty = unet.config, partial(torch.empty, device="meta")
    pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
    widths = self_attention_widths(unet) if inject else []
    return {
        "x_t": empty(batch, config.out_channels, latent, latent),
        "image_latent": empty(batch, config.in_channels - config.out_channels, latent, latent),
        "timestep": empty(batch),
        "text": TextCondition(
            tokens=empty(batch, tokens, config.cross_attention_dim),
            mask=None,
            pooled=empty(batch, pooled),
            injected={width: empty(batch, tokens, width) for width in widths} or None,
        ),
        "image_size": (latent, latent),
    }


@cache_by_config
def unet_flops(config: Mapping[str, Any], latent: int, tokens: int, inject: bool) -> int:
    """Count the operations of a forward pass of a U-Net of this config for one phrase (see `meta_inputs`)."""
    unet = meta_unet(config)
    return _count(lambda: run_unet(unet, **meta_inputs(unet, latent, tokens, inject)))


def training_flops(forward: int, recomputed: bool) -> int:
    """Return the operations of one training sample, given those of its forward pass.

    `recomputed` adds the second forward pass of gradient checkpointing, which the usual definition of MFU excludes.
    """
    return forward * (1 + BACKWARD + recomputed)


@cache_by_config
def vae_flops(config: Mapping[str, Any], size: int) -> tuple[int, int]:
    """Count the operations of (encoding, decoding) one `size` x `size` image with an `AutoencoderKL` of this config."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
        image, side = torch.empty(1, 3, size, size), size // vae_factor(vae)
        latent = torch.empty(1, vae.config.latent_channels, side, side)
    return _count(lambda: vae.encode(image)), _count(lambda: vae.decode(latent))


def meta_text_encoder(config: Mapping[str, Any], projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build a CLIP text encoder on the meta device, with or without the projection of the pooled embedding."""
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))


def text_flops(config: Mapping[str, Any], tokens: int, projection: bool) -> int:
    """Count the operations of a CLIP text encoder of this config for one phrase of `tokens` tokens."""
    model = meta_text_encoder(config, projection)
    return _count(lambda: model(torch.zeros(1, tokens, dtype=torch.long, device="meta")))
