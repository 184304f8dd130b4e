"""Text adapter: tokens injected into self-attention, and learned null embeddings for the unconditional branch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from genseg.models.text import TextEmbedding


@dataclass
class TextCondition:
    """Text inputs of the U-Net for B samples."""

    tokens: torch.Tensor
    """e^t [B, M, D], the input of cross-attention."""
    mask: torch.Tensor | None
    """[B, M] bool, True for real tokens; None if no row is padded."""
    pooled: torch.Tensor
    """[B, P], SDXL's global text embedding."""
    injected: dict[int, torch.Tensor] | None
    """e_l^p {C: [B, M, C]}, the tokens injected into self-attention layers of width C; None without injection."""

    def __add__(self, other: "TextCondition") -> "TextCondition":
        """Concatenate two conditions along the batch dimension."""
        tokens, mask = _pad([*self._rows(self.tokens), *other._rows(other.tokens)])
        injected = None
        if self.injected is not None and other.injected is not None:
            injected = {
                width: _pad([*self._rows(own), *other._rows(other.injected[width])])[0] for width, own in self.injected.items()
            }
        return TextCondition(tokens, mask, torch.cat([self.pooled, other.pooled]), injected)

    def _rows(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """Split [B, M, D] into B rows [M_i, D] without their padding."""
        if self.mask is None:
            return list(padded)
        return [row[is_real] for row, is_real in zip(padded, self.mask, strict=True)]


class TextAdapter(ModelMixin, ConfigMixin):
    """Adapter_l (GS, Eq. 2) and the learned null embeddings (GS, Eq. 6).

    One linear layer per self-attention width is shared by all layers of that width. This is our reading of the paper's
    "2 different linear layers": SDXL has two widths. The input is RMS-normalised without a learned gain, so the output has
    the scale of a layer-normed hidden state, independent of the scale of the text encoder.

    Args:
        token_width: width D of the text tokens.
        pooled_width: width P of the pooled text embedding.
        widths: self-attention widths C; an empty tuple disables injection.
        text: "tokens" (e^t is the token sequence) or "pooled" (e^t is one token projected from the pooled embedding).
        null_tokens: length M of the null sequence.
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
        """Initialise every null embedding from the empty phrase, the backbone's own encoding of "no text"."""
        tokens = self._tokens([empty])[0]
        self.null.copy_(tokens)
        self.null_pooled.copy_(empty.pooled)
        for width, linear in self.project.items():
            self.null_injected[width].copy_(linear(F.rms_norm(tokens, tokens.shape[-1:])))

    def _tokens(self, phrases: list[TextEmbedding]) -> list[torch.Tensor]:
        """Return e^t [M_i, D] of each phrase."""
        if self.from_pooled is None:
            return [phrase.tokens.to(self.null) for phrase in phrases]
        return [self.from_pooled(phrase.pooled.to(self.null))[None] for phrase in phrases]

    def forward(self, phrases: list[TextEmbedding], drop: torch.Tensor | None = None) -> TextCondition:
        """Return the text condition of B phrases.

        Where `drop` [B] is True, the learned null embeddings replace e^t, every e_l^p and the pooled embedding (Eq. 6).
        """
        dropped = [False] * len(phrases) if drop is None else drop.tolist()
        rows = [self.null if is_null else row for row, is_null in zip(self._tokens(phrases), dropped, strict=True)]
        tokens, mask = _pad(rows)
        injected = {}
        for width, linear in self.project.items():
            projected = linear(F.rms_norm(tokens, tokens.shape[-1:]))
            if any(dropped):
                null = self.null_injected[width]
                parts = zip(projected, rows, dropped, strict=True)
                projected, _ = _pad([null if is_null else part[: len(row)] for part, row, is_null in parts])
            injected[int(width)] = projected
        pooled = [
            self.null_pooled if is_null else phrase.pooled.to(self.null)
            for phrase, is_null in zip(phrases, dropped, strict=True)
        ]
        return TextCondition(tokens, mask, torch.stack(pooled), injected or None)

    def unconditional(self, batch: int) -> TextCondition:
        """Return the null condition (Eq. 9) for `batch` samples."""
        injected = {int(width): null.expand(batch, -1, -1) for width, null in self.null_injected.items()}
        tokens, pooled = self.null.expand(batch, -1, -1), self.null_pooled.expand(batch, -1)
        return TextCondition(tokens, mask=None, pooled=pooled, injected=injected or None)


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad rows [M_i, D] to [B, max M, D]; also return the mask of real tokens (None if all lengths agree)."""
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.stack(rows), None
    padded = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device)[None] < lengths[:, None]
