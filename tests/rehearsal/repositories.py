"""Hub repositories of SDXL-inpainting and Stable Diffusion 1.4 and 2.1 in the published form, with narrow networks.

The weights are written by diffusers and transformers: shards with an index, and a half-precision variant. Configs of schedulers
and tokenizers have the published keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from genseg.models import sdxl, stable_diffusion
from genseg.models.miniature import learn_tokenizer

Vocabulary = tuple[dict[str, int], list[str]]
"""Token ids, and merges in order."""

SHARD = "3MB"
VAE: dict[str, Any] = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 32,
}
TEXT_2 = TEXT | {"hidden_size": 48, "projection_dim": 48}
SDXL_UNET = sdxl.UNET | {
    "addition_time_embed_dim": 16,
    "attention_head_dim": [1, 2, 2],
    "block_out_channels": [32, 64, 64],
    "cross_attention_dim": 32 + 48,
    "layers_per_block": 1,
    "projection_class_embeddings_input_dim": 48 + 6 * 16,
    "transformer_layers_per_block": [1, 1, 2],
}
SD_UNET = {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "layers_per_block": 1}
SD_UNETS: dict[str, dict[str, Any]] = {
    stable_diffusion.SD_14: SD_UNET | {"attention_head_dim": 2},
    stable_diffusion.SD_21: SD_UNET | {"attention_head_dim": [1, 2, 2, 2]},
}
SCHEDULER: dict[str, Any] = {
    "_diffusers_version": "0.21.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def write_repositories(root: Path, captions: Iterable[str]) -> None:
    """Write `root`/owner/name for the three hub ids of the paper's study; tokenizers are trained on the captions."""
    torch.manual_seed(0)
    vocabulary = _vocabulary(sorted(captions))

    folder = root / sdxl.HUB_ID
    _write_index(folder, "StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler", second=True)
    euler = {"interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False}
    _write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"} | SCHEDULER | euler)
    _write_weights(UNet2DConditionModel(**SDXL_UNET), folder / "unet")
    _write_weights(AutoencoderKL(**sdxl.VAE | VAE), folder / "vae")
    _write_text(folder, "", CLIPTextModel, sdxl.TEXT_ENCODER | TEXT, vocabulary, "<|endoftext|>")
    _write_text(folder, "_2", CLIPTextModelWithProjection, sdxl.TEXT_ENCODER_2 | TEXT_2, vocabulary, "!")

    for name, config in SD_UNETS.items():
        folder, configs = root / name, stable_diffusion.CONFIGS[name]
        _write_index(folder, "StableDiffusionPipeline", "PNDMScheduler", second=False)
        _write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"} | SCHEDULER)
        _write_weights(UNet2DConditionModel(**configs["unet"] | config), folder / "unet")
        _write_weights(AutoencoderKL(**configs["vae"] | VAE), folder / "vae")
        pad = "!" if name == stable_diffusion.SD_21 else "<|endoftext|>"
        _write_text(folder, "", CLIPTextModel, configs["text_encoder"] | TEXT, vocabulary, pad)


def _write_index(folder: Path, pipeline: str, scheduler: str, second: bool) -> None:
    """Write `model_index.json` and the files that every repository has."""
    parts = {
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if second:
        parts |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        parts |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    _write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.21.0", **parts})
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def _write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write a model in full precision and its half-precision variant, each in shards if it is larger than one."""
    model.save_pretrained(folder, max_shard_size=SHARD)
    model.half().save_pretrained(folder, variant="fp16", max_shard_size=SHARD)


def _write_text(root: Path, suffix: str, cls: Any, config: dict[str, Any], vocabulary: Vocabulary, pad: str) -> None:
    """Write a text encoder, whose config has the published token ids, and its tokenizer in the published files."""
    ids, merges = vocabulary
    _write_weights(cls(CLIPTextConfig(**config | {"vocab_size": len(ids)})), root / f"text_encoder{suffix}")
    folder = root / f"tokenizer{suffix}"
    _write_json(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

    def token(content: str) -> dict[str, Any]:
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    _write_json(folder / "special_tokens_map.json", {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end})
    added = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False,
        "bos_token": added | start,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
    }
    config |= {"eos_token": added | end, "errors": "replace", "model_max_length": 77, "pad_token": pad}
    _write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "CLIPTokenizer", "unk_token": added | end})


def _vocabulary(captions: list[str]) -> Vocabulary:
    """Return token ids and merges learned from captions. As in CLIP, `!` is first, and start and end are last."""
    model = json.loads(learn_tokenizer(captions, 500, "!").backend_tokenizer.to_str())["model"]
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [
        "!",
        *(token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in ["!", *special]),
        *special,
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {token: number for number, token in enumerate(tokens)}, merges


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
