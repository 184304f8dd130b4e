"""The unmodified pretrained pipeline for the diffusion baselines and G4Seg: SD 1.5, SD 2.1 or SDXL, plain or in-painting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.artifacts.templates import fill_template
from genseg.errors import UserError
from genseg.models.backbone import load_component, load_unet, load_vae
from genseg.models.unet import added_conditions
from genseg.models.vae import encode_images, vae_factor


@dataclass
class Prompts:
    """Embeddings of B prompts, padded to the tokenizer's length L."""

    tokens: torch.Tensor
    """[B, L, D], the input of cross-attention."""
    pooled: torch.Tensor
    """[B, P], the global text embedding; SDXL's U-Net receives it, SD's does not."""
    phrase_tokens: torch.Tensor
    """[B, L] bool, True for the tokens of the phrase itself."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.tokens[rows], self.pooled[rows], self.phrase_tokens[rows])


class TextToImage:
    """U-Net, VAE and text encoders of a diffusers directory or hub id; two encoders if the U-Net has SDXL's conditioning.

    Raises UserError if a component is missing or unreadable, or the U-Net has neither 4 nor 9 input channels.
    """

    def __init__(self, source: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.unet: UNet2DConditionModel = load_unet(source, revision, dtype).to(device)
        if self.unet.config.in_channels not in (4, 9):
            raise UserError(
                f"{source}: its U-Net has {self.unet.config.in_channels} input channels; the diffusion baselines need a "
                "text-to-image (4) or in-painting (9) Stable Diffusion"
            )
        self.vae: AutoencoderKL = load_vae(source, revision, torch.bfloat16 if dtype == torch.float16 else dtype).to(device)
        encoders: list[tuple[Any, str, str]] = [(CLIPTextModel, "tokenizer", "text_encoder")]
        self.double = self.unet.config.addition_embed_type == "text_time"
        if self.double:
            encoders.append((CLIPTextModelWithProjection, "tokenizer_2", "text_encoder_2"))
        self.tokenizers = [load_component(CLIPTokenizer, source, folder, revision) for _, folder, _ in encoders]
        self.text_encoders = [load_component(cls, source, folder, revision, dtype).to(device) for cls, _, folder in encoders]
        schedule = load_component(DDIMScheduler, source, "scheduler", revision)
        self.alphas: torch.Tensor = schedule.alphas_cumprod.to(device)
        """alpha_bar_t [T]."""
        self.prediction_type: str = schedule.config.prediction_type
        self._hidden: dict[tuple[int, int], torch.Tensor] = {}
        self._words: dict[str, torch.Tensor] = {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to latents [B, 4, h, w], scaled for the U-Net."""
        return encode_images(self.vae, images.to(self.device))

    @torch.no_grad()
    def embed(self, phrases: Sequence[str], template: str = "{phrase}") -> Prompts:
        """Encode the prompts made from `template` by `fill_template`, padded to the tokenizer's length, as in diffusers.

        SD uses the last hidden state, SDXL the concatenated penultimate hidden states of both encoders.
        """
        prompts, starts = zip(*(fill_template(template, phrase) for phrase in phrases), strict=True)
        length = min(tokenizer.model_max_length for tokenizer in self.tokenizers)
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids.to(self.device), output_hidden_states=self.double)
            hidden.append(output.hidden_states[-2] if self.double else output.last_hidden_state)
        pooled = output.text_embeds if self.double else output.pooler_output
        spans = zip(prompts, starts, map(len, phrases), strict=True)
        phrase_tokens = torch.stack([self.tokens_of(prompt, start, start + count) for prompt, start, count in spans])
        return Prompts(torch.cat(hidden, dim=-1), pooled, phrase_tokens.to(self.device))

    def tokens_of(self, prompt: str, start: int, end: int) -> torch.Tensor:
        """Return which tokens [L] of a padded prompt belong to its characters from `start` to `end`, whole words."""
        length = min(tokenizer.model_max_length for tokenizer in self.tokenizers)
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[1 + len(self.ids(prompt[:start])) : min(1 + len(self.ids(prompt[:end])), length - 1)] = True
        return chosen

    def words(self, phrase: str) -> list[str]:
        """Return the text of each token of a phrase, in order."""
        return [self.tokenizers[0].decode([token]).strip() for token in self.ids(phrase)]

    def pooled_word(self, word: str) -> torch.Tensor:
        """Return the pooled embedding [P] of a single word (cached)."""
        if word not in self._words:
            self._words[word] = self.embed([word]).pooled[0].float()
        return self._words[word]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text without the start and end tokens."""
        return self.tokenizers[0](text, truncation=False, verbose=False).input_ids[1:-1] if text.strip() else []

    def predict(
        self, x_t: torch.Tensor, t: int, latent: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Return the U-Net's output [B, 4, h, w] for noisy latents x_t [B, 4, h, w], as its `prediction_type` defines it.

        Args:
            latent: latent [1, 4, h, w] of the image; in-painting U-Nets use only its shape, device and dtype.
            tokens, pooled: fields of `Prompts`, B rows each.
        """
        size = x_t.shape[-2] * vae_factor(self.vae), x_t.shape[-1] * vae_factor(self.vae)
        dtype, sample = self.unet.dtype, x_t
        if self.unet.config.in_channels == 9:
            sample = torch.cat([x_t, self._inpainting(latent, size).to(x_t).expand(len(x_t), -1, -1, -1)], dim=1)
        added = added_conditions(self.unet, pooled.to(dtype), size)
        return self.unet(sample.to(dtype), t, tokens.to(dtype), added_cond_kwargs=added, return_dict=False)[0]

    def _inpainting(self, latent: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the additional input [1, 5, h, w] of an in-painting U-Net: a mask of ones and the latent of a mid-grey image.

        The whole image is masked, so the noisy latent is the only information about it. Masked pixels are 0, as in diffusers.
        """
        if size not in self._hidden:
            self._hidden[size] = self.encode(torch.zeros(1, 3, *size))
        return torch.cat([torch.ones_like(latent[:, :1]), self._hidden[size].to(latent)], dim=1)
