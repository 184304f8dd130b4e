"""Attention probabilities of a stock U-Net: recorded, modified, or left alone.

    with attention_control(unet, store):
        unet(...)

Works on the transformer blocks of any `UNet2DConditionModel` (SD 1.5, SD 2.1, SDXL). Layers that the control does not want,
and all layers outside the context, run their own processor, so "off" is bit-equal to the stock network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

Kind = Literal["cross", "self"]
BYTE_CAP = 256 * 2**20
TINY = 1e-12
"""Added to probabilities before a normalisation, so that a row whose mass underflowed still sums to 1."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer in one pass.

    name: e.g. `up_blocks.1.attentions.0.transformer_blocks.0.attn1`. grid: (h, w) of the N = h * w image tokens.
    """

    name: str
    kind: Kind
    grid: tuple[int, int]


class AttentionControl(Protocol):
    """Sees, and may replace, the probabilities of the layers that it wants."""

    def wants(self, call: AttentionCall) -> bool: ...

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        """A' for A [B, heads, Q, L] (float32, rows sum to 1) of the image tokens `rows`; L = N in self-attention."""
        ...


@contextmanager
def attention_control(unet: UNet2DConditionModel, control: AttentionControl, byte_cap: int = BYTE_CAP) -> Iterator[None]:
    """Run `unet` under `control`; the processors it had come back afterwards, whatever happens.

    Args:
        byte_cap: most bytes of probabilities held at a time: the image tokens are worked on in slices (one token at least).
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.rpartition(".")[2] in ("attn1", "attn2")
    }
    stock = {name: layer.processor for name, layer in layers.items()}
    grids: dict[int, tuple[int, int]] = {}

    def note_size(_: Any, args: tuple, kwargs: dict) -> None:
        """Every level halves the latent, rounding up; so the number of tokens tells a layer's (h, w)."""
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        grids.clear()
        for _level in unet.config.block_out_channels:
            grids[height * width] = (height, width)
            height, width = -(-height // 2), -(-width // 2)

    hook = unet.register_forward_pre_hook(note_size, with_kwargs=True)
    try:
        for name, layer in layers.items():
            layer.set_processor(_ControlledProcessor(name, stock[name], control, grids, byte_cap))
        yield
    finally:
        hook.remove()
        for name, layer in layers.items():
            layer.set_processor(stock[name])


class _ControlledProcessor:
    """Attention with an explicit softmax (in float32), a slice of queries at a time."""

    def __init__(
        self, name: str, stock: Any, control: AttentionControl, grids: dict[int, tuple[int, int]], byte_cap: int
    ) -> None:
        self.name, self.stock, self.control, self.grids, self.byte_cap = name, stock, control, grids, byte_cap

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, tokens = hidden_states.shape[:2]  # (B, N, C)
        call = AttentionCall(self.name, "self" if encoder_hidden_states is None else "cross", self.grids[tokens])
        if not self.control.wants(call):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )  # (B, heads, N or L, C / heads)
        query = attn.norm_q(query) if attn.norm_q is not None else query
        key = attn.norm_k(key) if attn.norm_k is not None else key
        bias = None
        if attention_mask is not None:
            prepared = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)  # (B * heads, 1 or N, L)
            bias = prepared.unflatten(0, (batch, attn.heads)).float()
        step = max(1, self.byte_cap // (4 * batch * attn.heads * context.shape[1]))
        found = []
        for start in range(0, tokens, step):
            rows = slice(start, min(start + step, tokens))
            scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) * attn.scale
            if bias is not None:
                scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])
            probabilities = self.control(scores.softmax(-1), call, rows)
            found.append(probabilities.to(value.dtype) @ value)
        attended = torch.cat(found, dim=2).transpose(1, 2).flatten(2)
        attended = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            attended = attended + hidden_states
        return attended / attn.rescale_output_factor


