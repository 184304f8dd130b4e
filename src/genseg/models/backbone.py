"""Load the components of a pipeline in diffusers format from a local directory or the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.artifacts.files import file_sha256
from genseg.errors import UserError


@dataclass
class TextEncoders:
    """The two text encoders of SDXL with their tokenizers, in SDXL's order."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    models: tuple[CLIPTextModel, CLIPTextModelWithProjection]


def load_component(cls: Any, source: str, subfolder: str, revision: str | None, dtype: torch.dtype | None = None) -> Any:
    """Load one component of a pipeline directory or hub repository, in evaluation mode and without gradients.

    Raises UserError if the directory, the repository or the component is missing or unreadable, or downloaded weights differ
    from those on the hub.
    """
    transformers.utils.logging.disable_progress_bar()
    if not Path(source).exists() and (source.startswith((".", "/")) or source.count("/") != 1):
        raise UserError(f"{source}: no such directory and not a hub id (owner/name); set the backbone to one of them")
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise UserError(f"{source}: missing folder {subfolder}/; the backbone must be a pipeline in diffusers format")
    # Otherwise the libraries also look for pickled weights, which can run code, and report them as missing if a download fails.
    options = {} if dtype is None else {"dtype": dtype, "use_safetensors": True}
    try:
        component = cls.from_pretrained(source, subfolder=subfolder, revision=revision, **options)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise many unrelated types
        _check_download(source, subfolder, revision)
        raise UserError(f"{source}/{subfolder}: cannot load ({' '.join(str(error).split())[:300]})") from error
    _check_download(source, subfolder, revision)
    return component.eval().requires_grad_(False) if isinstance(component, torch.nn.Module) else component


def _check_download(source: str, subfolder: str, revision: str | None) -> None:
    """Compare weights in the hub's cache, which are named by their SHA-256, with their names; the hub's client compares only
    sizes. Raises UserError if a file differs, and removes it, so that the next run downloads it again.
    """
    config = None if Path(source).is_dir() else try_to_load_from_cache(source, f"{subfolder}/config.json", revision=revision)
    if not isinstance(config, str):
        return
    for file in Path(config).parent.glob("*.safetensors"):
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and (sha256 := file_sha256(blob)) != blob.name:
            blob.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            problem = f"the download has SHA-256 {sha256} instead of {blob.name}"
            raise UserError(f"{source}/{subfolder}/{file.name}: {problem}; run again to download it again")


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
