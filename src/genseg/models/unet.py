"""Conversion of an in-painting U-Net to the label-diffusion U-Net (GS, Eq. 2), and its forward pass."""

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from genseg.errors import UserError
from genseg.models.adapter import TextCondition
from genseg.models.attention import use_injected_attention

COLUMNS = {"latent": slice(0, 4), "mask": slice(4, 5), "masked_image": slice(5, 9)}
"""Slices of the input channels of an in-painting U-Net."""


def label_unet(
    unet: UNet2DConditionModel, image_columns: Literal["masked_image", "latent"], label_channels: int = 1
) -> UNet2DConditionModel:
    """Convert an in-painting U-Net (9 -> 4 channels) to a label-diffusion U-Net (K + 4 -> K label channels) in place.

    conv_in keeps its bias and the pretrained weights of the input channels with the most similar role: those of the mask
    for the noisy label x_t, and those of `image_columns` for the image latent. In SDXL-inpainting, the masked-image channels
    were initialised to zero and trained for fewer steps than those of the noisy latent. conv_out is initialised with twice the
    mean of the 4 pretrained output channels, which keeps their variance if they are independent.

    A label with as many channels as the pretrained output is a VAE latent: x_t then uses the weights of the noisy latent,
    and conv_out is unchanged.

    Args:
        label_channels: number K of channels of the label.

    Raises UserError if the U-Net does not have 9 input channels.
    """
    old_in, old_out = unet.conv_in, unet.conv_out
    if (channels := old_in.in_channels) != 9:
        raise UserError(
            f"the backbone's U-Net has {channels} input channels; label diffusion needs an in-painting U-Net with 9"
        )

    # 1. Create the new convolutions.
    conv_in = nn.Conv2d(label_channels + 4, old_in.out_channels, old_in.kernel_size, padding=old_in.padding)
    conv_out = nn.Conv2d(old_out.in_channels, label_channels, old_out.kernel_size, padding=old_out.padding)

    # 2. Initialise them from the pretrained weights.
    with torch.no_grad():
        is_latent = label_channels == old_out.out_channels
        label = old_in.weight[:, COLUMNS["latent" if is_latent else "mask"]].expand(-1, label_channels, -1, -1)
        conv_in.weight.copy_(torch.cat([label, old_in.weight[:, COLUMNS[image_columns]]], dim=1))
        conv_in.bias = nn.Parameter(old_in.bias.clone())
        mean = 2 * old_out.weight.mean(0, keepdim=True).expand(label_channels, -1, -1, -1)
        conv_out.weight.copy_(old_out.weight if is_latent else mean)
        conv_out.bias = nn.Parameter(old_out.bias.clone() if is_latent else torch.zeros(label_channels))

    # 3. Replace the old convolutions.
    unet.conv_in, unet.conv_out = conv_in.to(old_in.weight), conv_out.to(old_out.weight)
    unet.register_to_config(in_channels=label_channels + 4, out_channels=label_channels)
    use_injected_attention(unet)
    return unet


def added_conditions(
    unet: UNet2DConditionModel, pooled: torch.Tensor, image_size: tuple[int, int]
) -> dict[str, torch.Tensor] | None:
    """Return SDXL's `added_cond_kwargs`: pooled text [B, P] and size values [B, 6]; None if the U-Net takes neither."""
    if unet.config.addition_embed_type != "text_time":
        return None
    sizes = pooled.new_tensor([[*image_size, 0, 0, *image_size]])  # original size, top left corner of the crop, target size
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


def run_unet(
    unet: UNet2DConditionModel,
    x_t: torch.Tensor,
    image_latent: torch.Tensor,
    timestep: torch.Tensor,
    text: TextCondition,
    image_size: tuple[int, int],
) -> torch.Tensor:
    """Return the prediction [B, K, h, w] of the label-diffusion U-Net (GS, Eq. 2).

    Args:
        x_t: noisy labels [B, K, h, w].
        image_latent: latents [B, 4, h, w] of the images.
        timestep: [B] or scalar.
        text: text condition of the B samples.
        image_size: (H, W) of the images in pixels, for SDXL's size conditioning.
    """
    sample = torch.cat([x_t, image_latent], dim=1)
    return unet(
        sample,
        timestep,
        text.tokens.to(sample.dtype),
        added_cond_kwargs=added_conditions(unet, text.pooled.to(sample.dtype), image_size),
        cross_attention_kwargs={"injected": text.injected, "text_mask": text.mask},
        return_dict=False,
    )[0]
