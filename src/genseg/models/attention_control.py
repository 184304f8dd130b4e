"""Record or modify the attention probabilities of a stock U-Net.

    with attention_control(unet, store):
        unet(...)

Works on the transformer blocks of any `UNet2DConditionModel` (SD 1.5, SD 2.1, SDXL). Layers that the control does not apply
to, and all layers outside the context, run their own processor; their results are bit-equal to those of the stock network.
"""

from collections import Counter
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
"""Default limit, in bytes, on the probabilities of one slice of image tokens."""
TINY = 1e-12
"""Added to probabilities before normalisation, so that a row of zeros (underflow) also sums to 1."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer in one forward pass."""

    name: str
    """Name of the module, e.g. `up_blocks.1.attentions.0.transformer_blocks.0.attn1`."""
    kind: Kind
    grid: tuple[int, int]
    """(h, w) of the N = h * w image tokens."""


class AttentionControl(Protocol):
    """Receives the attention probabilities of the layers that it applies to, and returns the values to use instead."""

    def applies_to(self, call: AttentionCall) -> bool:
        """Return whether the control receives the probabilities of this layer."""

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        """Return A' for A [B, heads, Q, L] (float32, rows sum to 1) of the image tokens `rows`; L = N in self-attention."""


@contextmanager
def attention_control(unet: UNet2DConditionModel, control: AttentionControl, byte_cap: int = BYTE_CAP) -> Iterator[None]:
    """Run `unet` under `control` within the context; its own processors are restored on exit, also after an exception.

    The image tokens are processed in slices of at least one token, with at most `byte_cap` bytes of probabilities if possible.
    """
    stock = unet.attn_processors
    grids: dict[int, tuple[int, int]] = {}
    controlled: dict[str, Any] = {
        key: _ControlledProcessor(key.removesuffix(".processor"), processor, control, grids, byte_cap)
        for key, processor in stock.items()
        if key.endswith(("attn1.processor", "attn2.processor"))
    }

    def record_grids(_: Any, args: tuple, kwargs: dict) -> None:
        """Record (h, w) by number of tokens: every level halves the latent (rounded up), so the number is unique."""
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        grids.clear()
        for _level in unet.config.block_out_channels:
            grids[height * width] = (height, width)
            height, width = -(-height // 2), -(-width // 2)

    hook = unet.register_forward_pre_hook(record_grids, with_kwargs=True)
    try:
        unet.set_attn_processor(stock | controlled)
        yield
    finally:
        hook.remove()
        unet.set_attn_processor(stock)


class _ControlledProcessor:
    """Attention with an explicit softmax in float32, one slice of queries at a time."""

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
        # 1. Identify the layer; skip it if the control does not apply.
        batch, tokens = hidden_states.shape[:2]  # (B, N, C)
        call = AttentionCall(self.name, "self" if encoder_hidden_states is None else "cross", self.grids[tokens])
        if not self.control.applies_to(call):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        # 2. Project queries, keys and values, as the stock processor does.
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        projections = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projections)  # (B, heads, N, d)
        query = attn.norm_q(query) if attn.norm_q is not None else query
        key = attn.norm_k(key) if attn.norm_k is not None else key
        bias = None
        if attention_mask is not None:
            prepared = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)  # (B * heads, 1 or N, L)
            bias = prepared.unflatten(0, (batch, attn.heads)).float()

        # 3. Apply the control to the probabilities of each slice.
        step = max(1, self.byte_cap // (4 * batch * attn.heads * context.shape[1]))
        slices = []
        for start in range(0, tokens, step):
            rows = slice(start, min(start + step, tokens))
            scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) * attn.scale
            if bias is not None:
                scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])
            probabilities = self.control(scores.softmax(-1), call, rows)
            slices.append(probabilities.to(value.dtype) @ value)

        # 4. Project the output.
        attended = torch.cat(slices, dim=2).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](attended))
        return (output + hidden_states if attn.residual_connection else output) / attn.rescale_output_factor


