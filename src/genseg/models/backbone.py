"""Loading the backbone: an SDXL-inpainting pipeline in diffusers format, from a directory or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.errors import UserError


@dataclass
class TextEncoders:
    """Both of SDXL's text encoders with their tokenizers, in SDXL's order."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    models: tuple[CLIPTextModel, CLIPTextModelWithProjection]

    @property
    def token_width(self) -> int:
        """Width of a token embedding: both hidden sizes side by side."""
        return sum(model.config.hidden_size for model in self.models)

    @property
    def pooled_width(self) -> int:
        return self.models[1].config.projection_dim


def load_component(cls: Any, source: str, subfolder: str, revision: str | None, dtype: torch.dtype | None = None) -> Any:
    """One component of a pipeline directory or hub repository, in evaluation mode.

    Raises:
        UserError: the directory or repository, or the component in it, is missing or unreadable.
    """
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    if dtype is not None:
        options["dtype"] = dtype
    if not Path(source).exists() and (source.startswith((".", "/")) or source.count("/") != 1):
        raise UserError(f"{source}: no such directory and not a hub id (owner/name); set backbone.init to one of them")
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise UserError(
            f"{source}: no folder {subfolder}/ in it; backbone.init must be an SDXL-inpainting pipeline in diffusers format"
        )
    try:
        component = cls.from_pretrained(source, **options)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise a dozen kinds
        raise UserError(f"{source}/{subfolder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    return component.eval().requires_grad_(False) if isinstance(component, torch.nn.Module) else component


def load_vae(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    return load_component(AutoencoderKL, source, "vae", revision, dtype)


def load_unet(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    return load_component(UNet2DConditionModel, source, "unet", revision, dtype)


def load_text_encoders(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> TextEncoders:
    return TextEncoders(
        (
            load_component(CLIPTokenizer, source, "tokenizer", revision),
            load_component(CLIPTokenizer, source, "tokenizer_2", revision),
        ),
        (
            load_component(CLIPTextModel, source, "text_encoder", revision, dtype),
            load_component(CLIPTextModelWithProjection, source, "text_encoder_2", revision, dtype),
        ),
    )


def noise_schedule(source: str, revision: str | None = None) -> dict[str, Any]:
    """Config of the pipeline's scheduler: the betas the U-Net was trained with."""
    from diffusers import DDIMScheduler

    try:
        config, _ = DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision, return_unused_kwargs=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/scheduler: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return {name: config[name] for name in names}
