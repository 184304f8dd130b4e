"""The text adapter: tokens injected into self-attention, and the learned nulls of the unconditional branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from genseg.models.text import TextEmbedding


@dataclass
class TextCondition:
    """Everything of the text that reaches the U-Net, for B samples."""

    tokens: torch.Tensor
    """e^t [B, M, D], to cross-attention."""
    mask: torch.Tensor | None
    """[B, M] bool, True for real tokens; None when no row is padded."""
    pooled: torch.Tensor
    """[B, P], SDXL's global text embedding."""
    injected: dict[int, torch.Tensor] | None
    """e_l^p {C: [B, M, C]}, to self-attention layers of width C."""

    def __add__(self, other: TextCondition) -> TextCondition:
        """Both conditions in one batch."""
        tokens, mask = _pad([*self._rows(self.tokens), *other._rows(other.tokens)])
        injected = None
        if self.injected is not None and other.injected is not None:
            injected = {
                width: _pad([*self._rows(self.injected[width]), *other._rows(other.injected[width])])[0]
                for width in self.injected
            }
        return TextCondition(tokens, mask, torch.cat([self.pooled, other.pooled]), injected)

    def _rows(self, padded: torch.Tensor) -> list[torch.Tensor]:
        if self.mask is None:
            return list(padded)
        return [row[keep] for row, keep in zip(padded, self.mask, strict=True)]


class TextAdapter(ModelMixin, ConfigMixin):
    """Adapter_l of Eq. 2 and the nulls of Eq. 6.

    One Linear per width of self-attention, shared by all layers of that width ("2 different linear layers": SDXL has
    two widths; that the paper means this is an inference). Its input is RMS-normalised without a learned gain, so that
    its output is of the order of a layer-normed hidden state whatever the text encoder's scale.

    Args:
        token_width: D of the text tokens.
        pooled_width: P of the pooled text embedding.
        widths: self-attention widths C; empty switches injection off.
        text: "tokens" (e^t is the token sequence) or "pooled" (e^t is one token projected from the pooled embedding).
        null_tokens: M of the null sequence.
    """

    @register_to_config
    def __init__(
        self, token_width: int, pooled_width: int, widths: tuple[int, ...], text: str = "tokens", null_tokens: int = 2
    ) -> None:
        super().__init__()
        self.project = nn.ModuleDict({str(width): nn.Linear(token_width, width) for width in widths})
        self.null = nn.Parameter(torch.zeros(null_tokens, token_width))
        self.null_pooled = nn.Parameter(torch.zeros(pooled_width))
        self.null_injected = nn.ParameterDict({str(width): nn.Parameter(torch.zeros(null_tokens, width)) for width in widths})
        self.from_pooled = nn.Linear(pooled_width, token_width) if text == "pooled" else None

    @torch.no_grad()
    def start_nulls_from(self, empty: TextEmbedding) -> None:
        """Start every null at the embedding of the empty phrase, which is what the backbone knows as "no text"."""
        tokens = self._tokens([empty])[0]
        self.null.copy_(tokens)
        self.null_pooled.copy_(empty.pooled)
        for width, linear in self.project.items():
            self.null_injected[width].copy_(linear(F.rms_norm(tokens, tokens.shape[-1:])))

    def _tokens(self, phrases: list[TextEmbedding]) -> list[torch.Tensor]:
        if self.from_pooled is None:
            return [phrase.tokens.to(self.null) for phrase in phrases]
        return [self.from_pooled(phrase.pooled.to(self.null))[None] for phrase in phrases]

    def forward(self, phrases: list[TextEmbedding], drop: torch.Tensor | None = None) -> TextCondition:
        """Text condition of B phrases; where `drop` [B] bool is True, e^t, every e_l^p and the pooled embedding
        are replaced together by the learned nulls (Eq. 6)."""
        dropped = [False] * len(phrases) if drop is None else drop.tolist()
        rows = [self.null if out else row for row, out in zip(self._tokens(phrases), dropped, strict=True)]
        tokens, mask = _pad(rows)
        injected = None
        if len(self.project):
            projected = {width: linear(F.rms_norm(tokens, tokens.shape[-1:])) for width, linear in self.project.items()}
            if any(dropped):
                lengths = [len(row) for row in rows]
                for width, padded in projected.items():
                    null = self.null_injected[width]
                    parts = [null if out else row[:n] for row, n, out in zip(padded, lengths, dropped, strict=True)]
                    projected[width] = _pad(parts)[0]
            injected = {int(width): value for width, value in projected.items()}
        pooled = torch.stack(
            [self.null_pooled if out else p.pooled.to(self.null) for p, out in zip(phrases, dropped, strict=True)]
        )
        return TextCondition(tokens, mask, pooled, injected)

    def unconditional(self, batch: int) -> TextCondition:
        """The null condition (Eq. 9) for `batch` samples."""
        injected = {int(width): null.expand(batch, -1, -1) for width, null in self.null_injected.items()}
        return TextCondition(
            self.null.expand(batch, -1, -1), None, self.null_pooled.expand(batch, -1), injected if len(self.project) else None
        )


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack rows [M_i, D] to [B, max M, D], and the mask of real tokens (None when all lengths agree)."""
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.stack(rows), None
    padded = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device)[None] < lengths[:, None]
