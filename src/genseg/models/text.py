"""Phrases to text embeddings, at their true token length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genseg.models.backbone import TextEncoders


@dataclass
class TextEmbedding:
    """e_i^t of one phrase: `tokens` [M, D] with M the true length (start and end tokens included), `pooled` [P]."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    truncated: bool
    """The phrase was longer than the tokenizer's limit; its first tokens and the end token were kept."""


@torch.no_grad()
def encode_phrases(
    encoders: TextEncoders, phrases: Sequence[str], batch: int = 64, device: torch.device | None = None
) -> list[TextEmbedding]:
    """Encode phrases as SDXL does: penultimate hidden states of both encoders side by side, pooled from the second.

    Runs on `device`, for encoders whose weights lie elsewhere until they are called (offload), else where these are.

    CLIP's attention is causal, so a phrase's embedding does not depend on what it was padded with; phrases of equal
    length are batched together and nothing is padded.
    """
    limit = min(tokenizer.model_max_length for tokenizer in encoders.tokenizers)
    ids = [[token_ids(tokenizer, phrase, limit) for phrase in phrases] for tokenizer in encoders.tokenizers]
    found: dict[int, TextEmbedding] = {}
    lengths = [len(row) for row, _ in ids[0]]
    device = device or next(encoders.models[0].parameters()).device
    for length in sorted(set(lengths)):
        members = [i for i, item in enumerate(lengths) if item == length]
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            hidden = []
            for model, rows in zip(encoders.models, ids, strict=True):
                tokens = torch.tensor([rows[i][0] for i in part], device=device)
                output = model(tokens, output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
            joined = torch.cat(hidden, dim=-1)  # (B, M, D)
            for row, i in enumerate(part):
                found[i] = TextEmbedding(joined[row], output.text_embeds[row], ids[0][i][1])
    return [found[i] for i in range(len(phrases))]


def token_ids(tokenizer: object, phrase: str, limit: int) -> tuple[list[int], bool]:
    """Ids of a phrase, start and end included and at most `limit`, and whether it was cut to that."""
    ids = tokenizer(phrase, truncation=False, verbose=False).input_ids  # type: ignore[operator]
    return (ids, False) if len(ids) <= limit else ([*ids[: limit - 1], ids[-1]], True)
