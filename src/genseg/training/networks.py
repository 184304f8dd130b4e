"""The trained networks (label U-Net and text adapter), their optimizer, and their cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import nn

from genseg.artifacts.seeds import derive_seed
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.backbone import load_unet
from genseg.models.flops import training_flops, unet_flops
from genseg.models.text import TextEmbedding
from genseg.models.unet import label_unet, run_unet
from genseg.params import Optimizer, Params, Train
from genseg.training.data import PhraseData
from genseg.training.stages import StageSpan


class Networks(nn.Module):
    """The trained networks: label U-Net and text adapter."""

    def __init__(self, unet: UNet2DConditionModel, adapter: TextAdapter) -> None:
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(
        self,
        x_t: torch.Tensor,
        image_latents: torch.Tensor,
        t: torch.Tensor,
        texts: list[TextEmbedding],
        drop: torch.Tensor | None,
        size: int,
    ) -> torch.Tensor:
        """Return the U-Net's output [B, K, h, w].

        Args:
            x_t: noisy labels [B, K, h, w].
            image_latents: [B, 4, h, w].
            t: timesteps [B].
            texts: B embeddings.
            drop: [B] bool, samples whose text is replaced by the learned nulls; None for no sample.
            size: side of the images in pixels.
        """
        output = run_unet(self.unet, x_t, image_latents, t, self.adapter(texts, drop), (size, size))
        if torch.is_grad_enabled() and dist.is_initialized():
            # All processes must have gradients for the same parameters: give unused nulls a gradient of zero.
            output = output + 0 * sum(parameter.sum() for parameter in self.adapter.parameters())
        return output


def build_networks(
    params: Params, source: str, revision: str | None, empty: TextEmbedding, label_channels: int = 1
) -> Networks:
    """Build label U-Net and adapter as they are before the first step (fp32 master weights).

    Args:
        source, revision: the backbone, a diffusers directory or a hub id and its commit.
        empty: embedding of the empty text, from which the learned nulls start.
        label_channels: K, channels of x_0.
    """
    torch.manual_seed(derive_seed(params.seed, "networks") % 2**31)
    unet = label_unet(load_unet(source, revision), params.train.image_columns, label_channels)
    adapter = TextAdapter(
        token_width=empty.tokens.shape[-1],
        pooled_width=empty.pooled.shape[-1],
        widths=tuple(self_attention_widths(unet)) if params.train.inject == "all" else (),
        text=params.train.text,
        null_tokens=len(empty.tokens) if params.train.text == "tokens" else 1,
    )
    adapter.start_nulls_from(empty)
    networks = Networks(unet, adapter).requires_grad_(True).train()
    if params.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return networks


def parameter_groups(networks: Networks, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: one as in the paper or, if `lr_new` is given, one of pretrained weights and
    one of new layers (conv_in, conv_out, adapter, nulls)."""
    if optimizer.lr_new is None:
        return [{"params": list(networks.parameters()), "lr": optimizer.lr, "base_lr": optimizer.lr}]
    new_ids = {
        id(p) for module in (networks.unet.conv_in, networks.unet.conv_out, networks.adapter) for p in module.parameters()
    }
    pretrained = [parameter for parameter in networks.parameters() if id(parameter) not in new_ids]
    new = [parameter for parameter in networks.parameters() if id(parameter) in new_ids]
    return [
        {"params": pretrained, "lr": optimizer.lr, "base_lr": optimizer.lr},
        {"params": new, "lr": optimizer.lr_new, "base_lr": optimizer.lr_new},
    ]


def make_optimizer(networks: Networks, optimizer: Optimizer) -> torch.optim.Optimizer:
    """Return Adam or AdamW over the parameter groups. Each group has its learning rate before any schedule in `base_lr`."""
    cls = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
    return cls(parameter_groups(networks, optimizer), betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True)


@torch.no_grad()
def average_weights(average: nn.Module, networks: nn.Module, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * networks. Decay 0 makes an exact copy."""
    for mean, parameter in zip(average.parameters(), networks.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def sample_flops(networks: Networks, data: PhraseData, train: Train, span: StageSpan) -> float:
    """Return the floating-point operations of one training sample with a phrase as long as the first one, without the
    adapter's small share."""
    tokens = len(data.texts[data.rows["phrase"].iloc[0]].tokens) if train.text == "tokens" else 1
    forward = unet_flops(networks.unet.config, data.label_shape[-1], tokens, train.inject == "all")
    return training_flops(forward, recomputed=False) + span.teacher_passes * forward
