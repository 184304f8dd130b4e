"""A pretrained text-to-image pipeline as it stands: SD 1.5, SD 2.1, SDXL, each plain or in-painting, from its diffusers files.

GS turns an in-painting U-Net into something else; the diffusion baselines ask the U-Net that it started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.errors import UserError
from genseg.models.backbone import load_component, load_unet, load_vae
from genseg.models.unet import size_ids
from genseg.models.vae import encode_images


@dataclass
class Prompts:
    """B prompts as the U-Net reads them, padded to the tokenizer's length L."""

    tokens: torch.Tensor
    """[B, L, D], to cross-attention."""
    pooled: torch.Tensor
    """[B, P], SDXL's global text embedding (SD has no use for it)."""
    phrase_tokens: torch.Tensor
    """[B, L] bool: which tokens are the phrase's own."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Prompts:
        return Prompts(self.tokens[rows], self.pooled[rows], self.phrase_tokens[rows])


class TextToImage:
    """U-Net, VAE and text encoders of one pipeline; `predict` answers what the U-Net was trained to answer.

    Args:
        source: diffusers directory or hub id. Two text encoders where the U-Net asks for SDXL's conditioning, else one.
        visible: what an in-painting U-Net (9 channels) is told: the whole image, nothing to paint (True), or a hidden image,
            everything to paint, so that the noisy latent is all it knows of the image (False).

    Raises:
        UserError: a component is missing or unreadable, or the U-Net has neither 4 nor 9 input channels.
    """

    def __init__(
        self, source: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32, visible: bool = False
    ) -> None:
        self.device, self.visible = device, visible
        self.unet: UNet2DConditionModel = load_unet(source, revision, dtype).to(device)
        if self.unet.config.in_channels not in (4, 9):
            raise UserError(
                f"{source}: its U-Net has {self.unet.config.in_channels} input channels; the diffusion baselines need a "
                "text-to-image (4) or in-painting (9) Stable Diffusion"
            )
        self.vae: AutoencoderKL = load_vae(source, revision, torch.bfloat16 if dtype == torch.float16 else dtype).to(device)
        parts: list[tuple[Any, str, str]] = [(CLIPTextModel, "tokenizer", "text_encoder")]
        self.double = self.unet.config.addition_embed_type == "text_time"
        if self.double:
            parts.append((CLIPTextModelWithProjection, "tokenizer_2", "text_encoder_2"))
        self.tokenizers = [load_component(CLIPTokenizer, source, folder, revision) for _, folder, _ in parts]
        self.text_encoders = [load_component(cls, source, folder, revision, dtype).to(device) for cls, _, folder in parts]
        schedule = load_component(DDIMScheduler, source, "scheduler", revision)
        self.alphas: torch.Tensor = schedule.alphas_cumprod.to(device)
        """alpha_bar_t [T]."""
        self.prediction_type: str = schedule.config.prediction_type
        self._hidden: dict[tuple[int, int], torch.Tensor] = {}
        self._words: dict[str, torch.Tensor] = {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, 4, h, w] in unit scale."""
        return encode_images(self.vae, images.to(self.device))

    @torch.no_grad()
    def embed(self, phrases: Sequence[str], template: str = "{phrase}") -> Prompts:
        """Encode phrases, each put into a prompt, as the pipelines do: padded to the tokenizer's length.

        SD: the last hidden state. SDXL: the penultimate ones of both encoders side by side.
        """
        prompts = [template.format(phrase=phrase) for phrase in phrases]
        length = min(tokenizer.model_max_length for tokenizer in self.tokenizers)
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            output = encoder(ids.to(self.device), output_hidden_states=self.double)
            hidden.append(output.hidden_states[-2] if self.double else output.last_hidden_state)
        pooled = output.text_embeds if self.double else output.pooler_output
        phrase_tokens = torch.zeros(len(prompts), length, dtype=torch.bool)
        start = 1 + len(self._ids(template.partition("{phrase}")[0]))
        for row, phrase in zip(phrase_tokens, phrases, strict=True):
            row[start : min(start + len(self._ids(phrase)), length - 1)] = True
        return Prompts(torch.cat(hidden, dim=-1), pooled, phrase_tokens.to(self.device))

    def words(self, phrase: str) -> list[str]:
        """The phrase's tokens as texts, in order."""
        return [self.tokenizers[0].decode([token]).strip() for token in self._ids(phrase)]

    def pooled_word(self, word: str) -> torch.Tensor:
        """Pooled embedding [P] of a prompt of one token, remembered."""
        if word not in self._words:
            self._words[word] = self.embed([word]).pooled[0].float()
        return self._words[word]

    def _ids(self, text: str) -> list[int]:
        """Token ids without the start and end tokens."""
        return self.tokenizers[0](text, truncation=False, verbose=False).input_ids[1:-1] if text.strip() else []

    def predict(
        self, x_t: torch.Tensor, t: int, latent: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """The U-Net's answer [B, 4, h, w] at noisy latents x_t [B, 4, h, w] of the image `latent` [1, 4, h, w].

        Args:
            tokens, pooled: of `Prompts`, B rows each.
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = x_t.shape[-2] * factor, x_t.shape[-1] * factor
        sample = x_t
        if self.unet.config.in_channels == 9:
            sample = torch.cat([x_t, self._inpainting(latent, size).to(x_t).expand(len(x_t), -1, -1, -1)], dim=1)
        sample = sample.to(self.unet.dtype)
        ids = size_ids(self.unet, len(sample), *size, sample)
        added = None if ids is None else {"text_embeds": pooled.to(sample.dtype), "time_ids": ids}
        return self.unet(sample, t, tokens.to(sample.dtype), added_cond_kwargs=added, return_dict=False)[0]

    def _inpainting(self, latent: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Mask and masked-image latent [1, 5, h, w]; a hidden pixel is 0, mid-grey, as in SD's in-painting pipelines."""
        if self.visible:
            return torch.cat([torch.zeros_like(latent[:, :1]), latent], dim=1)
        if size not in self._hidden:
            self._hidden[size] = self.encode(torch.zeros(1, 3, *size))
        return torch.cat([torch.ones_like(latent[:, :1]), self._hidden[size].to(latent)], dim=1)
