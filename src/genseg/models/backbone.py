"""Load the components of a pipeline in diffusers format from a local directory or the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.errors import UserError


@dataclass
class TextEncoders:
    """The two text encoders of SDXL with their tokenizers, in SDXL's order."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    models: tuple[CLIPTextModel, CLIPTextModelWithProjection]


def load_component(cls: Any, source: str, subfolder: str, revision: str | None, dtype: torch.dtype | None = None) -> Any:
    """Load one component of a pipeline directory or hub repository, in evaluation mode and without gradients.

    Raises UserError if the directory, the repository or the component is missing or unreadable.
    """
    transformers.utils.logging.disable_progress_bar()
    if not Path(source).exists() and (source.startswith((".", "/")) or source.count("/") != 1):
        raise UserError(f"{source}: no such directory and not a hub id (owner/name); set the backbone to one of them")
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise UserError(f"{source}: missing folder {subfolder}/; the backbone must be a pipeline in diffusers format")
    options = {} if dtype is None else {"dtype": dtype}
    try:
        component = cls.from_pretrained(source, subfolder=subfolder, revision=revision, **options)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise many unrelated types
        raise UserError(f"{source}/{subfolder}: cannot load ({' '.join(str(error).split())[:300]})") from error
    return component.eval().requires_grad_(False) if isinstance(component, torch.nn.Module) else component


def load_vae(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load the VAE (see `load_component`)."""
    return load_component(AutoencoderKL, source, "vae", revision, dtype)


def load_unet(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load the U-Net (see `load_component`)."""
    return load_component(UNet2DConditionModel, source, "unet", revision, dtype)


def load_text_encoders(source: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> TextEncoders:
    """Load the text encoders and their tokenizers (see `load_component`)."""
    tokenizers = [load_component(CLIPTokenizer, source, name, revision) for name in ("tokenizer", "tokenizer_2")]
    first = load_component(CLIPTextModel, source, "text_encoder", revision, dtype)
    second = load_component(CLIPTextModelWithProjection, source, "text_encoder_2", revision, dtype)
    return TextEncoders((tokenizers[0], tokenizers[1]), (first, second))


def load_config(cls: Any, source: str, subfolder: str, revision: str | None) -> dict[str, Any]:
    """Load the config of a U-Net, VAE or scheduler without weights. Raises UserError if it is missing or unreadable."""
    try:
        return cls.load_config(source, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/{subfolder}: cannot load the config ({' '.join(str(error).split())[:300]})") from error


def noise_schedule(source: str, revision: str | None = None) -> dict[str, Any]:
    """Return the number of timesteps and the betas of the U-Net's pretraining, read from the scheduler config."""
    config = load_config(DDIMScheduler, source, "scheduler", revision)
    return {name: config[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
