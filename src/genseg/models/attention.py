"""Self-attention with injected text tokens (GS, Eq. 3-5)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention


class InjectedAttnProcessor:
    """Attention processor for self- and cross-attention; self-attention also attends to injected tokens.

    The paper concatenates the adapter's tokens to the layer's input, attends, and discards the output rows of the text
    (Eq. 3-5). Only those rows use the queries of the text. Adding keys and values of the injected tokens to the image's
    attention therefore gives the same result without computing the discarded rows. The injected tokens enter after the
    layer's norm, and the residual is the input before concatenation.

    Receives through `cross_attention_kwargs`:
        injected: {width C: tokens [B, M, C]}, or None.
        text_mask: [B, M] bool, True for real tokens, or None if all tokens are real.

    Args:
        slice_size: number of heads that are computed at once: a number, "auto" (half of them), "max" (one), or None (all), as
            in diffusers' `enable_attention_slicing`. The result is the same.
    """

    def __init__(self, slice_size: int | Literal["auto", "max"] | None = None) -> None:
        self.slice_size: Any = slice_size

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
        context, mask = hidden_states, None
        if encoder_hidden_states is not None:
            context, mask = encoder_hidden_states, text_mask
        elif injected is not None:
            context = torch.cat([hidden_states, injected[width].to(hidden_states.dtype)], dim=1)  # (B, N + M, C)
            mask = None if text_mask is None else F.pad(text_mask, (queries, 0), value=True)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, N, heads, C / heads)
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(context).unflatten(-1, (attn.heads, -1))
        mask = None if mask is None else mask[:, None, None, :]
        heads = {None: attn.heads, "auto": max(1, attn.heads // 2), "max": 1}.get(self.slice_size, self.slice_size)
        if heads == attn.heads:
            attended = self.attend(query, key, value, mask)
        else:
            slices = zip(query.split(heads, 2), key.split(heads, 2), value.split(heads, 2), strict=True)
            attended = torch.cat([self.attend(q, k, v, mask) for q, k, v in slices], 2)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2).to(query.dtype))) / attn.rescale_output_factor

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute attention over [B, N, heads, d] with the backend selected in diffusers, or without it for bf16 on a CPU."""
        if query.device.type == "cpu" and query.dtype == torch.bfloat16:
            return _explicit_attention(query, key, value, mask)
        return dispatch_attention_fn(query, key, value, attn_mask=mask)


def _explicit_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V for [B, N, heads, d].

    In bf16 on a CPU, the backward pass of the fused kernel takes three to six times as long as this one: a third of a
    training step of the miniature backbone. The mask is added, because `masked_fill` would copy the logits in the forward
    and the backward pass, which takes a fifth of the total time.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is not None:
        logits = logits + torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def self_attention_widths(unet: UNet2DConditionModel) -> list[int]:
    """Return the widths C of the U-Net's self-attention layers in ascending order: 640 and 1280 in SDXL."""
    return sorted({module.to_q.in_features for name, module in unet.named_modules() if name.endswith("attn1")})


def use_injected_attention(unet: UNet2DConditionModel, slice_size: int | Literal["auto", "max"] | None = None) -> None:
    """Set `InjectedAttnProcessor` on every attention layer. It has no weights, so `save_pretrained` does not store it."""
    unet.set_attn_processor(InjectedAttnProcessor(slice_size))
