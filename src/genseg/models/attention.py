"""Self-attention with injected text tokens (GS, Eq. 3-5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention


class InjectedAttnProcessor:
    """Attention processor for both kinds of layer; self-attention also attends to injected tokens.

    The paper concatenates the adapter's tokens to the layer's input, attends, and discards the rows of the text
    (Eq. 3-5). Only those rows used the text's queries, so giving the image's queries the extra keys and values is
    exactly the same; the discarded work is never done. The injected tokens enter after the layer's norm, and the
    residual is the one before concatenation.

    Receives through `cross_attention_kwargs`:
        injected: {width C: tokens [B, M, C]}, or None.
        text_mask: [B, M] bool, True for real tokens, or None when all are.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        injected: dict[int, torch.Tensor] | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries, width = hidden_states.shape[1:]  # (B, N, C)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = None
        if encoder_hidden_states is not None:
            mask = text_mask
        elif injected is not None:
            tokens = injected[width].to(hidden_states.dtype)
            context = torch.cat([hidden_states, tokens], dim=1)  # (B, N + M, C)
            if text_mask is not None:
                mask = F.pad(text_mask, (queries, 0), value=True)
        heads = attn.heads
        query = attn.to_q(hidden_states).unflatten(-1, (heads, -1))  # (B, N, heads, C / heads)
        key = attn.to_k(context).unflatten(-1, (heads, -1))
        value = attn.to_v(context).unflatten(-1, (heads, -1))
        if mask is not None:
            mask = mask[:, None, None, :]
        attended = self.attend(query, key, value, mask).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended)) / attn.rescale_output_factor

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention over [B, N, heads, d] by the backend that diffusers is set to; in bf16 on a CPU explicitly."""
        explicit = query.device.type == "cpu" and query.dtype == torch.bfloat16
        return (_explicit_attention if explicit else dispatch_attention_fn)(query, key, value, attn_mask=mask)


def _explicit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V for [B, N, heads, d]. In bf16 on a CPU the fused kernel's backward pass takes three to six
    times as long (a third of a training step of the miniature). Adding the mask saves the copies that filling makes, forward
    and back: a fifth of the whole."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if attn_mask is not None:
        logits = logits + torch.zeros_like(attn_mask, dtype=logits.dtype).masked_fill(~attn_mask, -torch.inf)
    return (logits.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def self_attention_widths(unet: UNet2DConditionModel) -> list[int]:
    """Widths C of the U-Net's self-attention layers: 640 and 1280 in SDXL."""
    return sorted({module.to_q.in_features for name, module in unet.named_modules() if name.endswith("attn1")})


def use_injected_attention(unet: UNet2DConditionModel) -> None:
    """Give every attention layer the processor above (stateless: nothing of it is saved with the U-Net)."""
    processor: Any = InjectedAttnProcessor()
    unet.set_attn_processor(processor)
