"""Text embeddings of phrases at their true token length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTokenizer

from genseg.models.backbone import TextEncoders


@dataclass
class TextEmbedding:
    """e_i^t of one phrase, and the pooled embedding [P]."""

    tokens: torch.Tensor
    """[M, D], where M is the true length including the start and end tokens."""
    pooled: torch.Tensor
    truncated: bool
    """Whether the phrase exceeded the tokenizer's limit and was cut to its first tokens and the end token."""


@torch.no_grad()
def encode_phrases(
    encoders: TextEncoders, phrases: Sequence[str], batch: int = 64, device: torch.device | None = None
) -> list[TextEmbedding]:
    """Encode phrases as SDXL does: tokens are the concatenated penultimate hidden states, pooled is from the second encoder.

    CLIP's attention is causal, so padding would not change an embedding. Phrases of equal length are batched without padding.

    Args:
        batch: maximum number of phrases per forward pass.
        device: device of the inputs; None for that of the weights. Set it for offloaded encoders, which move there when called.
    """
    limit = min(tokenizer.model_max_length for tokenizer in encoders.tokenizers)
    ids = [[token_ids(tokenizer, phrase, limit) for phrase in phrases] for tokenizer in encoders.tokenizers]
    lengths = [len(row) for row, _ in ids[0]]
    device = device or next(encoders.models[0].parameters()).device
    embeddings: dict[int, TextEmbedding] = {}
    for length in sorted(set(lengths)):
        members = [i for i, item in enumerate(lengths) if item == length]
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            hidden = []
            for model, rows in zip(encoders.models, ids, strict=True):
                output = model(torch.tensor([rows[i][0] for i in part], device=device), output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
            tokens = torch.cat(hidden, dim=-1)  # (B, M, D)
            for row, i in enumerate(part):
                embeddings[i] = TextEmbedding(tokens[row], output.text_embeds[row], truncated=ids[0][i][1])
    return [embeddings[i] for i in range(len(phrases))]


def token_ids(tokenizer: CLIPTokenizer, phrase: str, limit: int) -> tuple[list[int], bool]:
    """Return at most `limit` token ids of a phrase including start and end, and whether the phrase was truncated."""
    ids = tokenizer(phrase, truncation=False, verbose=False).input_ids
    return (ids, False) if len(ids) <= limit else ([*ids[: limit - 1], ids[-1]], True)
