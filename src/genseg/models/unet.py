"""From an in-painting U-Net to the label-diffusion U-Net (GS, Eq. 2), and its call."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from genseg.errors import UserError
from genseg.models.adapter import TextCondition
from genseg.models.attention import use_injected_attention

COLUMNS = {"latent": slice(0, 4), "mask": slice(4, 5), "masked_image": slice(5, 9)}
"""Input channels of SDXL-inpainting's conv_in."""


def label_unet(
    unet: UNet2DConditionModel, image_columns: Literal["masked_image", "latent"], label_channels: int = 1
) -> UNet2DConditionModel:
    """Turn an in-painting U-Net (9 -> 4 channels) into a label-diffusion U-Net (K + 4 -> K label channels), in place.

    conv_in keeps the pretrained columns whose role is nearest: the noisy label x_t takes the mask's column, the image
    latent those of the masked image (or of the noisy latent, `image_columns="latent"`: the masked-image columns of
    SDXL-inpainting started at zero and saw fewer steps). The bias is kept. conv_out starts as the mean of the pretrained
    output channels, scaled by 2 so that its output keeps their variance if they are independent.

    A label of as many channels as the pretrained output is a latent of the VAE: x_t takes the noisy latent's columns, and
    conv_out stays as it is.

    Raises:
        UserError: the U-Net does not have 9 input channels.
    """
    if unet.conv_in.in_channels != 9:
        raise UserError(
            f"the backbone's U-Net has {unet.conv_in.in_channels} input channels; "
            "label diffusion starts from an in-painting U-Net with 9"
        )
    old_in, old_out = unet.conv_in, unet.conv_out
    conv_in = nn.Conv2d(label_channels + 4, old_in.out_channels, old_in.kernel_size, padding=old_in.padding)
    conv_out = nn.Conv2d(old_out.in_channels, label_channels, old_out.kernel_size, padding=old_out.padding)
    with torch.no_grad():
        latent = label_channels == old_out.out_channels
        label = old_in.weight[:, COLUMNS["latent" if latent else "mask"]].expand(-1, label_channels, -1, -1)
        conv_in.weight.copy_(torch.cat([label, old_in.weight[:, COLUMNS[image_columns]]], dim=1))
        conv_in.bias = nn.Parameter(old_in.bias.clone())
        mean = 2 * old_out.weight.mean(0, keepdim=True).expand(label_channels, -1, -1, -1)
        conv_out.weight.copy_(old_out.weight if latent else mean)
        conv_out.bias = nn.Parameter(old_out.bias.clone() if latent else torch.zeros(label_channels))
    unet.conv_in, unet.conv_out = conv_in.to(old_in.weight), conv_out.to(old_out.weight)
    unet.register_to_config(in_channels=label_channels + 4, out_channels=label_channels)
    use_injected_attention(unet)
    return unet


def size_ids(unet: UNet2DConditionModel, batch: int, height: int, width: int, like: torch.Tensor) -> torch.Tensor | None:
    """SDXL's size conditioning [B, 6]: (original, crop, target), here the network's own size, no crop; None without it."""
    if unet.config.addition_embed_type != "text_time":
        return None
    return like.new_tensor([[height, width, 0, 0, height, width]]).expand(batch, -1)


def run_unet(
    unet: UNet2DConditionModel,
    x_t: torch.Tensor,
    image_latent: torch.Tensor,
    timestep: torch.Tensor,
    text: TextCondition,
    image_size: tuple[int, int],
) -> torch.Tensor:
    """Eq. 2: the network's prediction [B, K, h, w] for noisy labels x_t [B, K, h, w] and image latents [B, 4, h, w].

    Args:
        timestep: [B] or scalar.
        image_size: (H, W) of the image in pixels, for SDXL's size conditioning.
    """
    sample = torch.cat([x_t, image_latent], dim=1)
    ids = size_ids(unet, len(sample), *image_size, sample)
    added = {"text_embeds": text.pooled.to(sample.dtype), "time_ids": ids} if ids is not None else None
    return unet(
        sample,
        timestep,
        text.tokens.to(sample.dtype),
        added_cond_kwargs=added,
        cross_attention_kwargs={"injected": text.injected, "text_mask": text.mask},
        return_dict=False,
    )[0]
