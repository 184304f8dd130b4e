"""The published configs of Stable Diffusion 1.5 and 2.1 (base, 512 x 512), known without a download."""

from __future__ import annotations

from typing import Any

from genseg.models import sdxl

SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_21 = "stabilityai/stable-diffusion-2-1-base"

_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
VAE = sdxl.VAE | {"sample_size": 512, "scaling_factor": 0.18215}
TEXT_ENCODER_21 = sdxl.TEXT_ENCODER | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
"""OpenCLIP H's text tower without its last layer."""

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    SD_15: {
        "unet": _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False},
        "vae": VAE,
        "text_encoder": sdxl.TEXT_ENCODER,
    },
    SD_21: {
        "unet": _UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": VAE,
        "text_encoder": TEXT_ENCODER_21,
    },
}
"""By hub id. `attention_head_dim` is, in these, the number of heads."""