class AttentionStore:
    """Record attention probabilities, averaged over heads; only one running sum [B, N, L] is kept per (kind, grid).

    Forward passes within one context are averaged, for example one per timestep. Batch size and text length must be constant.

    Args:
        select: returns whether to record a layer of these kinds; None records all of them.
    """

    def __init__(
        self, kinds: Sequence[Kind] = ("cross", "self"), select: Callable[[AttentionCall], bool] | None = None
    ) -> None:
        self.kinds, self.select = tuple(kinds), select
        self._sums: dict[tuple[Kind, tuple[int, int]], torch.Tensor] = {}
        self._rows: Counter[tuple[Kind, tuple[int, int]]] = Counter()

    def applies_to(self, call: AttentionCall) -> bool:
        return call.kind in self.kinds and (self.select is None or self.select(call))

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        mean, key = probabilities.detach().mean(1), (call.kind, call.grid)  # mean: [B, Q, L]
        if key not in self._sums:
            self._sums[key] = mean.new_zeros(mean.shape[0], call.grid[0] * call.grid[1], mean.shape[-1])
        self._sums[key][:, rows] += mean
        self._rows[key] += mean.shape[1]
        return probabilities

    @property
    def maps(self) -> dict[tuple[Kind, tuple[int, int]], torch.Tensor]:
        """{(kind, (h, w)): [B, h * w, L or h * w]}, float32, mean over heads, layers and forward passes; rows sum to 1."""
        return {key: total * (total.shape[1] / self._rows[key]) for key, total in self._sums.items()}


class MaskInjection:
    """G4Seg's injection of a mask into cross- and self-attention.

    M in [0, 1] is the mask on the layer's grid, S the phrase tokens. The paper's equations are not known; we use:
    cross: T = M A_S / sum_S A on S, (1 - M) A / sum_{not S} A elsewhere; A' = (1 - alpha) A + alpha T.
    self: G = M M^T + (1 - M)(1 - M)^T; W' = (1 - alpha) W + alpha rownorm(W G).

    Args:
        mask: [B, h, w] in [0, 1], of any size; resized to the grid of every layer by area averaging.
        phrase_tokens: S as [B, L] bool; every row needs a token inside S and one outside (not checked for meta tensors).
        alpha: strength in [0, 1]; with 0 the output is bit-equal to that of the stock network.

    Raises ValueError if a row of `phrase_tokens` has no token inside S or none outside.
    """

    def __init__(
        self, mask: torch.Tensor, phrase_tokens: torch.Tensor, alpha: float, kinds: Sequence[Kind] = ("cross", "self")
    ) -> None:
        if not phrase_tokens.is_meta and not (phrase_tokens.any(1) & ~phrase_tokens.all(1)).all():
            raise ValueError("every prompt needs a token that belongs to the phrase and one that does not")
        self.mask, self.phrase_tokens, self.alpha, self.kinds = mask.float(), phrase_tokens, alpha, tuple(kinds)

    def applies_to(self, call: AttentionCall) -> bool:
        return self.alpha > 0 and call.kind in self.kinds

    def __call__(self, probabilities: torch.Tensor, call: AttentionCall, rows: slice) -> torch.Tensor:
        mask = F.interpolate(self.mask[:, None], call.grid, mode="area").flatten(2)  # (B, 1, N)
        target = self.cross_target if call.kind == "cross" else self.self_target
        return (1 - self.alpha) * probabilities + self.alpha * target(probabilities, mask[:, 0], rows)

    def cross_target(self, probabilities: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return T [B, heads, Q, L] for A of the tokens `rows`, with M [B, N]; rows sum to 1."""
        in_phrase = self.phrase_tokens[:, None, None, :]
        foreground = mask[:, None, rows, None]
        weights = probabilities + TINY
        phrase = (weights * in_phrase) / (weights * in_phrase).sum(-1, keepdim=True)
        rest = (weights * ~in_phrase) / (weights * ~in_phrase).sum(-1, keepdim=True)
        return foreground * phrase + (1 - foreground) * rest

    def self_target(self, probabilities: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return rownorm(W G) [B, heads, Q, N] for W of the tokens `rows`, with M [B, N]; rows sum to 1."""
        query, key = mask[:, None, rows, None], mask[:, None, None, :]
        weights = probabilities * (query * key + (1 - query) * (1 - key)) + TINY
        return weights / weights.sum(-1, keepdim=True)