class AttentionStore:
    """Records attention, averaged over heads at once: of each (kind, grid) only one sum [B, N, L] is held.

    Several passes in the context are averaged, too (a pass per timestep, say); they need equal batches and text lengths.

    Args:
        kinds: "cross", "self" or both.
        select: which layers of these kinds; all when None. It may look at a call's name and grid.
        per_layer: also keep every layer's mean, by name (mind the memory).
    """

    def __init__(
        self,
        kinds: Sequence[Kind] = ("cross", "self"),
        select: Callable[[AttentionCall], bool] | None = None,
        per_layer: bool = False,
    ) -> None:
        self.kinds, self.select, self.per_layer = tuple(kinds), select, per_layer
        self._sums: dict[Any, torch.Tensor] = {}
        self._rows: dict[Any, int] = {}

    def wants(self, call: AttentionCall) -> bool:
        return call.kind in self.kinds and (self.select is None or self.select(call))

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        mean = probabilities.detach().mean(1)  # (B, Q, L)
        for key in ((call.kind, call.grid), call.name) if self.per_layer else ((call.kind, call.grid),):
            if key not in self._sums:
                self._sums[key] = mean.new_zeros(mean.shape[0], call.grid[0] * call.grid[1], mean.shape[-1])
                self._rows[key] = 0
            self._sums[key][:, rows] += mean
            self._rows[key] += mean.shape[1]
        return probabilities

    @property
    def maps(self) -> dict[tuple[Kind, tuple[int, int]], torch.Tensor]:
        """{(kind, (h, w)): [B, h * w, L or h * w]}, float32, mean over heads, layers and passes; rows sum to 1."""
        return {key: self._mean(key) for key in self._sums if isinstance(key, tuple)}

    @property
    def layers(self) -> dict[str, torch.Tensor]:
        """{layer name: [B, N, L or N]}, mean over heads and passes; empty without `per_layer`."""
        return {key: self._mean(key) for key in self._sums if isinstance(key, str)}

    def _mean(self, key: Any) -> torch.Tensor:
        return self._sums[key] * (self._sums[key].shape[1] / self._rows[key])


class MaskInjection:
    """G4Seg's injection of a mask into cross- and self-attention.

    With M in [0, 1] at a layer's grid and S the phrase's tokens (our reconstruction; the paper's equations are unknown):
    cross: T = M A_S / sum_S A on S, (1 - M) A / sum_{not S} A elsewhere; A' = (1 - alpha) A + alpha T.
    self: G = M M^T + (1 - M)(1 - M)^T; W' = (1 - alpha) W + alpha rownorm(W G).

    Args:
        mask: [B, h, w] in [0, 1], any size: area-averaged to every layer's grid.
        phrase_tokens: S as [B, L] bool; every row needs a token inside S and one outside.
        alpha: strength in [0, 1]; 0 leaves the network stock, bit for bit.
        kinds: which attention is modified.
    """

    def __init__(
        self, mask: torch.Tensor, phrase_tokens: torch.Tensor, alpha: float, kinds: Sequence[Kind] = ("cross", "self")
    ) -> None:
        if not (phrase_tokens.any(1) & ~phrase_tokens.all(1)).all():
            raise ValueError("every prompt needs a token that belongs to the phrase and one that does not")
        self.mask, self.phrase_tokens, self.alpha, self.kinds = mask.float(), phrase_tokens, alpha, tuple(kinds)

    def wants(self, call: AttentionCall) -> bool:
        return self.alpha > 0 and call.kind in self.kinds

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        mask = F.interpolate(self.mask[:, None], call.grid, mode="area").flatten(2)  # (B, 1, N)
        target = self.cross_target if call.kind == "cross" else self.self_target
        return (1 - self.alpha) * probabilities + self.alpha * target(probabilities, mask[:, 0], rows)

    def cross_target(self, probabilities: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        """T [B, heads, Q, L] for A of the tokens `rows`, with M [B, N]; rows sum to 1."""
        inside = self.phrase_tokens[:, None, None, :]
        share = mask[:, None, rows, None]
        weights = probabilities + TINY
        on = (weights * inside) / (weights * inside).sum(-1, keepdim=True)
        off = (weights * ~inside) / (weights * ~inside).sum(-1, keepdim=True)
        return share * on + (1 - share) * off

    def self_target(self, probabilities: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        """rownorm(W G) [B, heads, Q, N] for W of the tokens `rows`, with M [B, N]; rows sum to 1."""
        here, there = mask[:, None, rows, None], mask[:, None, None, :]
        weights = probabilities * (here * there + (1 - here) * (1 - there)) + TINY
        return weights / weights.sum(-1, keepdim=True)
